import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from mu2_model import Mu2ForConditionalGeneration, Mu2Processor
from training import tables
from training.collators import VolumeSource
from training.commands import check_data
from training.data import Case, write_manifest
from training.drafting import DraftedCase, Drafter, read_drafts, write_drafts
from training.evaluate import Options, evaluate
from training.evaluation_commands import held_out_cases, read_phantom_report, report_of, score_drafts
from training.green import PhantomJudge
from training.metrics.findings import Stated, stated
from training.model_card import SCORES_FILE, write_card
from training.phantoms import report
from training.phantoms.disease import draw_case
from training.preferences import PairRules, make_pairs, pick_pair, read_pairs, write_pairs
from training.volumes import VolumeCache

SEEDS = range(970_000_000, 970_000_020)


@pytest.fixture(scope="module")
def phantom_cases() -> list[Case]:
    made = []
    for seed in SEEDS:
        case = draw_case(seed)
        findings = tuple(finding.to_dict() for finding in case.findings)
        name = f"c{seed}"
        made.append(Case(name, f"/{name}.npz", "Report?", report.write(case), "test", name, name, "", findings))
    return made


def drafted(cases: list[Case], texts: list[str]) -> list[DraftedCase]:
    return [DraftedCase(case, (text,)) for case, text in zip(cases, texts, strict=True)]


JUDGE = PhantomJudge(read_phantom_report)


def test_the_true_reports_score_one_everywhere(phantom_cases: list[Case]) -> None:
    result = score_drafts("truth", drafted(phantom_cases, [c.answer for c in phantom_cases]), JUDGE, None)
    scores = result.scores()
    for name in ("finding_micro_f1", "finding_macro_f1", "side_accuracy", "green", "rouge1", "bleu1"):
        assert scores[name] == pytest.approx(1.0), name
    assert scores["normal_false_positive_rate"] == 0
    assert scores["shuffled_finding_micro_f1"] is not None
    assert scores["shuffled_finding_micro_f1"] < 0.5


def test_failed_drafts_score_nothing_and_are_counted(phantom_cases: list[Case]) -> None:
    texts = [case.answer if number % 2 else "" for number, case in enumerate(phantom_cases)]
    figures = score_drafts("half", drafted(phantom_cases, texts), JUDGE, None).figures("command", 20)
    assert figures["failed"] == 10
    assert figures["rouge1"] == pytest.approx(0.5)
    assert figures["green"] == pytest.approx(0.5)
    assert figures["finding_micro_f1"] < 1


def test_answers_that_no_one_can_parse_are_a_rate_and_not_zeros(phantom_cases: list[Case]) -> None:
    class Mumbling:
        name = "mumbling"
        asked = 0

        def judge(self, reference: str, candidate: str) -> object:
            self.asked += 1
            return None if self.asked % 4 == 0 else JUDGE.judge(reference, candidate)

    texts = [case.answer for case in phantom_cases]
    figures = score_drafts("x", drafted(phantom_cases, texts), Mumbling(), None).figures("command", 20)  # type: ignore[arg-type]
    assert figures["green_unparsed_rate"] == 0.25
    assert figures["green"] == 1.0


def test_every_figure_has_an_interval_around_it(phantom_cases: list[Case]) -> None:
    texts = [case.answer if number % 3 else "Lungs are clear." for number, case in enumerate(phantom_cases)]
    figures = score_drafts("x", drafted(phantom_cases, texts), JUDGE, None).figures("command", 50)
    for name, (low, high) in figures["intervals"].items():
        assert low <= figures[name] <= high, name
    assert "finding_micro_f1" in figures["intervals"]


def test_the_same_report_for_all_shows_in_the_distinct_ratio(phantom_cases: list[Case]) -> None:
    result = score_drafts("x", drafted(phantom_cases, ["Lungs are clear."] * 20), None, None)
    assert result.figures("command", 10)["distinct_report_ratio"] == 1 / 20


def test_the_better_of_two_systems_is_told_with_its_p(phantom_cases: list[Case]) -> None:
    good = score_drafts("good", drafted(phantom_cases, [c.answer for c in phantom_cases]), JUDGE, None)
    bad = score_drafts("bad", drafted(phantom_cases, ["Lungs are clear."] * 20), JUDGE, None)
    difference, p = good.against(bad)
    assert difference == pytest.approx(1.0)
    assert p < 0.05


def test_texts_without_structured_truth_are_scored_by_words_alone() -> None:
    result = evaluate("x", [("a", "A cyst.", None), ("b", "No cyst.", None)], ["A cyst.", ""], Options())
    scores = result.scores()
    assert scores["finding_micro_f1"] is None
    assert scores["rouge1"] == pytest.approx(0.5)


def test_tables_stand_beside_the_published_rows_and_mark_them(phantom_cases: list[Case]) -> None:
    figures = score_drafts("ours", drafted(phantom_cases, [c.answer for c in phantom_cases]), JUDGE, None).figures(
        "c", 10
    )
    first = tables.table_1([figures], "CT-RATE")
    assert "| ours | 1.000" in first
    assert "μ²LLM-1B (SFT + DPO), published | 0.539 | 0.429 | 0.359 | 0.890" in first
    second = tables.table_2([{**figures, "name": "+RPE"}])
    assert "0.281 | 0.421 | 0.277 | 0.236 | 0.880" in second


def test_an_evaluation_has_a_table_in_the_shape_of_each_of_the_published_two(phantom_cases: list[Case]) -> None:
    result = score_drafts("ours", drafted(phantom_cases, [c.answer for c in phantom_cases]), None, None)
    markdown = report_of([result], [result.figures("c", 10)], None)["markdown"]
    lines = markdown.splitlines()
    assert lines[0].startswith("| system | rouge1 | green | meteor | bertscore |")
    assert "| arm | bleu4 | rouge1 | green | meteor | bertscore | finding_micro_f1 |" in lines
    assert "published" not in markdown


def test_the_card_takes_its_scores_from_the_file(world: Path, phantom_cases: list[Case]) -> None:
    figures = score_drafts("ours", drafted(phantom_cases, [c.answer for c in phantom_cases]), JUDGE, None).figures(
        "c", 10
    )
    (world / "init" / SCORES_FILE).write_text(json.dumps(figures))
    text = write_card(world / "init").read_text()
    (world / "init" / SCORES_FILE).unlink()
    assert "| finding_micro_f1 | 1.000 | 1.000 to 1.000 |" in text
    assert "Printed by `c`." in text


@pytest.mark.parametrize(
    ("splits", "asked", "held_out", "taken"),
    [
        (("train", "validation", "test"), None, ("test", "validation"), {"test"}),
        (("train", "validation", "test"), None, ("validation",), {"validation"}),
        (("train", "validation"), None, ("test", "validation"), {"validation"}),
        (("train", "validation"), "train", ("test", "validation"), {"train"}),
        (("train",), None, ("validation",), {"train"}),
    ],
)
def test_what_was_trained_on_is_scored_only_when_it_is_asked_for(
    phantom_cases: list[Case],
    tmp_path: Path,
    splits: tuple[str, ...],
    asked: str | None,
    held_out: tuple[str, ...],
    taken: set[str],
) -> None:
    rows = [replace(case, split=splits[number % len(splits)]) for number, case in enumerate(phantom_cases)]
    manifest = write_manifest(rows, tmp_path / "manifest.jsonl")
    assert {case.split for case in held_out_cases([manifest], asked, held_out)} == taken


def test_preferences_on_a_set_without_validation_patients_are_refused(
    phantom_cases: list[Case], tmp_path: Path
) -> None:
    rows = [replace(case, split=("train", "test")[number % 2]) for number, case in enumerate(phantom_cases)]
    manifest = write_manifest(rows, tmp_path / "manifest.jsonl")
    with pytest.raises(typer.BadParameter, match="hold patients out by `import --validation`"):
        held_out_cases([manifest], None, ("validation",))
    with pytest.raises(typer.BadParameter, match="no validation cases"):
        held_out_cases([manifest], "validation", ("validation",))


LEFT = "FINDINGS:\nChest: There is a 12 mm nodule in the left upper lobe.\nIMPRESSION:\nLeft lung nodule."
RIGHT = LEFT.replace("left", "right").replace("Left", "Right")
NORMAL = "FINDINGS:\nChest: The lungs are clear without nodule.\nIMPRESSION:\nNo abnormality of the chest."


def pair_case() -> Case:
    return Case("a", "/a.npz", "Report?", LEFT, "validation", "p", "s")


def test_the_best_and_the_worst_draft_make_a_pair() -> None:
    outcome, pair = pick_pair(DraftedCase(pair_case(), (NORMAL, LEFT, RIGHT, LEFT)), JUDGE, PairRules())
    assert outcome == "pair"
    assert pair is not None
    assert (pair.chosen, pair.chosen_score, pair.rejected_score) == (LEFT, 1.0, 0.0)


@pytest.mark.parametrize(
    ("texts", "outcome"),
    [
        ((LEFT, LEFT, ""), "fewer than two different drafts"),
        ((RIGHT, NORMAL), "margin too small"),
        ((LEFT, NORMAL + " The aorta is normal." * 12), "lengths too different"),
    ],
)
def test_what_makes_no_pair_is_counted_by_its_reason(texts: tuple[str, ...], outcome: str) -> None:
    pairs, told = make_pairs([DraftedCase(pair_case(), texts)], JUDGE)
    assert pairs == []
    assert told.outcomes == {outcome: 1}


def test_pairs_survive_writing_and_a_radiologists_correction_needs_no_scores(tmp_path: Path) -> None:
    pairs, _ = make_pairs([DraftedCase(pair_case(), (NORMAL, LEFT))], JUDGE)
    write_pairs(pairs, tmp_path / "pairs.jsonl")
    assert read_pairs(tmp_path / "pairs.jsonl") == pairs
    row = {"case_id": "h1", "image": "v.nii.gz", "question": "Report?", "chosen": "Signed.", "rejected": "Draft."}
    (tmp_path / "hospital.jsonl").write_text(json.dumps(row) + "\n")
    corrected = read_pairs(tmp_path / "hospital.jsonl")[0]
    assert corrected.image == str(tmp_path / "v.nii.gz")
    assert corrected.chosen_score > corrected.rejected_score


@pytest.mark.parametrize("end", ["\x85", "\u2028", "\x0c"])
def test_pairs_and_drafts_may_hold_any_end_of_line(tmp_path: Path, end: str) -> None:
    drafted = DraftedCase(pair_case(), (NORMAL, f"{LEFT}{end}"))
    pairs, _ = make_pairs([drafted], JUDGE)
    assert pairs[0].chosen == f"{LEFT}{end}"
    write_pairs(pairs, tmp_path / "pairs.jsonl")
    assert read_pairs(tmp_path / "pairs.jsonl") == pairs
    write_drafts([drafted], tmp_path / "drafts.jsonl")
    assert read_drafts(tmp_path / "drafts.jsonl", [drafted.case]) == [drafted]


@pytest.fixture
def drafter(world: Path, tmp_path: Path) -> Drafter:
    def source(model: Mu2ForConditionalGeneration, processor: Mu2Processor) -> VolumeSource:
        return VolumeSource(VolumeCache(tmp_path, processor.image_processor))

    return Drafter(world / "init", source, batch_size=2)


def test_a_volume_that_cannot_be_read_is_a_failure_of_its_own_case(drafter: Drafter, cases: list[Case]) -> None:
    broken = replace(cases[1], image="/nowhere.npz")
    rows = list(drafter.draft([cases[0], broken, cases[2]]))
    assert [row.case.case_id for row in rows] == ["case0", "case1", "case2"]
    assert "is not there" in rows[1].failure
    assert rows[1].texts == ("",)


def test_a_draft_without_an_end_counts_as_failed(drafter: Drafter, cases: list[Case]) -> None:
    drafter.max_new_tokens = 1
    row = next(iter(drafter.draft(cases[:1])))
    assert (row.texts, row.failure) == (("",), "no end within the limit")


def test_findings_of_manifest_and_labeler_are_one_kind_of_value() -> None:
    assert stated({"type": "lung_nodule", "side": "left", "place": "", "size_mm": 12}) == Stated(
        "lung_nodule", "left", "", 12
    )
    assert read_phantom_report(LEFT) == [Stated("lung_nodule", "left", "upper lobe", 12)]


def test_the_check_command_exits_with_1_when_something_is_wrong(world: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(check_data)
    assert CliRunner().invoke(app, ["--data", str(world)]).exit_code == 0
    row = json.loads((world / "manifest.jsonl").read_text().splitlines()[0])
    (tmp_path / "manifest.jsonl").write_text(json.dumps({**row, "image": "gone.npz"}) + "\n")
    result = CliRunner().invoke(app, ["--data", str(tmp_path)])
    assert result.exit_code == 1
    assert "missing file: 1 (case0)" in result.output
