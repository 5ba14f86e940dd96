"""Which slice each sentence of a draft leans on most, found with the draft: one gradient a sentence, no run of the vision tower.

A box of patches is one token of the projector. Its pull on a sentence is ‖∂ log p(sentence) / ∂ token − the mean of the same
for the draft's other sentences‖: what moves all sentences alike tells none of them apart. The best slice goes through the
middle of the box with the largest pull. It says where a small change of the image would change these words most, not what is
there, and it comes without a faithfulness figure; `mu2_model.evidence` has one, at the price of many runs of the tower.

Letters as in `modeling_mu2`; R sentences.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

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
    without tokens, and for all of them when `stop` says so meanwhile, when the volume has no place in the patient, or when
    the projector does not pool neighbours (one published layout).
    """
    nowhere: list[Point | None] = [None] * len(sentences)
    if grid.to_ras is None or model.config.projector_grid != model.config.vision.patch_grid:
        return nowhere
    gradients = _gradients(model, tokens_CNH, chunk_mask_C, text, draft_ids, sentences, stop)
    if gradients is None:
        return nowhere
    places, live = _box_places(model, grid, len(tokens_CNH))
    pull_RCN = pulls(gradients).where(live, -1.0)
    best = [place.argmax() for place in pull_RCN.flatten(1)]
    points = apply_affine(grid.to_ras, places.reshape(-1, 3)[[int(index) for index in best]])
    return [
        (float(point[0]), float(point[1]), float(point[2])) if last > first else None
        for point, (first, last) in zip(points, sentences, strict=True)
    ]


def pulls(gradients_RCNH: Tensor) -> Tensor:
    """The pull (R, C, N) of every box on every sentence; of one or two sentences the plain norm.

    Two differ from their mean by the same, so that each would get the other's slice.
    """
    gradients_RCNH = gradients_RCNH.float()
    if len(gradients_RCNH) > 2:
        # Less the mean of all is less the mean of the others, but for a factor that the largest does not depend on.
        gradients_RCNH = gradients_RCNH - gradients_RCNH.mean(dim=0)
    return gradients_RCNH.norm(dim=-1)


def _gradients(
    model: Mu2ForConditionalGeneration,
    tokens_CNH: Tensor,
    chunk_mask_C: Tensor,
    text: dict[str, Tensor],
    draft_ids: Tensor,
    sentences: list[tuple[int, int]],
    stop: Callable[[], bool],
) -> Tensor | None:
    """Gradient (R, C, N, H) of every sentence's log-probability by the tokens; None when stopped."""
    found = []
    with torch.inference_mode(False), torch.enable_grad():
        # Copies, because what was made in inference mode can be no part of a graph.
        tokens_BCNH = tokens_CNH[None].clone().requires_grad_()
        own = {key: value.clone() for key, value in text.items()}
        features = model.model.gather_tokens(
            tokens_BCNH, own["question_ids"], own["question_attention_mask"], chunk_mask_C[None].clone()
        )
        log_probabilities = token_log_probabilities(model, features, own, draft_ids.clone())
        for first, last in sentences:
            if stop():
                return None
            (gradient,) = torch.autograd.grad(log_probabilities[first:last].sum(), tokens_BCNH, retain_graph=True)
            found.append(gradient[0].detach().cpu())
    return torch.stack(found)


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
