import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from training.data import (
    QUESTION,
    Case,
    ManifestError,
    check,
    manifest_digest,
    read_manifest,
    split_by_patient,
    write_manifest,
)
from training.phantoms.generate import PROMPT, ImageFormat, Order, generate


def kinds(report_cases: list[Case]) -> set[str]:
    return {problem.kind for problem in check(report_cases).problems}


def test_manifest_survives_writing_and_reading(cases: list[Case], world: Path, tmp_path: Path) -> None:
    copy = write_manifest(cases, world / "copy" / "manifest.jsonl")
    assert read_manifest(copy) == cases
    shutil.rmtree(copy.parent)


@pytest.mark.parametrize("end", ["\x85", "\u2028", "\r", "\x0c"])
def test_a_text_may_hold_any_end_of_line(cases: list[Case], tmp_path: Path, end: str) -> None:
    told = [replace(cases[0], answer=f"A cyst.{end}A stone."), cases[1]]
    assert read_manifest(write_manifest(told, tmp_path / "manifest.jsonl")) == told


def test_images_below_the_manifest_are_written_as_relative_paths(cases: list[Case], world: Path) -> None:
    file = write_manifest(cases, world / "again.jsonl")
    assert json.loads(file.read_text().splitlines()[0])["image"] == "v0.npz"


def test_a_split_is_read_alone(world: Path) -> None:
    assert [case.case_id for case in read_manifest(world, "validation")] == ["case4", "case5"]


def test_phantoms_and_adapters_ask_the_same_question() -> None:
    assert QUESTION == PROMPT


def test_a_clean_manifest_has_no_fault(cases: list[Case]) -> None:
    report = check(cases)
    assert report.ok
    assert report.text() == "cases: train 4, validation 2, test 0\nno fault found"


def test_phantoms_as_dicom_pass_the_check_and_an_empty_folder_is_no_image(tmp_path: Path) -> None:
    list(generate(Order(tmp_path, 1, 1, image_format=ImageFormat.DICOM), processes=1))
    made = read_manifest(tmp_path)
    assert Path(made[0].image).is_dir()
    assert check(made).ok
    (tmp_path / "empty").mkdir()
    assert kinds([replace(made[0], image=str(tmp_path / "empty"))]) == {"missing file"}


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"image": "/nowhere/a.nii.gz"}, "missing file"),
        ({"answer": "  "}, "empty text"),
        ({"case_id": "case1"}, "duplicate case"),
        ({"patient_id": "p4"}, "patient in two splits"),
        ({"study_id": "s5"}, "study in two splits"),
    ],
)
def test_every_fault_is_named(cases: list[Case], change: dict[str, str], kind: str) -> None:
    assert kinds([replace(cases[0], **change), *cases[1:]]) == {kind}


def test_equal_volumes_under_two_names_in_two_splits_are_found(cases: list[Case], tmp_path: Path) -> None:
    twin = tmp_path / "other_name.npz"
    shutil.copy(cases[0].image, twin)
    assert kinds([*cases[:4], replace(cases[4], image=str(twin)), cases[5]]) == {"equal volume in two splits"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1 is not JSON"),
        ('{"id": "a"}', "no text under image, prompt, answer"),
        (
            '{"id":"a","image":"b","prompt":"c","answer":"d","split":"e","patient":"f","study":"g"}',
            "the split is 'e'",
        ),
    ],
)
def test_a_line_that_is_no_case_is_an_error_that_names_it(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "manifest.jsonl").write_text(line + "\n")
    with pytest.raises(ManifestError, match=said):
        read_manifest(tmp_path)


def test_a_missing_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="python -m training phantoms"):
        read_manifest(tmp_path)


def test_digest_depends_on_the_rows_and_not_on_their_order(cases: list[Case]) -> None:
    assert manifest_digest(cases) == manifest_digest(cases[::-1])
    assert manifest_digest(cases) != manifest_digest([replace(cases[0], answer="other"), *cases[1:]])


def test_patients_are_split_in_the_asked_shares() -> None:
    splits = [split_by_patient(f"patient {number}", 0.2, 0.3) for number in range(2000)]
    assert abs(splits.count("test") / 2000 - 0.3) < 0.05
    assert abs(splits.count("validation") / 2000 - 0.2) < 0.05
