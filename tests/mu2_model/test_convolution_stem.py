"""The convolution stem: the same patch grid as the published embedding, and a lesion known wherever it lies."""

from pathlib import Path

import pytest
import torch

from mu2_model.configuration_mu2 import Mu2VisionConfig
from mu2_model.modeling_mu2 import Mu2ForConditionalGeneration
from mu2_model.vision_tower import ConvolutionStem, Mu2VisionTower
from tests.mu2_model.small_models import build, inputs, small_config

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SHAPE = {"image_size": [8, 32, 32], "patch_size": [4, 8, 8], "stem_channels": [8, 8, 16]}


def stem() -> ConvolutionStem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ConvolutionStem(Mu2VisionConfig(**SIZES, **SHAPE)).eval()


def test_the_stem_gives_a_token_for_every_patch_in_the_order_of_the_patches() -> None:
    plain = stem()
    for block in [*plain.reductions, *plain.refinements]:
        block[1] = torch.nn.Identity()  # a group norm lets every token hear of every voxel
    dark, bright = torch.zeros(1, 3, 8, 64, 64), torch.zeros(1, 3, 8, 64, 64)
    bright[:, :, 4:8, 32:40, 16:24] = 1.0  # the patch at (1, 4, 2) of a grid of 2 x 8 x 8
    with torch.no_grad():
        tokens = plain(bright)
        heard = (tokens - plain(dark)).abs().sum(dim=2).reshape(2, 8, 8) > 0
    assert tokens.shape == (1, 128, 16)
    assert bool(heard[1, 4, 2])
    rows, columns = heard.any(dim=0).any(dim=1).nonzero(), heard.any(dim=0).any(dim=0).nonzero()
    # A halving starts at its first voxel, so one patch more hears of it behind than before.
    assert (int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())) == (2, 7, 0, 5)


def test_a_lesion_moved_by_a_patch_moves_the_answer_by_a_patch() -> None:
    # Far from the edge, where padding is met, and equal in their group norms, which see the whole chunk.
    here, there = torch.zeros(1, 3, 8, 160, 160), torch.zeros(1, 3, 8, 160, 160)
    here[:, :, 2:4, 73:76, 74:77] = 1.0
    there[:, :, 2:4, 81:84, 74:77] = 1.0
    with torch.no_grad():
        first, second = (stem()(chunk).reshape(1, 2, 20, 20, 16) for chunk in (here, there))
    torch.testing.assert_close(first[:, :, 7:12, 7:12], second[:, :, 8:13, 7:12], atol=1e-5, rtol=1e-4)
    assert float((first - second).abs().max()) > 0.1


def test_a_model_with_a_stem_is_saved_loaded_and_trained(tmp_path: Path) -> None:
    config = small_config()
    width, halvings = config.vision.hidden_size, max(patch.bit_length() - 1 for patch in config.vision.patch_size)
    config.vision.stem_channels = [8] * (halvings - 1) + [width]
    model, given = build(config), inputs()
    model.save_pretrained(tmp_path)
    loaded = Mu2ForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**given).logits, model(**given).logits)
    model.train()(**given, labels=given["input_ids"]).loss.backward()
    assert all(float(p.grad.abs().max()) > 0 for p in model.model.vision_tower.patch_embedding.parameters())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"stem_channels": [8, 16]}, "halvings"), ({"stem_channels": [8, 8, 8]}, "hidden_size")],
)
def test_a_stem_that_does_not_reach_the_patches_is_refused(wrong: dict[str, list[int]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Mu2VisionTower(Mu2VisionConfig(**SIZES, **{**SHAPE, **wrong}))
