"""Where the model looked when it wrote a sentence, and whether that mattered.

Heat of a patch = attention of the sentence's tokens to the visual tokens in the prompt ∘ the aggregator's weights ∘ pooling ∘
selection weights ∘ the projector's pooling. The vision tower and the refiner mix patches before selection, so heat shows where
information was picked up, not what caused a sentence. Hence the faithfulness figure: the hottest patches are blanked in the
input and the drop of the sentence's log-probability is measured, beside the largest drop of several draws of as many patches
at random. One draw would be beaten by chance every second time; CONTROLS of them are, one time in CONTROLS + 1.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mu2_model.image_processing_mu2 import PreparedVolume
from mu2_model.modeling_mu2 import Mu2ForConditionalGeneration, Mu2ImageFeatures
from mu2_model.volume_grid import Matrix, VolumeGrid

BLANKED_SHARE = 0.1
CONTROLS = 9
# A drop below this many nats per token is not told from noise.
SUPPORT_MARGIN = 0.01


@dataclass(frozen=True)
class SentenceEvidence:
    """Heat over the patches of one sentence, summing to 1, and what blanking the hottest of them did.

    Drops are differences of the mean log-probability per token: before minus after blanking. `control_drop` is the largest of
    those of CONTROLS random draws.
    """

    heat: NDArray[np.float32]  # (slices, rows, columns) of patches
    to_ras: Matrix | None  # 4x4, patch index to RAS millimetres of its centre
    drop: float
    control_drop: float

    @property
    def supported(self) -> bool:
        """False: the sentence is weakly supported by the image."""
        return self.drop > SUPPORT_MARGIN and self.drop > self.control_drop


def explain(
    model: Mu2ForConditionalGeneration,
    prepared: PreparedVolume,
    text: dict[str, Tensor],
    draft_ids: Tensor,
    sentences: list[tuple[int, int]],
    seed: int = 0,
) -> list[SentenceEvidence]:
    """Evidence for sentences given as token ranges [first, last) of a draft (tokens,).

    `text` holds the tensors of one prompt (batch of one). Runs the vision tower 1 + CONTROLS + sentences times (all sentences
    share the random draws) and the language model with its attention materialised once.
    """
    pixels, mask = prepared.pixel_values[None], prepared.chunk_mask[None]
    maps = _encode(model, pixels, mask, text, output_maps=True)
    before = token_log_probabilities(model, maps, text, draft_ids)
    looked_TQ = _attention_to_image(model, maps, text, draft_ids)
    patch_weight_QM = _query_to_patches(model, maps)
    inside_CP = patches_with_image(prepared.grid, model.config.vision.patch_grid, len(prepared.chunk_mask))
    live_CP = inside_CP[: patch_weight_QM.shape[1] // _patches(model)]
    candidates = live_CP.flatten().nonzero().squeeze(1)
    count = max(1, int(BLANKED_SHARE * len(candidates)))

    def drop_without(patches: Tensor) -> Tensor:
        changed = blank_patches(pixels, patches, tuple(model.config.vision.patch_size))
        return before - token_log_probabilities(model, _encode(model, changed, mask, text), text, draft_ids)

    generator = torch.Generator().manual_seed(seed)
    draws = [candidates[torch.randperm(len(candidates), generator=generator)[:count]] for _ in range(CONTROLS)]
    controls_RT = torch.stack([drop_without(draw) for draw in draws])
    evidence = []
    for first, last in sentences:
        heat_CP = (looked_TQ[first:last].mean(dim=0) @ patch_weight_QM).unflatten(0, (-1, _patches(model)))
        heat_CP = torch.where(live_CP, heat_CP, 0)
        heat_CP = heat_CP / heat_CP.sum().clamp(min=1e-12)
        drop = float(drop_without(heat_CP.flatten().topk(count).indices)[first:last].mean())
        control = float(controls_RT[:, first:last].mean(dim=1).max())
        evidence.append(SentenceEvidence(*_heat_volume(model, heat_CP, prepared.grid), drop, control))
    return evidence


def patches_with_image(grid: VolumeGrid, patch_grid: tuple[int, int, int], chunks: int) -> Tensor:
    """Which patches (chunks, patches) hold a voxel of the image; the others are padding."""
    inside: list[Tensor] = []
    for count, voxels, size in zip(
        (chunks * patch_grid[0], *patch_grid[1:]), grid.shape, grid.chunk_shape, strict=True
    ):
        patch = size // patch_grid[len(inside)]
        inside.append(torch.arange(count) * patch < voxels)
    together = inside[0][:, None, None] & inside[1][None, :, None] & inside[2][None, None, :]
    return together.reshape(chunks, -1)


def blank_patches(pixels: Tensor, patches: Tensor, patch_size: tuple[int, ...]) -> Tensor:
    """Fill patches, given by flat index over (chunk, patch), with the mean of their channel; pixels (1, C, ch, D, H, W)."""
    _, chunks, _, *size = pixels.shape
    grid = [axis // patch for axis, patch in zip(size, patch_size, strict=True)]
    chosen = torch.zeros(chunks * grid[0] * grid[1] * grid[2], dtype=torch.bool)
    chosen[patches.cpu()] = True
    voxels = chosen.view(chunks, *grid).to(pixels.device)
    for axis, patch in enumerate(patch_size, start=1):
        voxels = voxels.repeat_interleave(patch, dim=axis)
    mean = pixels.mean(dim=(1, 3, 4, 5), keepdim=True)
    return torch.where(voxels[None, :, None], mean, pixels)


def _encode(
    model: Mu2ForConditionalGeneration,
    pixels: Tensor,
    mask: Tensor,
    text: dict[str, Tensor],
    output_maps: bool = False,
) -> Mu2ImageFeatures:
    return model.get_image_features(
        pixels, text["question_ids"], text["question_attention_mask"], mask, output_maps=output_maps
    )


def _full_prompt(text: dict[str, Tensor], draft_ids: Tensor) -> dict[str, Tensor]:
    ids = torch.cat((text["input_ids"], draft_ids[None].to(text["input_ids"].device)), dim=1)
    mask = torch.cat((text["attention_mask"], torch.ones_like(ids[:, text["input_ids"].shape[1] :])), dim=1)
    return {"input_ids": ids, "attention_mask": mask}


def token_log_probabilities(
    model: Mu2ForConditionalGeneration, features: Mu2ImageFeatures, text: dict[str, Tensor], draft_ids: Tensor
) -> Tensor:
    """Log-probability (tokens,) of every token of the draft, given the image and what stands before it."""
    prompt = _full_prompt(text, draft_ids)
    logits = model(**prompt, mm_encoder_outputs={"image": features}, logits_to_keep=len(draft_ids) + 1).logits
    log_probabilities = torch.log_softmax(logits[0, :-1].float(), dim=-1)
    return log_probabilities.gather(1, draft_ids[:, None].to(logits.device)).squeeze(1).cpu()


def _attention_to_image(
    model: Mu2ForConditionalGeneration, features: Mu2ImageFeatures, text: dict[str, Tensor], draft_ids: Tensor
) -> Tensor:
    """Attention (tokens, Q) of the position that wrote each token, mean over heads and layers."""
    prompt = _full_prompt(text, draft_ids)
    queries = model.config.tokenizer.num_query_tokens
    if model.config.image_placement == "second_position":
        columns = torch.arange(1, queries + 1)
    else:
        columns = (prompt["input_ids"][0] == model.config.image_token_id).nonzero().squeeze(1).cpu()
    language_model = model.model.language_model
    kept = language_model.config._attn_implementation
    # The fused kernels never materialise the weights.
    language_model.set_attn_implementation("eager")
    try:
        attentions = model(
            **prompt, mm_encoder_outputs={"image": features}, output_attentions=True, logits_to_keep=1
        ).attentions
    finally:
        language_model.set_attn_implementation(kept)
    start = text["input_ids"].shape[1] - 1
    rows = slice(start, start + len(draft_ids))
    return torch.stack([layer[0, :, rows].float().mean(dim=0).cpu()[:, columns] for layer in attentions]).mean(dim=0)


def _query_to_patches(model: Mu2ForConditionalGeneration, features: Mu2ImageFeatures) -> Tensor:
    """Weight (Q, chunks·patches) with which every query gathers every patch."""
    maps = features.maps
    if maps is None or maps.aggregation is None:
        raise ValueError("evidence needs the maps: encode with output_maps=True")
    aggregation_QV = maps.aggregation[0].float().mean(dim=0).cpu()
    gates, selection_MK = maps.gates[0].float().cpu(), maps.selection[0].float().cpu()
    selected = selection_MK.shape[1]
    over_selected = torch.zeros(aggregation_QV.shape[0], selected)
    start = 0
    for gate, scale in zip(gates, model.config.tokenizer.pooling_scales, strict=True):
        part = aggregation_QV[:, start : start + selected // scale]
        over_selected += gate * part.repeat_interleave(scale, dim=1) / scale
        start += selected // scale
    over_tokens = (over_selected @ selection_MK.T).unflatten(1, (-1, model.config.tokens_per_chunk))
    members = pooled_patches(model.config.projector_grid, model.config.tokenizer.projector_pooling_size)
    over_patches = torch.zeros(*over_tokens.shape[:2], _patches(model))
    over_patches[:, :, members.flatten()] = over_tokens.repeat_interleave(members.shape[1], dim=2) / members.shape[1]
    return over_patches.flatten(1)


def pooled_patches(grid: tuple[int, int, int], size: int) -> Tensor:
    """Which patches (N, size³) each pooled token of the projector is the mean of."""
    depth, height, width = grid
    index = torch.arange(depth * height * width).view(depth // size, size, height // size, size, width // size, size)
    return index.permute(0, 2, 4, 1, 3, 5).reshape(-1, size**3)


def _patches(model: Mu2ForConditionalGeneration) -> int:
    depth, height, width = model.config.vision.patch_grid
    return depth * height * width


def _heat_volume(
    model: Mu2ForConditionalGeneration, heat_CP: Tensor, grid: VolumeGrid
) -> tuple[NDArray[np.float32], Matrix | None]:
    depth, height, width = model.config.vision.patch_grid
    heat = heat_CP.view(-1, depth, height, width).flatten(0, 1).float().numpy()
    if grid.to_ras is None:
        return heat, None
    patch = np.array(model.config.vision.patch_size, dtype=np.float64)
    to_index = np.diag([*patch, 1.0])
    to_index[:3, 3] = (patch - 1) / 2
    return heat, grid.to_ras @ to_index
