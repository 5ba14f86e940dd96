"""Real series against the reference values given with them and against independent readers."""

import json
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

from tests.imaging.conftest import files_of
from worker.imaging import study
from worker.imaging.rules import ImagingRules
from worker.imaging.volume import Volume

STRAIGHT = {
    "acrin_flt_thorax_49": "2_PET-CT_SERIES.nii",
    "nlst_chest_143_jpegls": "3_0,OPA,TO,AQUL4,FC51,276.6,2,120,40,na,na.nii",
    "philips_phantom_study_35": "201_STD_BRAIN_5MM.nii",
}
"""Series that need no resampling, and dcm2niix's name for their volume."""
TILTED = "ge_head_tilt_gap_28"


@pytest.fixture(scope="session")
def built(real_series: Path) -> Callable[[str], Volume]:
    """The main volume of a real study, built once a session."""
    rules = ImagingRules(decode_threads=2)
    return cache(lambda name: study.build_study(files_of(real_series / name), rules).volumes[0])


def corners(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """RAS positions of the eight corner voxels, in an order that does not depend on the axes' directions."""
    index = np.array([[i, j, k, 1] for i in (0, shape[0] - 1) for j in (0, shape[1] - 1) for k in (0, shape[2] - 1)])
    places = index @ affine[:3].T
    return places[np.lexsort(np.round(places, 0).T)]


def at(array: np.ndarray, affine: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Values at voxel centres given by RAS positions; fails when a position is no voxel centre."""
    index = (places - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    assert np.abs(index - np.rint(index)).max() < 0.1
    return array[tuple(np.rint(index).astype(int).T)]


def random_places(volume: Volume, count: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """RAS positions and HU of random voxels."""
    index = np.stack([np.random.default_rng(7).integers(0, size, count) for size in volume.hu.shape], axis=1)
    return index @ volume.affine[:3, :3].T + volume.affine[:3, 3], volume.hu[tuple(index.T)]


@pytest.mark.parametrize("name", sorted(STRAIGHT))
def test_corners_and_values_equal_the_reference_given_with_the_data(
    name: str, built: Callable[[str], Volume], ct_data: Path
) -> None:
    reference = json.loads((ct_data / "dcm2niix_reference.json").read_text())["volumes"][name][STRAIGHT[name]]
    volume = built(name)

    theirs = corners(np.array(reference["affine_RAS"]), tuple(reference["shape"]))
    np.testing.assert_allclose(corners(volume.affine, volume.hu.shape), theirs, atol=0.1)
    assert volume.hu.min() == reference["min"]
    assert volume.hu.max() == reference["max"]
    assert volume.hu.mean(dtype=np.float64) == pytest.approx(reference["mean"], abs=1e-3)


@pytest.mark.parametrize("name", sorted(STRAIGHT))
def test_positions_and_every_value_equal_simpleitks(
    name: str, built: Callable[[str], Volume], real_series: Path
) -> None:
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")
    volume = built(name)
    folder = real_series / name / ("axial_5mm" if name.startswith("philips") else "")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()

    place = np.array(image.TransformIndexToPhysicalPoint((0, 0, 0))) * [-1, -1, 1]
    far = np.array(image.TransformIndexToPhysicalPoint([size - 1 for size in image.GetSize()])) * [-1, -1, 1]
    last = np.array([size - 1 for size in volume.hu.shape])
    np.testing.assert_allclose(volume.affine[:3, 3], place, atol=0.1)
    np.testing.assert_allclose(volume.affine[:3, :3] @ last + volume.affine[:3, 3], far, atol=0.1)
    assert np.array_equal(volume.hu, sitk.GetArrayViewFromImage(image))


@pytest.mark.parametrize(("name", "folder"), [("philips_phantom_study_35", "axial_5mm"), ("acrin_flt_thorax_49", "")])
def test_a_thousand_voxels_equal_dicom2niftis(
    name: str, folder: str, built: Callable[[str], Volume], real_series: Path, tmp_path: Path
) -> None:
    convert = pytest.importorskip("dicom2nifti.convert_dicom", reason="dicom2nifti is not installed")
    target = tmp_path / "out.nii.gz"
    convert.dicom_series_to_nifti(str(real_series / name / folder), str(target), reorient_nifti=False)
    image = nibabel.load(target)

    places, values = random_places(built(name))
    np.testing.assert_allclose(
        corners(built(name).affine, built(name).hu.shape), corners(image.affine, image.shape), atol=0.1
    )
    assert np.array_equal(at(np.asarray(image.dataobj), image.affine, places), values)


def converted_by_dcm2niix(folder: Path, out: Path) -> dict[str, nibabel.Nifti1Image]:
    """dcm2niix's volumes of a folder by file name; skips the test where it is not installed."""
    program = shutil.which("dcm2niix")
    if program is None:
        pytest.skip("dcm2niix is not installed: apt install dcm2niix")
    subprocess.run([program, "-z", "n", "-f", "%s_%d", "-o", out, folder], check=True, capture_output=True, timeout=60)
    return {path.name: nibabel.load(path) for path in out.glob("*.nii")}


@pytest.fixture(scope="session")
def dcm2niix(
    real_series: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, nibabel.Nifti1Image]]:
    """dcm2niix's volumes of a real study by file name."""
    return cache(lambda name: converted_by_dcm2niix(real_series / name, tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize(
    "name", [name for name in sorted(STRAIGHT) if "jpegls" not in name]
)  # Debian's reads no JPEG-LS
def test_a_thousand_voxels_equal_dcm2niixs(name: str, built: Callable[[str], Volume], dcm2niix: Callable) -> None:
    image = dcm2niix(name)[STRAIGHT[name]]
    places, values = random_places(built(name))

    assert np.array_equal(at(np.asarray(image.dataobj), image.affine, places), values)


def test_the_tilted_series_is_sheared_and_spaced_evenly(built: Callable[[str], Volume]) -> None:
    volume = built(TILTED)

    assert volume.repairs == (
        "gantry tilt of 18.5 degrees was sheared straight",
        "slices 1.08 to 7.00 mm apart were resampled to 37 slices 4.00 mm apart",
    )
    axes = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-6)


def test_the_tilted_series_holds_each_stored_slice_where_its_position_says(
    built: Callable[[str], Volume], real_series: Path
) -> None:
    volume = built(TILTED)
    to_index = np.linalg.inv(volume.affine)
    checked = 0
    for path in files_of(real_series / TILTED):
        ds = pydicom.dcmread(path)
        column_axis, row_axis = np.split(np.array(ds.ImageOrientationPatient, float), 2)
        pixels = np.random.default_rng(3).integers(130, 380, (500, 2))
        lps = (
            np.array(ds.ImagePositionPatient, float)
            + pixels[:, :1] * ds.PixelSpacing[0] * row_axis
            + pixels[:, 1:] * ds.PixelSpacing[1] * column_axis
        )
        index = (lps * [-1, -1, 1]) @ to_index[:3, :3].T + to_index[:3, 3]
        depth = round(index[0, 0])
        if abs(index[0, 0] - depth) > 0.01 or not 0 <= depth < volume.hu.shape[0]:
            continue  # between two slices of the even grid: an interpolated value, compared with dcm2niix below
        row = np.floor(index[:, 1] + 1e-6).astype(int)
        part = index[:, 1] - row
        column = np.rint(index[:, 2]).astype(int)
        ours = volume.hu[depth, row, column] * (1 - part) + volume.hu[depth, row + 1, column] * part
        stored = ds.pixel_array[tuple(pixels.T)] * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        assert np.median(np.abs(ours - stored)) < 3.0
        checked += 1
    assert checked >= 2


def test_the_tilted_series_agrees_with_dcm2niixs_corrected_voxels(
    built: Callable[[str], Volume], dcm2niix: Callable
) -> None:
    volume, image = built(TILTED), dcm2niix(TILTED)["2__Tilt_Eq_1.nii"]
    theirs = np.asarray(image.dataobj).transpose(2, 1, 0)[:, ::-1]
    assert theirs.shape[1:] == volume.hu.shape[1:]
    for mine, other in ((0, 0), (-1, -1)):
        held = ~volume.padding[mine]
        assert np.abs(volume.hu[mine] - theirs[other])[held].mean() < 1.0


def test_dcm2niixs_corrected_affine_is_not_a_grid_of_this_scanner_so_ours_is_kept(dcm2niix: Callable) -> None:
    """Why voxels are compared with dcm2niix's tilt correction and positions are not.

    Its rows are 0.474 mm apart where the scanner says 0.488, its axes lean towards each other, and its two affines differ;
    at stored slices' own positions its values are off by hundreds of HU. See docs/decisions.
    """
    affine = dcm2niix(TILTED)["2__Tilt_Eq_1.nii"].affine
    row, step = affine[:3, 1], affine[:3, 2]

    assert np.linalg.norm(row) == pytest.approx(0.474, abs=1e-3)
    assert abs(row @ step) / np.linalg.norm(row) / np.linalg.norm(step) > 0.2


MISSING = (10, 30, 31)


def chest_with_gaps(real_series: Path, folder: Path, upwards: bool) -> Path:
    """A real chest without three of its 49 slices; instance numbers grow to the head or to the feet."""
    slices = [pydicom.dcmread(path) for path in files_of(real_series / "acrin_flt_thorax_49")]
    slices.sort(key=lambda ds: float(ds.ImagePositionPatient[2]))
    folder.mkdir()
    for index, ds in enumerate(slices):
        if index not in MISSING:
            ds.InstanceNumber = index + 1 if upwards else len(slices) - index
            ds.save_as(folder / f"{index:03d}")
    return folder


def gaps_filled_by_dcm2niix(folder: Path, out: Path) -> np.ndarray:
    """(slices, rows, columns) of its evenly spaced file."""
    out.mkdir()
    image = next(image for name, image in converted_by_dcm2niix(folder, out).items() if "_Eq" in name)
    return np.asarray(image.dataobj, dtype=float).transpose(2, 1, 0)[:, ::-1]


def test_missing_slices_are_filled_as_dcm2niix_fills_them(
    built: Callable[[str], Volume], real_series: Path, tmp_path: Path
) -> None:
    folder = chest_with_gaps(real_series, tmp_path / "in", upwards=True)
    volume = study.build_study(files_of(folder), ImagingRules(decode_threads=2)).volumes[0]
    theirs = gaps_filled_by_dcm2niix(folder, tmp_path / "out")

    assert volume.repairs[0] == "3 missing of 49 slices were interpolated, up to 2 in a row"
    assert np.abs(volume.hu[: len(theirs)] - theirs).max() <= 0.5  # it rounds
    whole = built("acrin_flt_thorax_49").hu
    kept = [index for index in range(49) if index not in MISSING]
    assert np.array_equal(volume.hu[kept], whole[kept])
    assert len(theirs) == 48  # it drops the last slice


def test_dcm2niix_fills_gaps_at_the_wrong_end_where_instance_numbers_grow_to_the_feet_so_ours_is_kept(
    real_series: Path, tmp_path: Path
) -> None:
    up, down = (chest_with_gaps(real_series, tmp_path / name, name == "up") for name in ("up", "down"))
    rules = ImagingRules(decode_threads=2)
    mine = [study.build_study(files_of(folder), rules).volumes[0].hu for folder in (up, down)]

    assert np.array_equal(mine[0], mine[1])
    assert np.abs(gaps_filled_by_dcm2niix(down, tmp_path / "out")[15] - mine[1][15]).max() > 500


def test_chest_series_say_what_they_show_and_mark_what_was_not_scanned(built: Callable[[str], Volume]) -> None:
    volume = built("nlst_chest_143_jpegls")

    assert volume.regions == ("chest",)
    assert volume.repairs == ()
    assert volume.padding is not None
    assert volume.padding.mean() == pytest.approx(0.214584, abs=1e-5)


def test_the_axial_series_is_chosen_out_of_the_phantom_study(real_series: Path) -> None:
    found = study.build_study(files_of(real_series / "philips_phantom_study_35"), ImagingRules())

    assert [(verdict.series_number, verdict.images, verdict.chosen) for verdict in found.verdicts] == [
        (100, 1, False),
        (201, 28, True),
        (401, 6, False),
    ]
    assert found.verdicts[0].reason == "image type LOCALIZER."
    assert found.verdicts[2].reason == "not a CT image but Secondary Capture Image Storage."
