"""One encoding for every volume of a batch, however many prompts ask about it, and training on stored tower tokens.

A preference pair is one volume, one question and two answers; an SFT batch may hold several questions about one volume. The
collators name the unique volumes and questions and which row uses which. A hook on the inner model turns that into the
encoded images that its `forward` already takes, so TRL's stock trainers, PEFT, DDP and FSDP run unchanged.

Keys beyond the model's own: `question_volumes` (U,) the volume of each unique question, `prompt_questions` (B,) the question of
each prompt, and instead of `pixel_values` optionally `tower_tokens` (V, C, N, W), pooled outputs of a frozen vision tower.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from mu2_model import Mu2ForConditionalGeneration, Mu2Model
from mu2_model.modeling_mu2 import Mu2ImageFeatures


class SharedEncoding:
    """The hook, and the figures of the last batch that training plots: entropy, temperature, gates."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, module: Mu2Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        """Replace volumes and indices by encoded images; calls without `prompt_questions` pass unchanged."""
        if "prompt_questions" not in kwargs:
            return args, kwargs
        prompt_questions = kwargs.pop("prompt_questions")
        features = encode_shared(module, kwargs)
        self._watch(module, features)
        pooled: Any = features.pooler_output
        tokens = pooled[prompt_questions]
        kwargs["mm_encoder_outputs"] = {"image": Mu2ImageFeatures(pooler_output=tokens)}
        return args, kwargs

    def _watch(self, module: Mu2Model, features: Mu2ImageFeatures) -> None:
        if features.selection_entropy is None or features.gate_weights is None:
            return
        temperature = torch.as_tensor(module.visual_tokenizer.selection.temperature()).detach()
        # `.item()` would wait for the device in every step; tensors are read when they are logged.
        self._last = (features.selection_entropy.detach(), features.gate_weights.mean(dim=0), temperature)

    def figures(self) -> dict[str, float]:
        """Selection entropy (1 is uniform), selection temperature and the mean weight of every pooling scale."""
        if self._last is None:
            return {}
        entropy, gates, temperature = self._last
        figures = {"dts/entropy": float(entropy), "dts/temperature": float(temperature)}
        return {**figures, **{f"dmtp/gate_{scale}": float(weight) for scale, weight in enumerate(gates)}}


def encode_shared(module: Mu2Model, inputs: dict[str, Any]) -> Mu2ImageFeatures:
    """Encode the unique volumes once and gather each under its questions; takes its keys out of `inputs`."""
    chunk_mask = inputs.pop("chunk_mask", None)
    question_ids, question_mask = inputs.pop("question_ids"), inputs.pop("question_attention_mask", None)
    volume_of = inputs.pop("question_volumes")
    stored = inputs.pop("tower_tokens", None)
    if stored is not None:
        tokens = module.projector.project(stored.to(module.projector.fc1.weight.dtype))
    else:
        tokens = module.encode_chunks(inputs.pop("pixel_values"), chunk_mask)
    mask = None if chunk_mask is None else chunk_mask[volume_of]
    return module.gather_tokens(tokens[volume_of], question_ids, question_mask, mask)


def share_encoding(model: Mu2ForConditionalGeneration) -> tuple[SharedEncoding, RemovableHandle]:
    """Install the hook on a model; the handle takes it off again."""
    hook = SharedEncoding()
    return hook, model.model.register_forward_pre_hook(hook, with_kwargs=True)


def freeze(model: Mu2ForConditionalGeneration, parts: tuple[str, ...]) -> int:
    """Keep parts of the inner model ("vision_tower", "language_model", ...) from learning; returns what still learns."""
    for part in parts:
        model.model.get_submodule(part).requires_grad_(False)
    if "language_model" in parts:
        model.lm_head.requires_grad_(False)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@torch.no_grad()
def tower_tokens(model: Mu2ForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Pooled tower outputs (C, N, W) of one volume's chunks (C, channels, D, H, W): what the token cache stores."""
    inner = model.model
    return inner.projector.pool(inner.vision_tower(pixels.to(inner.vision_tower.position_embedding.dtype)))
