"""From Hounsfield arrays to model input: orientation, spacing, windows, coordinates, and input that cannot be used."""

import gzip
import shutil
import subprocess
import tarfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mu2_model.errors import VolumeError
from mu2_model.image_processing_mu2 import Mu2ImageProcessor, PreparedVolume
from mu2_model.nifti import load_nifti, save_nifti
from mu2_model.volume_grid import apply_affine
from tests.mu2_model.small_volumes import affine, body

SERIES = Path(__file__).parents[3] / "shared" / "data" / "ct" / "series"
NIFTI = Path(__file__).parents[3] / "shared" / "data" / "ct" / "nifti" / "totalseg_ct_3mm_ras.nii.gz"


def processor(**changed: object) -> Mu2ImageProcessor:
    return Mu2ImageProcessor(**{"size": 64, "chunk_slices": 8, "max_slices": 64, "slice_mm": 3.0, **changed})  # type: ignore[arg-type]


def brightest_mm(prepared: PreparedVolume) -> NDArray[np.float64]:
    """Centre of the dense spot in RAS millimetres, found in the model input."""
    assert prepared.grid.to_ras is not None
    bone = prepared.pixel_values[:, 2].flatten(0, 1)
    weight = torch.where(bone > 0.6, bone, 0).numpy().astype(np.float64)
    index = np.stack(np.indices(weight.shape), axis=-1).reshape(-1, 3)
    return apply_affine(prepared.grid.to_ras, np.average(index, axis=0, weights=weight.ravel())[None])[0]


def test_the_input_is_chunks_of_windows_between_zero_and_one() -> None:
    prepared = processor().prepare(body(), affine())
    assert prepared.pixel_values.shape == (3, 3, 8, 64, 64)
    assert prepared.chunk_mask.tolist() == [True, True, True]
    assert float(prepared.pixel_values.min()) == 0 and float(prepared.pixel_values.max()) == 1
    assert prepared.grid.shape[0] == 20 and prepared.repairs == ()


def test_a_known_value_lands_in_each_window_by_its_level_and_width() -> None:
    hu = body()
    hu[:] = -1000
    hu[:, 8:-8, 8:-8] = 40
    pixels = processor().prepare(hu, affine()).pixel_values
    middle = pixels[1, :, 4, 32, 32]
    assert torch.allclose(middle, torch.tensor([(40 + 1350) / 1500, 0.5, (40 + 500) / 1800]), atol=1e-5)


@pytest.mark.parametrize("slice_mm", [0.7, 2.0, 3.0, 6.5])
def test_resampling_in_any_order_of_axes_is_one_trilinear_map(slice_mm: float) -> None:
    hu = np.random.default_rng(0).normal(-300, 300, (70, 40, 44)).astype(np.float32)
    image = processor(windows=[(0.0, 8000.0)])
    prepared = image.prepare(hu, affine(slice_mm))
    grid = prepared.grid
    clipped = np.clip(hu[:, ::-1, ::-1], -1024, 3071).astype(np.float64)
    steps = np.abs(np.diag(grid.to_source)[:3])
    spacing = np.array([slice_mm, 1.5, 1.5])
    expected = clipped
    for axis in range(3):
        start = grid.to_source[axis, 3] if axis == 0 else hu.shape[axis] - 1 - grid.to_source[axis, 3]
        centre = np.clip(start + np.arange(grid.shape[axis]) * steps[axis], 0, hu.shape[axis] - 1)
        distance = np.abs(np.arange(hu.shape[axis])[None] - centre[:, None])
        weight = np.clip(1 - distance / max(steps[axis], 1), 0, None)
        weight /= weight.sum(axis=1, keepdims=True)
        expected = np.moveaxis(np.tensordot(weight, expected, axes=(1, axis)), 0, axis)
    assert grid.spacing_mm == pytest.approx(tuple(steps * spacing))
    ours = prepared.pixel_values[:, 0].flatten(0, 1)[tuple(slice(0, n) for n in grid.shape)].numpy() * 8000 - 4000
    assert np.abs(ours - expected).max() < 0.02


def test_the_body_fills_the_plane_with_its_aspect_kept() -> None:
    prepared = processor().prepare(body(), affine())
    spacing = prepared.grid.spacing_mm
    assert spacing is not None
    assert spacing[0] == pytest.approx(3.0) and spacing[1] == pytest.approx(spacing[2])
    assert max(prepared.grid.shape[1:]) == 64
    assert spacing[2] < 96 * 1.5 / 64


@settings(max_examples=25, deadline=None)
@given(
    order=st.permutations([0, 1, 2]),
    flips=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_any_storage_order_of_one_volume_gives_the_same_input(order: list[int], flips: tuple[bool, ...]) -> None:
    hu, matrix = body(), affine()
    stored = hu.transpose(order)
    change = np.zeros((4, 4))
    change[3, 3] = 1
    for axis, source in enumerate(order):
        change[source, axis] = -1 if flips[axis] else 1
        change[source, 3] = hu.shape[source] - 1 if flips[axis] else 0
    stored = stored[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
    plain = processor().prepare(hu, matrix)
    turned = processor().prepare(stored, matrix @ change)
    assert torch.allclose(plain.pixel_values, turned.pixel_values, atol=1e-6)
    assert plain.grid.to_ras is not None and turned.grid.to_ras is not None
    assert np.allclose(plain.grid.to_ras, turned.grid.to_ras)


def test_left_stays_left() -> None:
    hu = np.full((20, 64, 64), -1000, np.int16)
    hu[:, 8:56, 8:56] = 40
    hu[:, 28:36, 40:48] = 900
    pixels = processor().prepare(hu, affine()).pixel_values
    columns = pixels[0, 2, 4].amax(dim=0)
    # Columns of the array run to the left, those of the input to the right.
    assert int(columns.argmax()) < 32


@settings(max_examples=20, deadline=None)
@given(slice_mm=st.floats(0.8, 5.0), pixel_mm=st.floats(0.5, 2.0))
def test_a_spot_is_mapped_back_to_where_it_is_in_the_patient(slice_mm: float, pixel_mm: float) -> None:
    matrix = affine(slice_mm, pixel_mm)
    prepared = processor(slice_mm=2.0, max_slices=96).prepare(body(), matrix)
    true = apply_affine(matrix, np.array([[21.5, 32.5, 62.5]]))[0]
    assert np.abs(brightest_mm(prepared) - true).max() < max(1.5, slice_mm / 2, pixel_mm)


def test_points_go_to_the_grid_and_back() -> None:
    grid = processor().prepare(body(), affine()).grid
    assert grid.to_ras is not None
    points = np.random.default_rng(0).uniform(-50, 50, (10, 3))
    assert np.allclose(apply_affine(grid.to_ras, grid.ras_to_index(points)), points)
    assert np.allclose(
        apply_affine(affine() @ grid.to_source, np.zeros((1, 3))), apply_affine(grid.to_ras, np.zeros((1, 3)))
    )


def test_every_patch_has_its_place_in_millimetres() -> None:
    grid = processor().prepare(body(), affine()).grid
    centres = grid.patch_centres_mm((2, 16, 16))
    assert centres.shape == (3, 4 * 4 * 4, 3) and grid.spacing_mm is not None
    assert np.allclose(centres[0, 1] - centres[0, 0], [16 * grid.spacing_mm[2], 0, 0])
    assert np.allclose(centres[1, 0] - centres[0, 0], [0, 0, 24.0])


def test_a_batch_pads_short_volumes_with_masked_chunks() -> None:
    batch = processor()([(body(), affine()), (body((12, 80, 96)), affine())])
    assert batch["pixel_values"].shape == (2, 3, 3, 8, 64, 64)
    assert batch["chunk_mask"].tolist() == [[True, True, True], [True, False, False]]


def test_nan_padding_and_metal_are_repaired_and_said() -> None:
    hu = body().astype(np.float32)
    hu[0, 9, 9], hu[0, 9, 10] = np.nan, np.inf
    hu[:, :2] = -2048
    hu[5, 40, 40] = 20000
    prepared = processor().prepare(hu, affine())
    assert [repair.split("were ")[1] for repair in prepared.repairs] == [
        "not finite, set to -1024 HU",
        "below -1024 HU (padding), set to -1024 HU",
        "above 3071 HU (metal), set to 3071 HU",
    ]
    assert torch.isfinite(prepared.pixel_values).all()


def test_padding_does_not_leak_into_its_neighbours() -> None:
    hu = body()
    clean = processor().prepare(np.maximum(hu, -1024), affine())
    hu[:, :6] = -3000
    assert torch.allclose(clean.pixel_values[:, 1], processor().prepare(hu, affine()).pixel_values[:, 1], atol=0.02)


def test_a_volume_longer_than_the_model_is_sampled_and_said() -> None:
    prepared = processor().prepare(body((300, 80, 96)), affine())
    assert prepared.grid.shape[0] == 64 and prepared.repairs == (
        "the volume is longer than 64 slices of 3 mm; sampled every 9.4 mm",
    )


def test_two_thousand_slices_are_prepared() -> None:
    prepared = processor().prepare(np.repeat(body((200, 32, 32)), 10, axis=0), affine(0.5))
    assert prepared.grid.shape[0] == 64


def test_a_tilted_volume_is_prepared_and_said() -> None:
    angle = np.deg2rad(12)
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    prepared = processor().prepare(body(), turn @ affine())
    assert prepared.repairs == ("the volume is tilted by 12 degrees against the patient axes",)


@pytest.mark.parametrize(
    ("hu", "matrix", "message"),
    [
        (np.zeros((64, 64)), affine(), "is not a volume"),
        (body((1, 64, 64)), affine(), "at least 4 voxels"),
        (body().astype(complex), affine(), "does not hold Hounsfield units"),
        (np.full((20, 64, 64), 100.0), affine(), "this is not a CT"),
        (np.full((20, 64, 64), -1000.0), affine(), "air and no body"),
        (np.full((20, 64, 64), np.nan), affine(), "air and no body"),
        (body(), None, "no affine"),
        (body(), "RAS", "4x4 matrix of numbers, not str"),
        (body(), np.eye(3), r"shape \(3, 3\)"),
        (body(), np.diag([1.0, 1.0, 0.0, 1.0]), "singular"),
        (body(), np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "singular"),
        (body(), np.full((4, 4), np.nan), "not finite"),
        (body(), affine().T, "is it transposed"),
        (body(), affine(slice_mm=40.0), "cannot be known above 15 mm"),
        (body(), affine(pixel_mm=25.0), "pixels of 25.0 mm"),
        (body(), affine(pixel_mm=0.001), "below 0.05 mm"),
    ],
)
def test_what_cannot_be_drafted_from_is_refused(hu: NDArray, matrix: NDArray | None, message: str) -> None:
    with pytest.raises(VolumeError, match=message):
        processor().prepare(hu, matrix)


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<u2", "<i4", "<f4", ">f8", "<f2"])
def test_every_number_type_gives_the_same_input(dtype: str) -> None:
    hu = body()
    plain = processor().prepare(hu, affine()).pixel_values
    hu = np.where(hu == -1000, 0, hu) - 0 if dtype == "<u2" else hu
    if dtype == "<u2":
        with pytest.raises(VolumeError, match="not a CT"):
            processor().prepare(hu.astype(dtype), affine())
        return
    assert torch.allclose(processor().prepare(hu.astype(dtype), affine()).pixel_values, plain, atol=2e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", ["hounsfield", "published"])
def test_cpu_and_gpu_agree(form: str) -> None:
    made = [
        processor(form=form).prepare(body(), affine(), device=device).pixel_values.cpu() for device in ("cpu", "cuda")
    ]
    assert torch.allclose(*made, atol=1e-4)


def test_a_nifti_file_gives_what_its_array_gives(tmp_path: Path) -> None:
    save_nifti(tmp_path / "ct.nii.gz", body(), affine())
    array, matrix = load_nifti(tmp_path / "ct.nii.gz")
    assert array.dtype == np.int16 and np.array_equal(array, body()) and np.allclose(matrix, affine())


def test_a_scaled_nifti_file_is_read_in_hounsfield_units(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image((body().T + 1024).astype(np.int16), np.eye(4))
    image.header.set_slope_inter(1, -1024)
    nibabel.save(image, tmp_path / "ct.nii")
    array, _ = load_nifti(tmp_path / "ct.nii")
    assert float(array.min()) < 0


@pytest.mark.parametrize("content", [b"", b"not a NIfTI file at all", b"\x1f\x8b\x08\x00cut"])
def test_a_broken_nifti_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "ct.nii.gz").write_bytes(content)
    with pytest.raises(VolumeError, match="not a readable NIfTI file"):
        load_nifti(tmp_path / "ct.nii.gz")


def test_a_nifti_file_whose_compression_breaks_midway_is_refused(tmp_path: Path) -> None:
    save_nifti(tmp_path / "ct.nii.gz", np.random.default_rng(0).integers(-1000, 1000, (8, 64, 64), np.int16), affine())
    whole = bytearray((tmp_path / "ct.nii.gz").read_bytes())
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    whole[len(whole) // 2 : len(whole) // 2 + 64] = bytes(64)
    (tmp_path / "turned.nii.gz").write_bytes(whole)
    for name in ("cut.nii.gz", "turned.nii.gz"):
        with pytest.raises(VolumeError, match="not a readable NIfTI file"):
            load_nifti(tmp_path / name)


@pytest.mark.parametrize("sides", [(96, 80, 31), (32767, 32767, 32767)])
def test_a_nifti_file_with_fewer_voxels_than_its_header_says_is_refused(
    sides: tuple[int, int, int], tmp_path: Path
) -> None:
    save_nifti(tmp_path / "ct.nii", body((30, 80, 96)), affine())
    content = bytearray((tmp_path / "ct.nii").read_bytes())
    content[42:48] = np.array(sides, "<i2").tobytes()
    (tmp_path / "ct.nii.gz").write_bytes(gzip.compress(bytes(content), compresslevel=1))
    with pytest.raises(VolumeError, match="not a readable NIfTI file"):
        load_nifti(tmp_path / "ct.nii.gz")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((70, np.array(code, "<i2")) for code in (999, 0, 1, 1536, 2048, -4)),  # datatype
        *((108, np.array(offset, "<f4")) for offset in (np.inf, np.nan, -500, 1e30)),  # vox_offset
        *((112, np.array((2, inter), "<f4")) for inter in (np.nan, np.inf)),  # scl_slope, scl_inter
        *((40, np.array(axes, "<i2")) for axes in (-3, 0, 8)),  # dim[0]
        *((42, np.array(sides, "<i2")) for sides in ((-5,), (-96, -80))),  # dim[1], dim[2]
    ],
)
def test_a_nifti_file_with_a_damaged_header_is_refused(place: int, value: NDArray, suffix: str, tmp_path: Path) -> None:
    save_nifti(tmp_path / "whole.nii", body(), affine())
    content = bytearray((tmp_path / "whole.nii").read_bytes())
    content[place : place + value.nbytes] = value.tobytes()
    pack = gzip.compress if suffix.endswith(".gz") else bytes
    (tmp_path / f"ct{suffix}").write_bytes(pack(bytes(content)))
    with pytest.raises(VolumeError, match=r"not a readable NIfTI file|not one volume"):
        load_nifti(tmp_path / f"ct{suffix}")


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<f4", "<u1"])
def test_a_compressed_nifti_file_gives_what_the_plain_one_gives(dtype: str, tmp_path: Path) -> None:
    array = (body() / 8).astype(dtype)
    for name in ("ct.nii", "ct.nii.gz"):
        save_nifti(tmp_path / name, array, affine())
    plain, packed = load_nifti(tmp_path / "ct.nii")[0], load_nifti(tmp_path / "ct.nii.gz")[0]
    assert packed.dtype == plain.dtype and np.array_equal(packed, plain)


def test_another_image_format_is_refused_by_name(tmp_path: Path) -> None:
    nibabel.save(nibabel.MGHImage(np.zeros((8, 8, 8), np.float32), np.eye(4)), tmp_path / "ct.mgz")
    with pytest.raises(VolumeError, match="MGHImage, not a NIfTI file"):
        load_nifti(tmp_path / "ct.mgz")


def test_an_array_that_may_not_be_written_to_is_prepared_and_left_alone() -> None:
    hu = body()
    hu[:, :2] = -2048
    kept = hu.copy()
    hu.flags.writeable = False
    processor().prepare(hu, affine())
    assert np.array_equal(hu, kept)


@pytest.mark.parametrize("form", ["hounsfield", "published"])
def test_preparing_leaves_the_array_as_it_was(form: str) -> None:
    hu = body().astype(np.float32)
    hu[:, :2] = -2048
    kept = hu.copy()
    processor(form=form).prepare(hu, affine())
    assert np.array_equal(hu, kept)


def test_a_nifti_file_of_two_volumes_is_refused(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8, 8, 2), np.int16), np.eye(4)), tmp_path / "ct.nii")
    with pytest.raises(VolumeError, match="not one volume"):
        load_nifti(tmp_path / "ct.nii")


@pytest.mark.skipif(not NIFTI.is_file(), reason=f"needs the real CT {NIFTI.name} of the shared data")
def test_a_real_ct_is_prepared_from_its_nifti_file() -> None:
    array, matrix = load_nifti(NIFTI)
    prepared = processor(max_slices=128).prepare(array, matrix)
    assert prepared.grid.spacing_mm is not None and prepared.grid.spacing_mm[0] == pytest.approx(3.0)
    assert 0.05 < float(prepared.pixel_values[:, 1].mean()) < 0.9


@pytest.mark.skipif(shutil.which("dcm2niix") is None, reason="needs dcm2niix (Debian package dcm2niix)")
@pytest.mark.skipif(not SERIES.is_dir(), reason="needs the real CT series of the shared data")
def test_a_dicom_folder_and_its_nifti_give_the_same_input(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    with tarfile.open(SERIES / "acrin_flt_thorax_49.tar.xz", "r:*") as archive:
        archive.extractall(tmp_path / "dicom", filter="data")
    command = ["dcm2niix", "-z", "n", "-o", str(tmp_path), "-f", "ct", str(tmp_path / "dicom")]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    slices = [pydicom.dcmread(path) for path in (tmp_path / "dicom").rglob("*") if path.is_file()]
    slices.sort(key=lambda ds: float(ds.ImagePositionPatient[2]))
    hu = np.stack([ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in slices]).astype(
        np.float32
    )
    first, second = slices[0], slices[1]
    across, down = np.array(first.ImageOrientationPatient, float).reshape(2, 3)
    to_lps = np.eye(4)
    to_lps[:3, 0] = np.array(second.ImagePositionPatient, float) - np.array(first.ImagePositionPatient, float)
    to_lps[:3, 1], to_lps[:3, 2] = down * float(first.PixelSpacing[0]), across * float(first.PixelSpacing[1])
    to_lps[:3, 3] = np.array(first.ImagePositionPatient, float)
    from_dicom = processor().prepare(hu, np.diag([-1, -1, 1, 1]) @ to_lps)
    from_nifti = processor().prepare(*load_nifti(tmp_path / "ct.nii"))
    assert torch.allclose(from_dicom.pixel_values, from_nifti.pixel_values, atol=1e-3)
    assert from_dicom.grid.to_ras is not None and from_nifti.grid.to_ras is not None
    assert np.allclose(from_dicom.grid.to_ras, from_nifti.grid.to_ras, atol=0.1)
