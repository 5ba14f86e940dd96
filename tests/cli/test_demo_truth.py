"""The demo's table of truth and draft claims only what stands in the text."""

import json

import pytest

from training.phantoms import labeler
from worker.cli.demo_truth import NOT_NAMED, NOT_PAINTED, Row, compare
from worker.core.notices import NOTICES
from worker.demo import study

DRAFT = """FINDINGS:
There is a 17 mm nodule in the right middle lobe. No pleural effusion. The spleen is enlarged, 15 cm.
IMPRESSION:
Right middle lobe nodule, 17 mm."""


def test_each_painted_finding_stands_beside_what_the_draft_says_of_it() -> None:
    truth = study.truth(study.FOLDER)
    assert truth is not None
    rows = {row.finding: row for row in compare(truth, DRAFT)}
    assert rows["Lung nodule"] == Row("Lung nodule", "right, middle lobe, 19 mm", "right, middle lobe, 17 mm")
    assert rows["Pleural effusion"].drafted == NOT_NAMED
    assert rows["Hepatic cyst"].drafted == NOT_NAMED
    assert rows["Splenomegaly"].painted == NOT_PAINTED


def test_the_other_side_is_another_finding() -> None:
    truth = study.truth(study.FOLDER)
    assert truth is not None
    rows = [
        row
        for row in compare(truth, DRAFT.replace("right", "left").replace("Right", "Left"))
        if "nodule" in row.finding
    ]
    assert [(row.painted == NOT_PAINTED, row.drafted == NOT_NAMED) for row in rows] == [(False, True), (True, False)]


def test_the_report_that_was_written_with_the_study_names_all_and_nothing_else() -> None:
    truth = study.truth(study.FOLDER)
    assert truth is not None
    written = json.loads((study.FOLDER / study.TRUTH_NAME).read_text(encoding="utf-8"))["report"]
    rows = compare(truth, written)
    assert len(rows) == len(truth)
    assert all(row.drafted == row.painted for row in rows)


@pytest.mark.parametrize("notice", sorted(NOTICES))
def test_what_the_system_says_about_its_model_is_no_finding(notice: str) -> None:
    with_notice = DRAFT.replace("FINDINGS:\n", f"FINDINGS:\n{notice} ")
    assert labeler.read(with_notice).findings == labeler.read(DRAFT).findings
    assert not labeler.read(f"FINDINGS:\n{notice}").findings
