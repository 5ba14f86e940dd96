"""What a checkpoint folder holds, without loading its weights: config, parameters by part, hash, memory for a batch."""

import json
from pathlib import Path
from typing import Any

import torch

from mu2_model.configuration_mu2 import Mu2Config
from mu2_model.drafter import hash_weights
from mu2_model.errors import CheckpointError
from mu2_model.memory import estimate_memory
from mu2_model.modeling_mu2 import Mu2ForConditionalGeneration

BYTES_PER_VALUE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def model_info(path: Path | str, batch: int = 1, dtype: str | None = None) -> dict[str, Any]:
    """Facts about a checkpoint, ready for JSON; memory is estimated for `batch` volumes of full length.

    `dtype` is the type the weights would be loaded in; by default that of the file. Raises CheckpointError when the folder
    is not a checkpoint of this package.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"no config.json in the model folder {folder}")
    model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    if model_type != Mu2Config.model_type:
        raise CheckpointError(f"{folder} holds a {model_type!r} model, not a μ²LLM; convert published weights first")
    config = Mu2Config.from_pretrained(folder)
    parameters = count_parameters(config)
    stored = str(config.dtype or "float32").removeprefix("torch.")
    value_bytes = BYTES_PER_VALUE[dtype or stored]
    estimate = estimate_memory(config, parameters["total"], batch=batch, bytes_per_value=value_bytes)
    return {
        "model_name": config.model_name,
        "model_version": config.model_version,
        "preset": config.preset,
        "trained_on": config.trained_on,
        "weights_sha256": hash_weights(folder),
        "dtype": dtype or stored,
        "parameters": parameters,
        "memory_bytes": {"batch": batch, "weights": estimate.weights, "peak": estimate.total},
        "chunk": list(config.vision.image_size),
        "positions": config.tokenizer.positions,
        "selection": config.tokenizer.selection,
        "gated_pooling": config.tokenizer.gated_pooling,
        "image_tokens": config.tokenizer.num_query_tokens,
        "language_model": config.get_text_config().model_type,
    }


def count_parameters(config: Mu2Config) -> dict[str, int]:
    """Parameters of every part and in all, counted on the meta device; tied weights count once."""
    with torch.device("meta"):
        model = Mu2ForConditionalGeneration(config)
    parts = {
        "vision_tower": model.model.vision_tower,
        "projector": model.model.projector,
        "visual_tokenizer": model.model.visual_tokenizer,
        "language_model": model.model.language_model,
    }
    counts = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}
    counts["head"] = 0 if config.tie_word_embeddings else model.lm_head.weight.numel()
    return {**counts, "total": sum(counts.values())}
