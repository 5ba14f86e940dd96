"""What a checkpoint folder holds, without loading its weights: config, parameters by part, hash, memory for a batch."""

from pathlib import Path
from typing import Any

import torch

from mu2_model.checkpoint_folder import hash_weights, read_config
from mu2_model.configuration_mu2 import Mu2Config
from mu2_model.drafting_stages import DEFAULT_NEW_TOKENS
from mu2_model.errors import CheckpointError
from mu2_model.image_processing_mu2 import Mu2ImageProcessor
from mu2_model.memory import estimate_memory, free_memory
from mu2_model.stored_weights import BROKEN_CONFIG, check_stored, skeleton

# Room for a question in its chat template.
QUESTION_TOKENS = 256
BYTES_PER_VALUE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def model_info(path: Path | str, batch: int = 1, dtype: str | None = None) -> dict[str, Any]:
    """Facts about a checkpoint, ready for JSON; memory is estimated for `batch` of the longest volumes that its processor makes.

    `dtype` is the type the weights would be loaded in; by default that of the file. The estimate's chunks, prompt and draft
    tokens stand beside it. Raises CheckpointError when the folder
    is not a checkpoint of this package, or its weights are not those of its config.
    """
    folder = Path(path)
    config = read_config(folder)
    check_stored(folder, config)
    parameters = count_parameters(config)
    stored = str(config.dtype or "float32").removeprefix("torch.")
    if (dtype or stored) not in BYTES_PER_VALUE:
        raise CheckpointError(f"weights of type {dtype or stored} are not known: {', '.join(BYTES_PER_VALUE)}")
    value_bytes = BYTES_PER_VALUE[dtype or stored]
    sizes = {
        "chunks": longest_chunks(folder),
        "prompt_tokens": config.tokenizer.num_query_tokens + QUESTION_TOKENS,
        "new_tokens": DEFAULT_NEW_TOKENS,
    }
    estimate, explained = (
        estimate_memory(
            config, parameters["total"], batch=batch, bytes_per_value=value_bytes, evidence=evidence, **sizes
        )
        for evidence in (False, True)
    )
    return {
        "model_name": config.model_name,
        "model_version": config.model_version,
        "preset": config.preset,
        "trained_on": config.trained_on,
        "weights_sha256": hash_weights(folder),
        "stored_dtype": stored,
        "parameters": parameters,
        "memory_bytes": {
            "dtype": dtype or stored,
            "batch": batch,
            **sizes,
            "weights": estimate.weights,
            "peak": estimate.total,
            "peak_with_evidence": explained.total,
            "free": free_by_device(),
        },
        "chunk": list(config.vision.image_size),
        "positions": config.tokenizer.positions,
        "selection": config.tokenizer.selection,
        "gated_pooling": config.tokenizer.gated_pooling,
        "image_tokens": config.tokenizer.num_query_tokens,
        "language_model": config.get_text_config().model_type,
    }


def longest_chunks(folder: Path) -> int:
    """Chunks of the longest volume that the folder's processor makes; CheckpointError when that cannot be read."""
    try:
        image = Mu2ImageProcessor.from_pretrained(folder)
        return max(image.max_slices // image.chunk_slices, 1)
    except (OSError, *BROKEN_CONFIG) as error:
        raise CheckpointError(f"the processor's config in {folder} cannot be read: {error}") from error


def free_by_device() -> dict[str, int]:
    """Bytes that are free now in the host's memory and on every GPU; without those that cannot be known."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    free = {name: free_memory(torch.device(name)) for name in devices}
    return {name: count for name, count in free.items() if count is not None}


def count_parameters(config: Mu2Config) -> dict[str, int]:
    """Parameters of every part and in all, counted on the meta device; tied weights count once."""
    model = skeleton(config)
    parts = {
        "vision_tower": model.model.vision_tower,
        "projector": model.model.projector,
        "visual_tokenizer": model.model.visual_tokenizer,
        "language_model": model.model.language_model,
    }
    counts = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}
    counts["head"] = 0 if config.tie_word_embeddings else model.lm_head.weight.numel()
    return {**counts, "total": sum(counts.values())}
