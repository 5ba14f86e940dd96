"""The writer states what is there; the labeler reads it back exactly, and common paraphrases of it."""

import pytest

from training.phantoms import labeler, phrases, report
from training.phantoms.disease import draw_case
from training.phantoms.vocabulary import Finding, FindingType, Region

Plain = tuple[str, str, str, int | None, str, str]


def plain(finding: Finding) -> Plain:
    return (
        finding.kind.value,
        finding.side.value,
        finding.place,
        finding.size_mm,
        finding.density,
        finding.degree,
    )


@pytest.mark.parametrize("full", [False, True], ids=["core", "full"])
def test_labeler_reads_the_writers_reports_back_exactly(full: bool) -> None:
    for seed in range(1000):
        case = draw_case(seed, full=full)
        text = report.write(case)
        read = labeler.read(text)
        assert [plain(f) for f in read.findings] == [plain(f) for f in case.findings], text


def test_reports_of_single_regions_are_read_back_exactly() -> None:
    for seed in range(250):
        case = draw_case(seed, full=True)
        read = [
            plain(finding)
            for region in case.scan.regions
            for finding in labeler.read(report.write(case, (region,))).findings
        ]
        assert sorted(read, key=str) == sorted((plain(f) for f in case.findings), key=str)


def test_nothing_that_is_present_is_denied_and_nothing_denied_is_present() -> None:
    for seed in range(300):
        case = draw_case(seed)
        read = labeler.read(report.write(case))
        assert not read.denied & {finding.kind for finding in case.findings}


def test_the_wording_varies_from_case_to_case() -> None:
    normal = [report.write(case) for case in map(draw_case, range(120)) if not case.findings]
    assert len(set(normal)) > 0.9 * len(normal)


def test_other_wordings_of_a_case_tell_the_same_truth_in_other_words() -> None:
    for case in map(draw_case, range(100)):
        texts = [report.write(case, wording=wording) for wording in range(4)]
        assert len(set(texts)) == 4
        assert all(
            [plain(f) for f in labeler.read(text).findings] == [plain(f) for f in case.findings] for text in texts
        )


def test_plain_words_tell_the_same_truth_and_differ_by_the_truth_alone() -> None:
    normal = set()
    for case in map(draw_case, range(200)):
        text = report.write(case, wording=None)
        assert [plain(f) for f in labeler.read(text).findings] == [plain(f) for f in case.findings], text
        if not case.findings:
            normal.add((case.scan.regions, text))
    assert len(normal) == len({regions for regions, _ in normal})


def test_a_normal_report_has_no_number_and_no_comparison() -> None:
    for case in map(draw_case, range(300)):
        text = report.write(case).lower()
        assert not any(word in text for word in ("previous", "prior", "compared", "unchanged", "interval change"))
        assert case.findings or not any(letter.isdigit() for letter in text)


def test_a_region_that_was_not_scanned_is_refused() -> None:
    case = next(case for case in map(draw_case, range(50)) if case.scan.crop == "chest")
    with pytest.raises(ValueError, match="does not show abdomen"):
        report.write(case, (Region.ABDOMEN,))


PARAPHRASES: list[tuple[str, set[Plain]]] = [
    (
        "A 12 mm nodule is present in the right upper lobe and there is a small left pleural effusion.",
        {("lung_nodule", "right", "upper lobe", 12, "", ""), ("pleural_effusion", "left", "", None, "", "")},
    ),
    (
        "14 x 11 mm pulmonary nodule within the left lower lobe, without associated lymphadenopathy.",
        {("lung_nodule", "left", "lower lobe", 14, "", "")},
    ),
    (
        "Bilateral pleural effusions, 22 mm on the right and 3.5 cm on the left.",
        {("pleural_effusion", "right", "", 22, "", ""), ("pleural_effusion", "left", "", 35, "", "")},
    ),
    (
        "The right lung is clear, left lower lobe consolidation.",
        {("consolidation", "left", "lower lobe", None, "", "")},
    ),
    ("Bibasilar atelectasis.", {("atelectasis", "right", "", None, "", ""), ("atelectasis", "left", "", None, "", "")}),
    ("The heart is markedly enlarged.", {("cardiomegaly", "", "", None, "", "")}),
    ("Simple cyst measuring 2.3 cm in hepatic segment VI.", {("hepatic_cyst", "", "segment VI", 23, "", "")}),
    (
        "Two hyperattenuating liver lesions, the largest 18 mm in segment IV.",
        {("hepatic_lesion", "", "segment IV", 18, "hyperdense", "")},
    ),
    ("Spleen is enlarged at 15.2 cm.", {("splenomegaly", "", "", 152, "", "")}),
    (
        "Obstructing 11 mm stone in the lower pole of the left kidney with moderate hydronephrosis.",
        {("renal_calculus", "left", "lower pole", 11, "", ""), ("hydronephrosis", "left", "", None, "", "")},
    ),
    ("Moderate amount of free intraperitoneal fluid.", {("ascites", "", "", None, "", "")}),
    ("Acute compression fracture of L1 with 40% height loss.", {("vertebral_fracture", "", "L1", None, "", "")}),
    (
        "Cardiomegaly without pericardial effusion, but small right effusion measuring 18 mm.",
        {("cardiomegaly", "", "", None, "", ""), ("pleural_effusion", "right", "", 18, "", "")},
    ),
    ("Large right-sided pneumothorax, depth 3.1 cm.", {("pneumothorax", "right", "", 31, "", "")}),
    ("4.6 cm infrarenal abdominal aortic aneurysm.", {("aortic_aneurysm", "", "infrarenal aorta", 46, "", "")}),
    ("No gallstones; urinary bladder contains an 8 mm stone.", {("bladder_stone", "", "", 8, "", "")}),
    ("Hypodense mass in the head of the pancreas, 28 mm.", {("pancreatic_mass", "", "head", 28, "", "")}),
    (
        "Exophytic 35 mm cyst of the upper pole of the right kidney.",
        {("renal_cyst", "right", "upper pole", 35, "", "")},
    ),
    ("Right renal collecting system is dilated, pelvis 22 mm.", {("hydronephrosis", "right", "", 22, "", "")}),
    ("Mild coronary artery calcifications.", {("coronary_calcification", "", "", None, "", "mild")}),
    (
        "A 20 mm right and a 30 mm left pleural effusion.",
        {("pleural_effusion", "right", "", 20, "", ""), ("pleural_effusion", "left", "", 30, "", "")},
    ),
    (
        "No pleural effusion on the right, a small one on the left.",
        {("pleural_effusion", "left", "", None, "", "")},
    ),
    (
        "Nodules in the left and right lower lobe of 12 and 14 mm.",
        {("lung_nodule", "left", "lower lobe", 12, "", ""), ("lung_nodule", "right", "lower lobe", 14, "", "")},
    ),
    ("Effusion on the right and none on the left.", {("pleural_effusion", "right", "", None, "", "")}),
    ("The right effusion is not resolved.", {("pleural_effusion", "right", "", None, "", "")}),
    ("Fatty infiltrate of the liver.", {("steatosis", "", "", None, "", "")}),
    ("Partially resolved right pneumothorax.", {("pneumothorax", "right", "", None, "", "")}),
    ("Old compression deformity of T12.", {("vertebral_fracture", "", "T12", None, "", "")}),
    ("Wedge fracture of the first lumbar vertebra.", {("vertebral_fracture", "", "L1", None, "", "")}),
    ("Hyperdense hepatic focus of 12 mm.", {("hepatic_lesion", "", "", 12, "hyperdense", "")}),
    ("A small amount of fluid around the liver.", {("ascites", "", "", None, "", "")}),
    ("Infiltrate in the RUL.", {("consolidation", "right", "upper lobe", None, "", "")}),
    ("12 mm nodule in the LLL.", {("lung_nodule", "left", "lower lobe", 12, "", "")}),
    ("Enlarged mediastinal lymph nodes, up to 18 mm.", {("lymphadenopathy", "", "mediastinal", 18, "", "")}),
]


@pytest.mark.parametrize(("sentence", "meant"), PARAPHRASES)
def test_a_radiologists_paraphrase_is_read(sentence: str, meant: set[Plain]) -> None:
    assert {plain(finding) for finding in labeler.read(sentence).findings} == meant


@pytest.mark.parametrize(
    ("sentence", "denied"),
    [
        ("Neither pneumothorax nor pleural effusion is identified.", {"pneumothorax", "pleural_effusion"}),
        ("Pneumothorax is not seen.", {"pneumothorax"}),
        ("The heart is not enlarged.", {"cardiomegaly"}),
        ("No hydronephrosis on either side and no renal stones.", {"hydronephrosis", "renal_calculus"}),
        ("No free fluid or free air.", {"ascites"}),
        ("Negative for fracture.", {"vertebral_fracture"}),
        ("The previously described nodule is no longer seen.", {"lung_nodule"}),
        ("Resolved right pleural effusion.", {"pleural_effusion"}),
        ("Interval resolution of the left lower lobe consolidation.", {"consolidation"}),
        ("The right pneumothorax has resolved.", {"pneumothorax"}),
    ],
)
def test_a_denial_is_not_a_finding(sentence: str, denied: set[str]) -> None:
    read = labeler.read(sentence)
    assert read.findings == ()
    assert {kind.value for kind in read.denied} == denied


@pytest.mark.parametrize(
    "sentence",
    ["Pneumothorax cannot be excluded.", "A fracture is not excluded.", "Cannot exclude a small pneumothorax."],
)
def test_what_is_left_open_is_neither_stated_nor_denied(sentence: str) -> None:
    assert labeler.read(sentence) == labeler.Reading((), frozenset())


def test_words_in_any_order_are_read_without_an_error() -> None:
    # A model that is still untrained writes like this.
    words = report.write(draw_case(13, full=True)).split() + report.write(draw_case(4)).split()
    for seed in range(60):
        shuffled = " ".join(words[(seed * 31 + number * (7 + seed)) % len(words)] for number in range(80))
        for finding in labeler.read(shuffled).findings:
            assert finding.size_mm is None or finding.size_mm > 0


def test_impression_fills_what_the_findings_left_out() -> None:
    read = labeler.read("FINDINGS:\nChest: There is a pleural effusion.\nIMPRESSION:\nLeft pleural effusion, 20 mm.")
    assert [plain(finding) for finding in read.findings] == [("pleural_effusion", "left", "", 20, "", "")]


def test_every_kind_has_wordings_in_both_sections() -> None:
    assert set(phrases.PRESENT) == set(phrases.IN_SHORT) == set(FindingType)
