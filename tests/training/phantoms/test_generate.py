"""Files: DICOM, NIfTI and manifest, remade to the byte and resumed after a stop."""

import json
import shutil
import subprocess
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from typer.testing import CliRunner

from training.__main__ import app
from training.phantoms import dicom, labeler
from training.phantoms.contact_sheet import write_sheet
from training.phantoms.disease import draw_case
from training.phantoms.generate import SERVED_PROMPT, ImageFormat, Order, Split, generate, make_one, manifest_row
from training.phantoms.nifti import write_nifti
from training.phantoms.phantom import Phantom, render
from worker.core.settings import Settings


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return render(next(case for case in map(draw_case, range(60)) if case.scan.crop == "abdomen"))


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


def test_dicom_gives_back_the_very_hounsfield_units_and_geometry(phantom: Phantom, tmp_path: Path) -> None:
    files = dicom.write_series(phantom, tmp_path / "series")
    lowest = pydicom.dcmread(files[-1])
    hu = lowest.pixel_array.astype(int) * int(lowest.RescaleSlope) + int(lowest.RescaleIntercept)
    assert np.array_equal(hu, phantom.hu[0])
    assert list(lowest.ImagePositionPatient) == pytest.approx(phantom.case.scan.grid.origin, abs=1e-6)
    assert len(files) == phantom.case.scan.grid.slices


@pytest.mark.skipif(shutil.which("dcm2niix") is None, reason="dcm2niix is not installed")
def test_nifti_is_what_dcm2niix_makes_of_the_dicom_series(phantom: Phantom, tmp_path: Path) -> None:
    dicom.write_series(phantom, tmp_path / "series", compress=False)  # Debian's dcm2niix reads no JPEG-LS
    command = ["dcm2niix", "-z", "y", "-f", "theirs", "-o", str(tmp_path), str(tmp_path / "series")]
    subprocess.run(command, check=True, capture_output=True)
    write_nifti(phantom.hu, phantom.case.scan.grid, tmp_path / "ours.nii.gz")
    ours, theirs = nibabel.load(tmp_path / "ours.nii.gz"), nibabel.load(tmp_path / "theirs.nii.gz")
    assert np.allclose(ours.affine, theirs.affine, atol=1e-4)
    assert np.array_equal(np.asanyarray(ours.dataobj), np.asanyarray(theirs.dataobj))


@pytest.mark.skipif(shutil.which("dcmftest") is None, reason="dcmtk is not installed")
def test_every_object_is_a_dicom_file_to_dcmtk(phantom: Phantom, tmp_path: Path) -> None:
    files = dicom.write_series(phantom, tmp_path)
    done = subprocess.run(["dcmftest", *map(str, files)], check=False, capture_output=True, text=True)
    assert done.stdout.count("yes:") == len(files)


def test_the_same_order_gives_the_same_bytes_with_one_process_or_two(tmp_path: Path) -> None:
    for processes in (1, 2):
        list(generate(Order(tmp_path / str(processes), 2, 7, labels=True), processes))
    one = {p.relative_to(tmp_path / "1"): p.read_bytes() for p in (tmp_path / "1").rglob("*") if p.is_file()}
    two = {p.relative_to(tmp_path / "2"): p.read_bytes() for p in (tmp_path / "2").rglob("*") if p.is_file()}
    assert one == two
    assert len(list((tmp_path / "1" / "labels").iterdir())) == 4


def test_a_stopped_run_goes_on_without_making_a_phantom_twice(tmp_path: Path) -> None:
    order = Order(tmp_path, 3, 1, image_format=ImageFormat.NONE)
    list(generate(Order(tmp_path, 1, 1, image_format=ImageFormat.NONE), 1))
    kept = tmp_path / "rows" / f"{order.name(0)}.json"
    stamp = kept.stat().st_mtime_ns
    assert list(generate(order, 1)) == [1, 2, 3]
    assert kept.stat().st_mtime_ns == stamp
    assert [row["id"] for row in rows(tmp_path)] == [order.name(number) for number in range(3)]


def test_a_folder_of_another_order_is_refused(tmp_path: Path) -> None:
    list(generate(Order(tmp_path, 1, 1, image_format=ImageFormat.NONE), 1))
    with pytest.raises(FileExistsError, match="choose another folder"):
        list(generate(Order(tmp_path, 1, 2, image_format=ImageFormat.NONE), 1))


def test_sets_of_two_seeds_share_no_patient_and_no_study(tmp_path: Path) -> None:
    for seed in (1, 2):
        list(generate(Order(tmp_path / str(seed), 4, seed, image_format=ImageFormat.NONE), 1))
    first, second = rows(tmp_path / "1"), rows(tmp_path / "2")
    for key in ("id", "patient", "study", "seed"):
        assert not {row[key] for row in first} & {row[key] for row in second}


def test_numpy_holds_volume_affine_and_both_label_maps(tmp_path: Path) -> None:
    make_one(Order(tmp_path, 1, 3, image_format=ImageFormat.NUMPY), 0)
    with np.load(tmp_path / "images" / "phantom_003000000.npz") as stored:
        assert set(stored) == {"hu", "affine", "organs", "findings"}
        assert stored["hu"].shape == stored["organs"].shape == stored["findings"].shape


def test_the_manifest_names_image_prompt_answer_and_labels(tmp_path: Path) -> None:
    list(generate(Order(tmp_path, 1, 5, split=Split.TEST), 1))
    (row,) = rows(tmp_path)
    assert (tmp_path / str(row["image"])).is_file()
    assert str(row["answer"]).startswith("FINDINGS:")
    assert row["split"] == "test"
    assert {"prompt", "labels", "patient", "study", "regions"} <= set(row)


def test_wordings_are_rows_that_share_an_image(tmp_path: Path) -> None:
    order = Order(tmp_path, 2, 5, image_format=ImageFormat.NONE, wordings=2)
    list(generate(order, processes=1))
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    names = ["phantom_005000000", "phantom_005000001"]
    assert [row["id"] for row in rows] == [names[0], f"{names[0]}_1", names[1], f"{names[1]}_1"]
    assert rows[0]["answer"] != rows[1]["answer"]
    assert rows[0]["labels"] == rows[1]["labels"]


def test_a_wording_about_one_region_tells_its_findings_and_no_others() -> None:
    seen = 0
    for case in map(draw_case, range(60)):
        rows = [manifest_row(case, "p", None, "train", wording) for wording in range(8)]
        partial = [row for row in rows if len(row["regions"]) < len(case.scan.regions)]
        seen += len(partial)
        for row in partial:
            assert row["prompt"].endswith(f"Report on the {row['regions'][0]} only.")
        for row in rows:
            read = labeler.read(row["answer"]).findings
            assert sorted((f.kind.value, f.side.value) for f in read) == sorted(
                (f["type"], f["side"]) for f in row["labels"]
            )
    assert seen > 60


def test_the_phantoms_are_asked_what_a_worker_asks() -> None:
    assert Settings().model.question == SERVED_PROMPT


def test_the_command_makes_phantoms_and_says_where(tmp_path: Path) -> None:
    arguments = [
        "phantoms",
        "--count",
        "2",
        "--seed",
        "9",
        "--format",
        "none",
        "--out",
        str(tmp_path),
        "--processes",
        "1",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert len(rows(tmp_path)) == 2


def test_crowded_phantoms_are_refused_as_a_set_to_score(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["phantoms", "--crowded", "--split", "test", "--out", str(tmp_path)])
    assert result.exit_code != 0
    assert "no part of the benchmark" in " ".join(result.output.replace("│", " ").split())


def test_a_manifest_says_that_its_phantoms_are_crowded(tmp_path: Path) -> None:
    list(generate(Order(tmp_path, 1, 4, image_format=ImageFormat.NONE, crowded=True), 1))
    assert [row["set"] for row in rows(tmp_path)] == ["phantomct-core-crowded"]


def test_the_command_without_a_folder_says_what_to_do() -> None:
    result = CliRunner().invoke(app, ["phantoms"])
    assert result.exit_code == 2
    assert "--out" in result.output


def test_a_contact_sheet_shows_each_finding_in_a_row(phantom: Phantom, tmp_path: Path) -> None:
    write_sheet([phantom], tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.height == 232 * max(1, min(3, len(phantom.findings)))
        assert np.asarray(picture).std() > 20
