"""What is kept of a volume: the model's input, NIfTI, the preview picture."""

import os
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from worker.core.errors import InvalidObjectError, StoreUnavailableError
from worker.imaging import nifti, preview, stored
from worker.imaging.volume import Volume

AFFINE = np.array([[0, 0, -1.5, 20], [0, -2.0, 0, 30], [2.5, 0, 0, -40], [0, 0, 0, 1.0]])


@pytest.fixture
def a_volume() -> Volume:
    hu = np.random.default_rng(5).integers(-1024, 2000, (6, 8, 10)).astype(np.float32)
    padding = hu < -900
    return Volume(hu, AFFINE, padding, ("one repair",), ("chest", "abdomen"), "1.2.3", 4, "part 1", ("1.2.3.1",))


def test_a_stored_volume_comes_back_equal(a_volume: Volume, tmp_path: Path) -> None:
    stored.save(a_volume, tmp_path / "volume.npz")
    again = stored.load(tmp_path / "volume.npz")

    assert again.hu.dtype == np.float32
    assert np.array_equal(again.hu, a_volume.hu)
    assert np.array_equal(again.padding, a_volume.padding)
    assert np.array_equal(again.affine, a_volume.affine)
    assert replace(again, hu=a_volume.hu, affine=AFFINE, padding=a_volume.padding).__dict__ == a_volume.__dict__


def test_whole_hounsfield_units_take_two_bytes_a_voxel(a_volume: Volume, tmp_path: Path) -> None:
    stored.save(replace(a_volume, padding=None), tmp_path / "volume.npz")
    with np.load(tmp_path / "volume.npz") as archive:
        assert archive["hu"].dtype == np.int16
    assert stored.load(tmp_path / "volume.npz").padding is None


@pytest.mark.parametrize("value", [0.5, 40000.0, -33000.0])
def test_values_that_int16_cannot_hold_are_kept_too(value: float, a_volume: Volume, tmp_path: Path) -> None:
    a_volume.hu[3, 2, 1] = value
    stored.save(a_volume, tmp_path / "volume.npz")

    assert stored.load(tmp_path / "volume.npz").hu[3, 2, 1] == value


def test_a_crash_while_writing_leaves_the_old_volume_whole(
    a_volume: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "volume.npz"
    stored.save(a_volume, path)
    before = path.read_bytes()

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(StoreUnavailableError, match="No space left on device"):
        stored.save(replace(a_volume, part="other"), path)

    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["volume.npz"]


@pytest.mark.parametrize("keep", [0, 100, 2000])
def test_a_damaged_volume_is_refused(keep: int, a_volume: Volume, tmp_path: Path) -> None:
    path = tmp_path / "volume.npz"
    stored.save(a_volume, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InvalidObjectError, match=r"damaged\. Requeue the study\."):
        stored.load(path)


def test_an_absent_volume_is_the_stores_trouble(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailableError, match="cannot be read"):
        stored.load(tmp_path / "gone.npz")


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_nifti_holds_each_voxel_at_its_place(ending: str, a_volume: Volume, tmp_path: Path) -> None:
    nifti.write(a_volume, tmp_path / f"out{ending}")
    image = nibabel.load(tmp_path / f"out{ending}")

    assert image.shape == (10, 8, 6)
    assert image.get_data_dtype() == np.int16
    index = np.array([3, 2, 5])
    place = AFFINE[:3, :3] @ index + AFFINE[:3, 3]
    np.testing.assert_allclose(image.affine[:3, :3] @ index[::-1] + image.affine[:3, 3], place, atol=1e-4)
    assert np.asarray(image.dataobj)[5, 2, 3] == a_volume.hu[3, 2, 5]
    np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)


def test_equal_volumes_are_equal_nifti_files(a_volume: Volume, tmp_path: Path) -> None:
    for name in ("one.nii.gz", "another.nii.gz"):
        nifti.write(a_volume, tmp_path / name)

    assert (tmp_path / "one.nii.gz").read_bytes() == (tmp_path / "another.nii.gz").read_bytes()


def test_other_readers_find_each_voxel_at_its_place_in_nifti(a_volume: Volume, tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")
    nifti.write(a_volume, tmp_path / "out.nii.gz")
    image = sitk.ReadImage(str(tmp_path / "out.nii.gz"))

    assert np.array_equal(sitk.GetArrayViewFromImage(image), a_volume.hu)
    place = np.array(image.TransformIndexToPhysicalPoint((5, 2, 3))) * [-1, -1, 1]
    np.testing.assert_allclose(place, AFFINE[:3] @ [3, 2, 5, 1], atol=1e-4)


def test_nifti_of_another_ending_is_a_wrong_name(a_volume: Volume, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.nii"):
        nifti.write(a_volume, tmp_path / "out.mha")


def test_nifti_into_a_folder_that_is_not_there_is_the_stores_trouble(a_volume: Volume, tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailableError, match="cannot be written"):
        nifti.write(a_volume, tmp_path / "gone" / "out.nii")


def lit_corner(right: bool, anterior: bool, superior: bool, affine: np.ndarray) -> Volume:
    """A volume of air with one bright corner of the patient."""
    index = np.stack(np.meshgrid(*map(np.arange, (20, 24, 28)), indexing="ij"), axis=-1)
    ras = index @ affine[:3, :3].T + affine[:3, 3]
    middle = ras.reshape(-1, 3).mean(axis=0)
    wanted = np.array([right, anterior, superior])
    bright = ((ras > middle) == wanted).all(axis=-1)
    return Volume(np.where(bright, 1000, -1000).astype(np.float32), affine, None)


@pytest.mark.parametrize(
    "affine",
    [
        AFFINE,
        np.array([[0, 0, 1.5, 0], [0, 2.0, 0, 0], [-2.5, 0, 0, 0], [0, 0, 0, 1.0]]),
        np.array([[2.5, 0, 0, 0], [0, 0, 1.5, 0], [0, -2, 0, 0], [0, 0, 0, 1.0]]),
    ],
)
@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("anterior", [True, False])
@pytest.mark.parametrize("superior", [True, False])
def test_planes_show_the_patients_right_on_the_left_front_and_head_on_top(
    right: bool, anterior: bool, superior: bool, affine: np.ndarray
) -> None:
    array, _ = preview.towards_inferior_posterior_left(lit_corner(right, anterior, superior, affine))

    depth, height, width = (size // 4 for size in array.shape)
    assert array[depth if superior else -depth, height if anterior else -height, width if right else -width] == 1000
    assert (array > 0).mean() == pytest.approx(1 / 8, abs=0.05)


def test_the_preview_is_a_picture_of_three_planes_in_one_scale(a_volume: Volume, tmp_path: Path) -> None:
    preview.write(a_volume, tmp_path / "preview.png")
    with Image.open(tmp_path / "preview.png") as picture:
        assert picture.mode == "L"
        assert picture.width > picture.height > 100
        assert not picture.info
    assert [entry.name for entry in tmp_path.iterdir()] == ["preview.png"]


def test_a_head_alone_is_shown_in_the_brain_window(a_volume: Volume) -> None:
    head, chest = (preview.draw(replace(a_volume, regions=(region,))) for region in ("head", "chest"))
    assert np.asarray(head).tobytes() != np.asarray(chest).tobytes()
    assert np.array_equal(np.asarray(head), np.asarray(preview.draw(a_volume, preview.BRAIN)))
