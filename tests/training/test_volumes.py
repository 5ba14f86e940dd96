from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from mu2_model import Mu2ForConditionalGeneration, Mu2ImageProcessor, Mu2Processor
from training.data import Case
from training.dense_data import DenseData, augment, positives
from training.dense_labels import cell_fractions
from training.token_cache import TokenCache
from training.volumes import BadVolumeError, VolumeCache, read_volume, stack_volumes


@pytest.fixture
def cache(world: Path, tmp_path: Path) -> VolumeCache:
    return VolumeCache(tmp_path / "cache", Mu2Processor.from_pretrained(world / "init").image_processor)


def test_nifti_and_phantom_file_give_the_same_volume(cases: list[Case], tmp_path: Path) -> None:
    array, affine = read_volume(cases[0].image)
    file = tmp_path / "same.nii.gz"
    nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), affine[:, [2, 1, 0, 3]]), file)
    again, affine_again = read_volume(file)
    assert again.dtype == np.int16
    np.testing.assert_array_equal(again, array)
    np.testing.assert_allclose(affine_again, affine)


def test_cache_gives_what_the_processor_gives(cases: list[Case], cache: VolumeCache) -> None:
    prepared = cache.processor.prepare(*read_volume(cases[1].image))
    stored = cache.get(cases[1].image)
    assert stored.live_chunks == int(prepared.chunk_mask.sum())
    np.testing.assert_allclose(stored.pixels, prepared.pixel_values.numpy(), atol=5e-4)


def test_a_second_look_reads_the_stored_entry(cases: list[Case], cache: VolumeCache) -> None:
    cache.get(cases[0].image)
    entry = cache.folder / f"{cache.key(cases[0].image)}.npy"
    marked = np.load(entry)
    marked[:] = 0.25
    np.save(entry, marked)
    assert float(cache.get(cases[0].image).pixels.max()) == 0.25


def test_another_preprocessing_is_another_entry(cases: list[Case], cache: VolumeCache) -> None:
    other = VolumeCache(cache.folder, Mu2ImageProcessor(size=32, chunk_slices=8, max_slices=32, slice_mm=5.0))
    assert other.key(cases[0].image) != cache.key(cases[0].image)


def test_a_changed_file_is_another_entry(cases: list[Case], cache: VolumeCache, tmp_path: Path) -> None:
    copy = tmp_path / "v.npz"
    copy.write_bytes(Path(cases[0].image).read_bytes())
    before = cache.key(copy)
    copy.write_bytes(Path(cases[1].image).read_bytes())
    assert cache.key(copy) != before


def test_bad_files_are_counted_with_their_reason_and_the_others_prepared(
    cases: list[Case], cache: VolumeCache, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(b"\x1f\x8b broken")
    flat = tmp_path / "flat.npz"
    np.savez(flat, hu=np.zeros((8, 40, 40), np.int16), affine=np.diag([4.0, 4, 4, 1]))
    missing = str(tmp_path / "missing.npz")
    report = cache.prepare([cases[0].image, str(cut), str(flat), missing])
    assert report.ready == 1
    assert set(report.bad) == {str(cut), str(flat), missing}
    assert "Hounsfield" in report.bad[str(flat)]
    assert report.text().startswith("1 volumes ready, 3 bad")


def test_a_folder_of_dicom_files_is_bad_with_a_word_on_what_training_reads(cache: VolumeCache, tmp_path: Path) -> None:
    told = cache.prepare([str(tmp_path)]).bad[str(tmp_path)]
    assert "is a folder: training reads NIfTI files" in told
    assert "mu2 volume DIR OUT.nii.gz" in told
    with pytest.raises(BadVolumeError, match="is a folder"):
        read_volume(tmp_path)


def test_shorter_volumes_are_padded_by_masked_chunks(cases: list[Case], cache: VolumeCache) -> None:
    stacked = stack_volumes([cache.get(cases[0].image), cache.get(cases[1].image)])
    assert stacked["chunk_mask"].tolist() == [[True, False], [True, True]]
    assert float(stacked["pixel_values"][0, 1].abs().max()) == 0


def test_a_file_that_is_no_volume_raises(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"nothing")
    with pytest.raises(BadVolumeError, match=r"x\.npz"):
        read_volume(tmp_path / "x.npz")


def test_stored_tower_tokens_are_those_of_the_tower(world: Path, cases: list[Case], cache: VolumeCache) -> None:
    model = Mu2ForConditionalGeneration.from_pretrained(world / "init").eval()
    tokens = TokenCache(cache.folder / "tokens", cache, model)
    assert tokens.fill([cases[0].image, cases[1].image], model) == 2
    assert tokens.fill([cases[0].image], model) == 0
    stacked = tokens.stack([cases[0].image, cases[1].image])
    pixels = stack_volumes([cache.get(cases[0].image), cache.get(cases[1].image)])
    with torch.no_grad():
        direct = model.model.encode_chunks(pixels["pixel_values"], pixels["chunk_mask"])
        pooled = stacked["tower_tokens"]
        projected = (
            model.model.projector.fc2(torch.nn.functional.gelu(model.model.projector.fc1(pooled)))
            * stacked["chunk_mask"][:, :, None, None]
        )
    torch.testing.assert_close(projected, direct, atol=2e-3, rtol=0)


def test_tokens_of_another_tower_are_other_entries(world: Path, cases: list[Case], cache: VolumeCache) -> None:
    model = Mu2ForConditionalGeneration.from_pretrained(world / "init")
    before = TokenCache(cache.folder, cache, model).digest
    with torch.no_grad():
        model.model.vision_tower.norm.bias += 1
    assert TokenCache(cache.folder, cache, model).digest != before


def test_a_labelled_ball_lands_in_the_cells_that_show_it(cases: list[Case], cache: VolumeCache) -> None:
    array, affine = read_volume(cases[0].image)
    grid = cache.processor.prepare(array, affine).grid
    ball = np.zeros(array.shape, np.uint8)
    ball[array > 200] = 1
    fractions = cell_fractions(ball, 1, grid, (4, 8, 8))
    cells = fractions.reshape(-1, 2, 4, 4)
    columns = np.flatnonzero(cells.sum(axis=(0, 1, 2)))
    # The model's columns run to the patient's right, the ball is on the left.
    assert columns.max() <= 1
    voxels = fractions.sum() / 255 * 4 * 8 * 8
    assert voxels == pytest.approx(int(ball.sum()) / abs(np.linalg.det(grid.to_source[:3, :3])), rel=0.15)


def test_every_kind_is_drawn_and_cells_that_are_grazed_do_not_count(cases: list[Case], cache: VolumeCache) -> None:
    data = DenseData(cases[:4], cache, (4, 8, 8), cell=(4, 8, 8))
    assert set(data.holding) == {0}
    batch = data.training_batch(8, np.random.default_rng(0))
    assert batch.pixels.shape == (8, 3, 8, 32, 32)
    positive, sure = positives(batch.findings)
    assert bool(positive.any(dim=(1, 2)).sum() >= 3)
    assert bool((sure | ~positive).all())


def test_augmentation_never_changes_side(cases: list[Case], cache: VolumeCache) -> None:
    pixels = torch.from_numpy(np.asarray(cache.get(cases[0].image).pixels, np.float32))
    bone = pixels[:, 2]
    moved = augment(pixels, np.random.default_rng(3))[:, 2]
    half = pixels.shape[-1] // 2
    left, right = bone[..., :half].sum(), bone[..., half:].sum()
    assert left > right
    assert moved[..., :half].sum() > moved[..., half:].sum()
    torch.testing.assert_close(moved, bone, atol=0.3, rtol=0)
