"""A new μ²LLM around a pretrained language model, ready to be trained.

The language model keeps its weights and its tokenizer gains the image placeholder; the vision tower can start from a published
`pretrained_ViT.bin`; projector and visual tokenizer start from `_init_weights`.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mu2_model.configuration_mu2 import Mu2Config, Mu2TokenizerConfig, Mu2VisionConfig
from mu2_model.convert_weights import load_vision_tower
from mu2_model.errors import CheckpointError
from mu2_model.image_processing_mu2 import Mu2ImageProcessor
from mu2_model.modeling_mu2 import Mu2ForConditionalGeneration
from mu2_model.processing_mu2 import IMAGE_TOKEN, Mu2Processor


def assemble(
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vision_config: Mu2VisionConfig | dict[str, Any] | None = None,
    tokenizer_config: Mu2TokenizerConfig | dict[str, Any] | None = None,
    vision_weights: Path | str | None = None,
    slice_mm: float = 3.0,
    max_chunks: int = 8,
    seed: int = 0,
) -> tuple[Mu2ForConditionalGeneration, Mu2Processor]:
    """Build model and processor; `language_model` is a causal LM and is taken over, not copied.

    Raises CheckpointError when its head has a bias or is no linear map over its vocabulary, which this package does not know.
    """
    head = language_model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise CheckpointError(f"{type(language_model).__name__} has no plain linear head")
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    embeddings: Any = language_model.get_input_embeddings()
    if len(tokenizer) > embeddings.num_embeddings:
        language_model.resize_token_embeddings(len(tokenizer))
    image_token: Any = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config = Mu2Config(
        vision_config=vision_config,
        tokenizer_config=tokenizer_config,
        text_config=language_model.config,
        image_token_id=int(image_token),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Mu2ForConditionalGeneration(config)
    nn.Module.to(model, language_model.dtype)
    model.model.language_model = language_model.base_model
    model.lm_head.weight = language_model.get_output_embeddings().weight
    if language_model.generation_config is not None:
        model.generation_config = language_model.generation_config
    if vision_weights is not None:
        load_vision_tower(model.model.vision_tower, vision_weights)
    depth, size, _ = config.vision.image_size
    processor = Mu2Processor(
        Mu2ImageProcessor(size=size, chunk_slices=depth, max_slices=max_chunks * depth, slice_mm=slice_mm),
        tokenizer,
        num_image_tokens=config.tokenizer.num_query_tokens,
        max_prompt_tokens=min(2048, getattr(config.get_text_config(), "max_position_embeddings", 2048)),
    )
    return model, processor
