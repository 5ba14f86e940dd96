import json
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.filewriter import dcmwrite

from training.phantoms import demo, dicom, report
from training.phantoms.phantom import render

STUDY = Path(__file__).parents[3] / "worker" / "demo" / "study"
REMADE = range(46, 49)
"""Slices that are painted again: they cross the nodule and the effusion."""


@pytest.fixture(scope="module")
def objects() -> list[pydicom.Dataset]:
    return [pydicom.dcmread(path) for path in sorted(STUDY.glob("*.dcm"))]


def test_demo_study_is_remade_byte_for_byte(tmp_path: Path) -> None:
    case = demo.demo_case()
    phantom = render(case, REMADE)
    for offset, number in enumerate(REMADE):
        ds = dicom.dataset(case, number, phantom.hu[offset], compress=True)
        remade = tmp_path / "slice.dcm"
        dcmwrite(remade, ds, enforce_file_format=True)
        assert remade.read_bytes() == (STUDY / f"IM{int(ds.InstanceNumber):04d}.dcm").read_bytes()


def test_demo_truth_is_what_the_case_holds() -> None:
    assert json.loads((STUDY / "truth.json").read_text(encoding="utf-8")) == demo.truth(demo.demo_case())


def test_demo_study_is_small_enough_for_the_repository() -> None:
    assert sum(path.stat().st_size for path in STUDY.iterdir()) <= 4_000_000


def test_demo_series_is_complete_and_evenly_spaced(objects: list[pydicom.Dataset]) -> None:
    heights = sorted(float(ds.ImagePositionPatient[2]) for ds in objects)
    assert len(objects) == demo.demo_case().scan.grid.slices
    assert np.allclose(np.diff(heights), 5.0, atol=1e-6)


def test_demo_objects_share_one_study_and_have_their_own_instance_uid(objects: list[pydicom.Dataset]) -> None:
    assert len({ds.StudyInstanceUID for ds in objects}) == len({ds.SeriesInstanceUID for ds in objects}) == 1
    assert len({ds.SOPInstanceUID for ds in objects}) == len(objects)
    assert all(ds.SOPInstanceUID.startswith("2.25.") for ds in objects)


def test_demo_pixels_decode_to_hounsfield_units_of_body_and_air(objects: list[pydicom.Dataset]) -> None:
    middle = objects[len(objects) // 2]
    hu = middle.pixel_array.astype(float) * middle.RescaleSlope + middle.RescaleIntercept
    assert abs(np.median(hu[:20]) + 1000) < 10
    assert ((hu > 20) & (hu < 90)).mean() > 0.05


def test_demo_identifiers_are_obviously_artificial(objects: list[pydicom.Dataset]) -> None:
    assert {(str(ds.PatientName), ds.PatientID) for ds in objects} == {("PHANTOM^CT", "PHANTOM-0001")}


def test_demo_report_names_every_finding_it_has() -> None:
    text = report.write(demo.demo_case())
    assert all(word in text.lower() for word in ("nodule", "effusion", "cyst"))
