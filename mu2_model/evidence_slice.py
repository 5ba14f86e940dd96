"""Which slice each sentence of a draft leans on most, found with the draft: one gradient a sentence, no run of the vision tower.

The pull of a box of patches on a sentence is ‖∂ log p(sentence) / ∂ token‖ of the box's token, where the refiner is done with
it and before selection mixes all of them. The best slice goes through the middle of the box with the largest pull. It says where
a small change of the image would change these words most, not what is there, and it comes without a faithfulness figure;
`mu2_model.evidence` has one, at the price of many runs of the tower.

Letters as in `modeling_mu2`; R sentences, of which `pulls_RCN` is a list.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mu2_model.evidence import patches_with_image, pooled_patches, token_log_probabilities
from mu2_model.modeling_mu2 import Mu2ForConditionalGeneration
from mu2_model.volume_grid import Matrix, VolumeGrid, apply_affine

Point = tuple[float, float, float]
"""RAS millimetres."""


def best_slices(
    model: Mu2ForConditionalGeneration,
    tokens_CNH: Tensor,
    chunk_mask_C: Tensor,
    grid: VolumeGrid,
    text: dict[str, Tensor],
    draft_ids: Tensor,
    sentences: list[tuple[int, int]],
    stop: Callable[[], bool],
) -> list[Point | None]:
    """A point of the best slice of every sentence, given as token ranges [first, last) of a draft (tokens,).

    `tokens_CNH` are the encoded chunks that the draft was made from, `text` one row of its prompt. None for a sentence
    without tokens, for those that are left when `stop` says so, and for all of them when the volume has no place in the
    patient or the projector does not pool neighbours (one published layout).
    """
    nowhere: list[Point | None] = [None] * len(sentences)
    if grid.to_ras is None or model.config.projector_grid != model.config.vision.patch_grid:
        return nowhere
    pulls_RCN = pulls(model, tokens_CNH, chunk_mask_C, text, draft_ids, sentences, stop)
    places, live = _box_places(model, grid, len(tokens_CNH))
    return [
        _point(grid.to_ras, places.reshape(-1, 3)[int(pull_CN.where(live, -1.0).argmax())]) if last > first else None
        for pull_CN, (first, last) in zip(pulls_RCN, sentences, strict=False)
    ] + nowhere[len(pulls_RCN) :]


def pulls(
    model: Mu2ForConditionalGeneration,
    tokens_CNH: Tensor,
    chunk_mask_C: Tensor,
    text: dict[str, Tensor],
    draft_ids: Tensor,
    sentences: list[tuple[int, int]],
    stop: Callable[[], bool],
) -> list[Tensor]:
    """The pull (C, N) of every box on one sentence after the other, until `stop` says so; arguments as `best_slices`."""
    refined: list[Tensor] = []

    def begin_here(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        refined.append(output.detach().clone().requires_grad_())
        return refined[-1]

    found: list[Tensor] = []
    with torch.inference_mode(False), torch.enable_grad():
        # Copies, because what was made in inference mode can be no part of a graph.
        own = {key: value.clone() for key, value in text.items()}
        with model.model.visual_tokenizer.refiner.register_forward_hook(begin_here):
            features = model.model.gather_tokens(
                tokens_CNH[None].clone(),
                own["question_ids"],
                own["question_attention_mask"],
                chunk_mask_C[None].clone(),
            )
        log_probabilities = token_log_probabilities(model, features, own, draft_ids.clone())
        for first, last in sentences:
            if stop():
                break
            wanted = log_probabilities[first:last].sum()
            (gradient,) = torch.autograd.grad(wanted, refined, retain_graph=True)
            found.append(gradient.float().norm(dim=-1).reshape(tokens_CNH.shape[:2]).cpu())
    return found


def _point(to_ras: Matrix, index: NDArray[np.float64]) -> Point:
    x, y, z = apply_affine(to_ras, index)
    return float(x), float(y), float(z)


def _box_places(model: Mu2ForConditionalGeneration, grid: VolumeGrid, chunks: int) -> tuple[Matrix, Tensor]:
    """The middle (C, N, 3) of what every box holds of the image, as model indices, and which boxes hold any (C, N)."""
    vision = model.config.vision
    members = pooled_patches(model.config.projector_grid, model.config.tokenizer.projector_pooling_size)
    inside_CP = patches_with_image(grid, vision.patch_grid, chunks)
    inside = inside_CP[:, members].numpy()[..., None]
    depth, height, width = vision.patch_size
    centres = np.minimum(grid.patch_centres((depth, height, width)), np.array(grid.shape) - 1.0)
    padded = np.zeros((chunks, *centres.shape[1:]))
    padded[: len(centres)] = centres[:chunks]
    middles = (padded[:, members] * inside).sum(axis=2) / np.maximum(inside.sum(axis=2), 1)
    return middles, inside_CP[:, members].any(dim=2)
