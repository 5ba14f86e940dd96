"""Evidence: where the heat lies, and that the faithfulness figure tells a used image from an unused one."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mu2_model import evidence as explaining
from mu2_model.drafter import ReportDrafter
from mu2_model.evidence import CONTROLS, SentenceEvidence, blank_patches, patches_with_image, pooled_patches
from mu2_model.evidence_picture import draw_evidence
from mu2_model.untrained import make_untrained
from mu2_model.volume_grid import VolumeGrid, apply_affine
from tests.mu2_model.small_volumes import affine, body

QUESTION = "Describe the findings."


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> ReportDrafter:
    return ReportDrafter.from_pretrained(make_untrained(tmp_path_factory.mktemp("untrained")))


def test_evidence_is_off_unless_asked_for(drafter: ReportDrafter) -> None:
    assert drafter.draft([(body(), affine())], [QUESTION], max_new_tokens=4)[0].evidence is None


def test_every_sentence_has_heat_that_sums_to_one_and_its_place_in_the_patient(drafter: ReportDrafter) -> None:
    (draft,) = drafter.draft([(body(), affine())], [QUESTION], max_new_tokens=12, evidence=True)
    assert draft.evidence is not None and len(draft.evidence) == len(draft.sentences) > 0
    for evidence in draft.evidence:
        assert evidence.heat.shape == (4, 4, 4)
        assert float(evidence.heat.sum()) == pytest.approx(1, abs=1e-4)
        assert evidence.to_ras is not None and np.isfinite([evidence.drop, evidence.control_drop]).all()


def test_padding_has_no_heat(drafter: ReportDrafter) -> None:
    (draft,) = drafter.draft([(body((8, 80, 96)), affine(4.0))], [QUESTION], max_new_tokens=4, evidence=True)
    assert draft.evidence is not None
    # 32 mm of slices at 6 mm are six of sixteen slices of the chunk: two of its four rows of patches.
    assert draft.evidence[0].heat[2:].max() == 0 and draft.evidence[0].heat[:2].sum() > 0.99


def test_the_place_of_a_patch_is_the_centre_of_its_voxels(drafter: ReportDrafter) -> None:
    (draft,) = drafter.draft([(body(), affine())], [QUESTION], max_new_tokens=4, evidence=True)
    grid = drafter.processor.image_processor.prepare(body(), affine()).grid
    assert draft.evidence is not None and draft.evidence[0].to_ras is not None
    index = np.array([[1, 2, 3]])
    patch = grid.patch_centres_mm((4, 16, 16))[0, 1 * 16 + 2 * 4 + 3]
    assert np.allclose(apply_affine(draft.evidence[0].to_ras, index)[0], patch)


def test_heat_follows_a_weight_that_points_at_one_place(
    drafter: ReportDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection = drafter.model.model.visual_tokenizer.selection
    original = selection.forward

    def one_token(x: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        _, weights = original(x, mask)
        only = torch.zeros_like(weights)
        only[:, 5] = 1
        return only.transpose(1, 2) @ x.flatten(1, 2), only

    monkeypatch.setattr(selection, "forward", one_token)
    (draft,) = drafter.draft([(body((40, 80, 96)), affine())], [QUESTION], max_new_tokens=4, evidence=True)
    assert draft.evidence is not None
    hot = np.argwhere(draft.evidence[0].heat > 0)
    members = pooled_patches((4, 4, 4), 2)[5]
    assert sorted(map(tuple, hot.tolist())) == [(int(i) // 16, int(i) // 4 % 4, int(i) % 4) for i in sorted(members)]


def test_a_model_that_ignores_the_image_gets_no_support(
    drafter: ReportDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    projector = drafter.model.model.projector
    monkeypatch.setattr(projector, "forward", lambda x: torch.ones(x.shape[0], 8, 64))
    (draft,) = drafter.draft([(body(), affine())], [QUESTION], max_new_tokens=6, evidence=True)
    assert draft.evidence
    assert all(evidence.drop == 0 and not evidence.supported for evidence in draft.evidence)


def test_support_needs_a_drop_above_noise_and_above_random_patches() -> None:
    heat = np.full((2, 2, 2), 0.125, np.float32)
    assert SentenceEvidence(heat, None, drop=0.5, control_drop=0.1).supported
    assert not SentenceEvidence(heat, None, drop=0.005, control_drop=0.0).supported
    assert not SentenceEvidence(heat, None, drop=0.2, control_drop=0.3).supported


def test_the_control_is_the_largest_drop_of_several_random_draws_that_all_sentences_share(
    drafter: ReportDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every blanking costs one nat a token more than the one before.
    calls: list[int] = []
    changed: list[int] = []

    def blanked(pixels: torch.Tensor, patches: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
        calls.append(len(patches))
        changed.append(len(set(patches.tolist())))
        return pixels

    monkeypatch.setattr(explaining, "blank_patches", blanked)
    drops = iter(range(1, 100))
    original = explaining.token_log_probabilities
    monkeypatch.setattr(
        explaining,
        "token_log_probabilities",
        lambda *given: original(*given) * 0 - (next(drops) if calls else 0),
    )
    (draft,) = drafter.draft([(body(), affine())], [QUESTION], max_new_tokens=12, evidence=True)
    assert draft.evidence is not None
    assert len(calls) == CONTROLS + len(draft.sentences) and calls == changed
    assert {shown.control_drop for shown in draft.evidence} == {float(CONTROLS)}
    assert [shown.drop for shown in draft.evidence] == [float(CONTROLS + 1 + i) for i in range(len(draft.sentences))]


def test_blanking_fills_exactly_the_chosen_patches() -> None:
    pixels = torch.rand(1, 2, 3, 4, 8, 8)
    blanked = blank_patches(pixels, torch.tensor([0, 9]), (2, 4, 4))
    changed = (blanked != pixels).any(dim=2)[0]
    expected = torch.zeros(2, 4, 8, 8, dtype=torch.bool)
    expected[0, :2, :4, :4] = expected[1, :2, :4, 4:] = True
    assert torch.equal(changed, expected)


def test_patches_with_one_voxel_of_image_count() -> None:
    grid = VolumeGrid((5, 8, 3), (4, 8, 8), (5, 8, 3), np.eye(4), None)
    live = patches_with_image(grid, (2, 2, 2), chunks=2).view(2, 2, 2, 2)
    assert live[0].sum() == 4 and live[1, 0].sum() == 2 and live[1, 1].sum() == 0


def test_the_projector_pools_every_patch_once() -> None:
    members = pooled_patches((4, 4, 2), 2)
    assert members.shape == (4, 8) and sorted(members.flatten().tolist()) == list(range(32))


def test_the_picture_shows_the_right_of_the_patient_on_the_left(drafter: ReportDrafter, tmp_path: Path) -> None:
    hu = body()
    hu[:, 20:60, 12:40] = 400  # Columns run to the left: this is the patient's right.
    (draft,) = drafter.draft([(hu, affine())], [QUESTION], max_new_tokens=4, evidence=True)
    assert draft.evidence is not None
    prepared = drafter.processor.image_processor.prepare(hu, affine())
    cold = replace(
        draft.evidence[0], heat=np.full((4, 4, 4), 1e-9, np.float32) + np.eye(4, dtype=np.float32)[:, :, None] * 0
    )
    draw_evidence(tmp_path / "picture.png", prepared, cold, draft.sentences[0].text, slices=1)
    picture = np.asarray(Image.open(tmp_path / "picture.png").convert("L"))
    panel = picture[30:300]
    assert panel[:, :190].mean() > panel[:, 200:].mean()


def test_a_long_sentence_stands_whole_under_a_narrow_picture(drafter: ReportDrafter, tmp_path: Path) -> None:
    prepared = drafter.processor.image_processor.prepare(body(), affine())
    shown = SentenceEvidence(np.full((4, 4, 4), 1 / 64, np.float32), np.eye(4), 0.1, 0.0)
    heights = []
    for words in (3, 60):
        draw_evidence(tmp_path / "picture.png", prepared, shown, "effusion " * words, slices=1)
        heights.append(Image.open(tmp_path / "picture.png").size[1])
    assert heights[1] - heights[0] >= 8 * 20
    picture = np.asarray(Image.open(tmp_path / "picture.png").convert("L"))
    assert picture[-heights[1] + 330 :, -4:].max() == 0  # no line runs out of the picture


def test_the_picture_of_a_volume_without_affine_claims_no_side(drafter: ReportDrafter, tmp_path: Path) -> None:
    prepared = drafter.processor.image_processor.prepare(body(), affine())
    nowhere = replace(prepared, grid=replace(prepared.grid, to_ras=None))
    evidence = SentenceEvidence(np.full((4, 4, 4), 1 / 64, np.float32), None, 0.1, 0.0)
    draw_evidence(tmp_path / "picture.png", nowhere, evidence, "A sentence.")
    assert Image.open(tmp_path / "picture.png").size[0] == 3 * 384
