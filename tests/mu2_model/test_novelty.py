"""What tells a volume that is unlike the training data, on features and on whole volumes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mu2_model import novelty
from mu2_model.checkpoint_folder import hash_weights
from mu2_model.drafter import ReportDrafter
from mu2_model.errors import CheckpointError
from mu2_model.image_processing_mu2 import Volume
from mu2_model.novelty import FILE, Novelty, PooledTokens, features, fit
from mu2_model.untrained import make_untrained

WIDTH = 64  # of the untrained checkpoint's tower
AFFINE = np.diag([6.0, 4.0, 4.0, 1.0])
QUESTION = "Describe the findings of this CT."


def rows(count: int, width: int = 6, seed: int = 0, spread: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    """Rows whose first two columns go together."""
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    drawn[:, 1] = drawn[:, 0] + 0.05 * drawn[:, 1]
    return spread * drawn + shift


def body(seed: int, slices: int = 24) -> Volume:
    """A soft body in air, of another size and noise every time."""
    rng = np.random.default_rng(seed)
    _, y, x = np.meshgrid(np.arange(slices), np.arange(48), np.arange(48), indexing="ij")
    radius = rng.uniform(15, 20)
    inside = (y - 24) ** 2 + ((x - 24) * rng.uniform(0.85, 1.0)) ** 2 < radius**2
    hu: NDArray[np.float32] = np.where(inside, rng.uniform(30, 60), -1000).astype(np.float32)
    return hu + rng.normal(0, 12, hu.shape).astype(np.float32), AFFINE


def noise(seed: int, slices: int = 24) -> Volume:
    return np.random.default_rng(seed).uniform(-1000, 1000, (slices, 48, 48)).astype(np.float32), AFFINE


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained checkpoint that knows bodies."""
    folder = make_untrained(tmp_path_factory.mktemp("model"))
    drafter = ReportDrafter.from_pretrained(folder)
    known = torch.stack([features(tower_tokens(drafter, body(seed))) for seed in range(60)])
    fit(known[:40], known[40:], 1.0).save(folder)
    return folder


@pytest.fixture(scope="module")
def drafter(checkpoint: Path) -> ReportDrafter:
    return ReportDrafter.from_pretrained(checkpoint)


def tower_tokens(drafter: ReportDrafter, volume: Volume) -> torch.Tensor:
    """Pooled tower tokens (L, N, W), the plain way."""
    prepared = drafter.processor.image_processor.prepare(*volume)
    inner = drafter.model.model
    with torch.inference_mode():
        return inner.projector.pool(inner.vision_tower(prepared.pixel_values[prepared.chunk_mask]))


def test_a_row_from_elsewhere_is_farther_than_any_of_the_same_kind() -> None:
    made = fit(rows(200), rows(100, seed=1), 0.99)
    ordinary = [made.distance(row) for row in rows(100, seed=2)]
    assert min(made.distance(row) for row in rows(20, seed=3, shift=8.0)) > max(ordinary)


def test_a_row_against_the_correlation_is_far_though_each_value_is_ordinary() -> None:
    made = fit(rows(200), rows(100, seed=1), 0.99)
    along, across = torch.zeros(6), torch.zeros(6)
    along[:2], across[:2] = torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0])
    assert made.distance(across) > 3 * made.distance(along)


def test_the_threshold_passes_its_share_and_false_alarms_are_counted_on_others() -> None:
    held_out = rows(400, seed=1)
    made = fit(rows(400), held_out, 0.9)
    distances = [made.distance(row) for row in held_out]
    assert sum(d > made.threshold * (1 + 1e-6) for d in distances[:200]) in (19, 20)
    assert made.false_alarms == pytest.approx(sum(d > made.threshold for d in distances[200:]) / 200)
    assert (made.fitted, made.calibrated, made.checked) == (400, 200, 200)


def test_fewer_rows_than_features_still_give_finite_distances() -> None:
    made = fit(rows(5, width=40), rows(4, width=40, seed=1), 1.0)
    assert np.isfinite([made.distance(row) for row in rows(3, width=40, seed=2)]).all()


def test_a_channel_that_never_moved_is_no_division_by_nought() -> None:
    still = rows(50)
    still[:, 3] = 1.0
    assert np.isfinite(fit(still, still[:10], 1.0).distance(still[0]))


def test_one_volume_is_too_few() -> None:
    with pytest.raises(ValueError, match="two of each"):
        fit(rows(1), rows(10), 0.9)


def test_what_is_stored_scores_alike(tmp_path: Path) -> None:
    made = fit(rows(100, width=2 * WIDTH), rows(40, width=2 * WIDTH, seed=1), 0.9)
    made.save(tmp_path)
    loaded = Novelty.load(tmp_path, WIDTH)
    assert loaded is not None
    row = rows(1, width=2 * WIDTH, seed=9)[0]
    assert loaded.distance(row) / loaded.threshold == pytest.approx(made.distance(row) / made.threshold)
    assert (loaded.fitted, loaded.false_alarms) == (made.fitted, made.false_alarms)


def test_a_file_of_another_tower_or_a_broken_one_is_refused_with_what_to_do(tmp_path: Path) -> None:
    fit(rows(10), rows(10), 1.0).save(tmp_path)
    with pytest.raises(CheckpointError, match="training novelty"):
        Novelty.load(tmp_path, WIDTH)
    (tmp_path / FILE).write_bytes(b"not a tensor")
    with pytest.raises(CheckpointError, match="training novelty"):
        Novelty.load(tmp_path, WIDTH)


def test_empty_chunks_count_for_nothing_whether_they_were_encoded_or_not() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    every = torch.arange(6.0)[:, None, None].expand(6, 4, 2)
    encoded, live = PooledTokens(), PooledTokens()
    encoded.listen(torch.nn.Identity(), (every,))
    live.listen(torch.nn.Identity(), (every[mask.flatten()],))
    for pooled in (encoded, live):
        assert [volume[:, 0, 0].tolist() for volume in pooled.of_volumes(mask)] == [[0, 1], [3]]


def test_a_body_is_like_the_training_bodies_and_noise_is_not(drafter: ReportDrafter) -> None:
    drafts = drafter.draft([body(100), noise(1), body(101)], [QUESTION] * 3, max_new_tokens=2)
    assert [draft.unlike_training for draft in drafts] == [False, True, False]


def test_the_score_is_that_of_the_volume_alone(drafter: ReportDrafter) -> None:
    long, short = body(102, slices=40), noise(2, slices=12)
    together = drafter.draft([long, short, short], [QUESTION, QUESTION, "Anything else?"], max_new_tokens=2)
    assert drafter.novelty is not None
    alone = [drafter.novelty.score(tower_tokens(drafter, volume)) for volume in (long, short, short)]
    assert [draft.novelty for draft in together] == pytest.approx(alone, rel=1e-3)


def test_a_checkpoint_without_the_file_knows_nothing_of_novelty(tmp_path: Path) -> None:
    draft = ReportDrafter.from_pretrained(make_untrained(tmp_path)).draft([noise(1)], [QUESTION], max_new_tokens=2)[0]
    assert draft.novelty is None and not draft.unlike_training


def test_the_hash_of_the_weights_is_that_of_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    assert hash_weights(checkpoint) == hash_weights(make_untrained(tmp_path))
    assert (checkpoint / novelty.FILE).is_file()
