"""`mu2 volume`: any folder, no database."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from pydicom.data import get_testdata_file
from typer.testing import CliRunner, Result

from tests.imaging import synthetic
from tests.imaging.synthetic import Scan
from worker.cli import app

LOWER = Scan(
    corner=(-15.0, -16.0, -48.0),
    attributes={"SeriesNumber": 3, "BodyPartExamined": "ABDOMENPELVIS", "SeriesDescription": "AX"},
)


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """A command sets up logging for its own process; these run inside the tests' process."""
    root = logging.getLogger()
    handlers, level, hook = root.handlers[:], root.level, sys.excepthook
    yield
    root.handlers[:], sys.excepthook = handlers, hook
    root.setLevel(level)
    logging.captureWarnings(False)


def mu2_volume(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["volume", *map(str, arguments)])


def report_of(*arguments: object) -> dict[str, Any]:
    result = mu2_volume(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A study of one series beside a file that is no DICOM object."""
    synthetic.write(Scan(), tmp_path / "in" / "deep" / "er")
    (tmp_path / "in" / "readme.txt").write_text("hello")
    return tmp_path / "in"


def test_a_folder_gives_its_volume_as_nifti_and_as_json(folder: Path, tmp_path: Path) -> None:
    report = report_of(folder, tmp_path / "out.nii.gz")

    assert [Path(volume["file"]).name for volume in report["volumes"]] == ["out.nii.gz"]
    assert report["volumes"][0]["shape"] == [14, 16, 20]
    assert report["volumes"][0]["repairs"] == []
    assert report["series"][0]["cause"] == "chosen"
    assert report["refusals"] == []
    assert report["unreadable"][0]["file"] == "readme.txt"
    image = nibabel.load(tmp_path / "out.nii.gz")
    np.testing.assert_allclose(image.affine[:3, [2, 1, 0]], np.array(report["volumes"][0]["affine"])[:3, :3], atol=1e-4)


def test_several_volumes_get_a_number_each_the_main_one_first(folder: Path, tmp_path: Path) -> None:
    uids = {"study": "1.2.3", "series": "1.2.3.1", "frame": "1.2.3.9"}
    synthetic.write(Scan(), folder / "upper", uids)
    synthetic.write(LOWER, folder / "lower", {**uids, "series": "1.2.3.2"})
    for path in (folder / "deep" / "er").iterdir():
        path.unlink()
    report = report_of(folder, tmp_path / "out.nii")

    assert [(Path(volume["file"]).name, volume["regions"]) for volume in report["volumes"]] == [
        ("out_1.nii", ["abdomen", "pelvis"]),
        ("out_2.nii", ["chest"]),
    ]
    assert sorted(path.name for path in tmp_path.glob("*.nii")) == ["out_1.nii", "out_2.nii"]


def test_writing_one_volume_touches_no_other_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out_1.nii").write_text("of an earlier run")
    report_of(folder, tmp_path / "out.nii")

    assert (tmp_path / "out_1.nii").read_text() == "of an earlier run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.nii", "out_1.nii"]


def test_names_of_any_bytes_are_told_and_control_no_terminal(folder: Path) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\x1b[31m.dcm")).write_text("no image")
    result = CliRunner(charset="utf-8").invoke(app, ["volume", str(folder), "--json"])

    assert result.exit_code == 0
    assert json.loads(result.stdout)["unreadable"][1]["file"] == "\\udcff\x1b[31m.dcm"
    assert "\x1b" not in mu2_volume(folder).stderr


def test_without_json_the_choice_is_a_table_and_notes_go_to_stderr(folder: Path) -> None:
    result = mu2_volume(folder)

    assert result.exit_code == 0
    assert "axial, soft-tissue kernel, 2.5 mm thick every 2.50 mm, shows chest." in result.stdout
    assert "readme.txt: The file is not DICOM" in result.stderr
    assert "readme.txt" not in result.stdout


def test_a_folder_without_a_volume_ends_with_its_reason_and_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("nothing here")
    result = mu2_volume(tmp_path)

    assert result.exit_code == 1
    assert "No volume (NothingToReportError): The study holds no readable DICOM object." in result.stderr


def test_the_dicomdir_of_a_disc_is_noted_and_is_no_failure(folder: Path) -> None:
    (folder / "DICOMDIR").write_bytes(Path(get_testdata_file("DICOMDIR", download=False)).read_bytes())
    report = report_of(folder)

    assert len(report["volumes"]) == 1
    assert [bad["file"] for bad in report["unreadable"]] == ["DICOMDIR", "readme.txt"]


def test_a_folder_full_of_other_files_names_twenty_of_them_and_the_rest_as_json(folder: Path) -> None:
    for number in range(50):
        (folder / f"{number}.txt").write_text("not an image")
    notes = mu2_volume(folder).stderr.splitlines()

    assert len([line for line in notes if "is not DICOM" in line]) == 20
    assert notes[-1].endswith("and 31 more files that are no objects of a study; --json names them")
    assert len(report_of(folder)["unreadable"]) == 51


def test_one_refused_study_does_not_hide_another(folder: Path) -> None:
    for number, patient in enumerate("AB"):
        synthetic.write(
            Scan(attributes={"PatientID": patient}),
            folder / f"mixed{number}",
            {"study": "1.2", "series": "1.2.1", "frame": "1"},
        )
    result = mu2_volume(folder, "--json")
    report = json.loads(result.stdout)

    assert result.exit_code == 1
    assert [refusal["error"] for refusal in report["refusals"]] == ["PatientMismatchError"]
    assert len(report["volumes"]) == 1


def test_nothing_a_sender_wrote_in_words_shows(folder: Path) -> None:
    synthetic.write(Scan(attributes={"SeriesDescription": "CANARY", "StudyDescription": "CANARY"}), folder / "more")

    for result in (mu2_volume(folder, "--json"), mu2_volume(folder)):
        assert result.exit_code == 0 and result.output
        assert "CANARY" not in result.output


@pytest.mark.parametrize("arguments", [("gone",), (".", "out.mha"), (".", "gone/out.nii"), (".", "folder.nii")])
def test_wrong_usage_ends_with_exit_code_2(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.nii").mkdir()
    assert mu2_volume(*arguments).exit_code == 2
