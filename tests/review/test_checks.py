"""What blocks a signature, and what must not."""

import pytest

from worker.core.checks import Rule, blocking
from worker.core.report import Assessment, Origin, Section, Sentence


def told(text: str, section: Section = Section.FINDINGS, **changes: object) -> Sentence:
    """A sentence that somebody accepted."""
    return Sentence(section, text, **{"assessment": Assessment.ACCEPTED, **changes})  # type: ignore[arg-type]


def rules(*sentences: Sentence, sex: str = "", communicated: bool = False) -> set[Rule]:
    """The rules that block these sentences, beside an impression that is there."""
    there = (*sentences, told("Nothing else.", Section.IMPRESSION))
    return {p.rule for p in blocking(there, patient_sex=sex, communicated=communicated)}


def test_sentence_that_nobody_judged_blocks() -> None:
    assert rules(told("Clear lungs.", assessment=Assessment.UNTOUCHED)) == {Rule.UNTOUCHED}


def test_own_sentence_of_a_person_needs_no_judgement() -> None:
    own = told("Clear lungs.", assessment=Assessment.UNTOUCHED, origin=Origin.PERSON)
    assert rules(own) == set()


def test_impression_of_rejected_sentences_alone_is_empty() -> None:
    sentences = [told("Clear lungs."), told("Cyst.", Section.IMPRESSION, assessment=Assessment.REJECTED)]
    assert {p.rule for p in blocking(sentences)} == {Rule.EMPTY_IMPRESSION}


@pytest.mark.parametrize(
    ("finding", "impression"),
    [
        ("There is a cyst in the left kidney.", "Right renal cyst."),
        ("Nodule in the right upper lobe.", "Left upper lobe nodule."),
        ("Small right pleural effusion.", "Left effusion."),
        ("Left adrenal nodule of 12 mm.", "Right adrenal adenoma."),
    ],
)
def test_impression_on_the_other_side_blocks(finding: str, impression: str) -> None:
    assert Rule.SIDE in rules(told(finding), told(impression, Section.IMPRESSION))


@pytest.mark.parametrize(
    ("finding", "impression"),
    [
        ("There is a cyst in the left kidney.", "Left renal cyst."),
        ("Bilateral pleural effusions.", "Right pleural effusion."),
        ("Both kidneys are normal.", "Normal left kidney."),
        ("The right kidney is absent. The left kidney is large.", "Left renal hypertrophy."),
        ("The heart is of normal size.", "Left renal cyst."),
    ],
)
def test_impression_that_agrees_does_not_block(finding: str, impression: str) -> None:
    assert Rule.SIDE not in rules(told(finding), told(impression, Section.IMPRESSION))


@pytest.mark.parametrize(
    ("sex", "text", "blocks"),
    [
        ("M", "The uterus is normal.", True),
        ("F", "The prostate is enlarged.", True),
        ("F", "The uterus is normal.", False),
        ("M", "The prostate is enlarged.", False),
        ("O", "The uterus is normal.", False),
        ("", "The prostate is enlarged.", False),
    ],
)
def test_organ_of_the_other_sex_blocks(sex: str, text: str, blocks: bool) -> None:
    assert (Rule.SEX in rules(told(text), sex=sex)) is blocks


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("Nodule measuring 12.", True),
        ("Mass of 3 x 4 x 5 in the liver.", True),
        ("Aorta with a diameter of 4.5.", True),
        ("Nodule measuring 12 mm.", False),
        ("Mass of 3 x 4 x 5 cm in the liver.", False),
        ("Mass of 3 cm x 4 cm.", False),
        ("Nodules measuring 3 to 5 mm.", False),
        ("A 12-mm nodule in segment 8.", False),
        ("Fracture of L2, compared with 2024.", False),
        ("Attenuation measuring 45 HU.", False),
    ],
)
def test_size_needs_a_unit(text: str, blocks: bool) -> None:
    assert (Rule.SIZE_WITHOUT_UNIT in rules(told(text))) is blocks


@pytest.mark.parametrize(
    ("text", "critical"),
    [
        ("Large right pneumothorax.", True),
        ("Acute pulmonary embolism in the left lower lobe.", True),
        ("Ruptured infrarenal aortic aneurysm.", True),
        ("No pneumothorax.", False),
        ("No evidence of pulmonary embolism or aortic dissection.", False),
        ("Pneumothorax is not seen.", False),
        ("There is free air. No fracture.", True),
        ("The lungs are clear.", False),
    ],
)
def test_critical_finding_is_known_by_its_words(text: str, critical: bool) -> None:
    assert (Rule.CRITICAL_NOT_COMMUNICATED in rules(told(text))) is critical


def test_critical_finding_blocks_until_somebody_was_told() -> None:
    assert rules(told("Tension pneumothorax on the left.")) == {Rule.CRITICAL_NOT_COMMUNICATED}
    assert rules(told("Tension pneumothorax on the left."), communicated=True) == set()


def test_rejected_sentence_is_not_checked() -> None:
    assert rules(told("Tension pneumothorax.", assessment=Assessment.REJECTED)) == set()


def test_problem_names_the_sentence_and_the_word() -> None:
    (problem,) = blocking([told("Fine."), told("The uterus is normal.", Section.IMPRESSION)], patient_sex="M")
    assert (problem.index, problem.word) == (1, "uterus")
    assert "uterus" in problem.title
