"""What a checkpoint folder must hold before its weights are read: a config of ours, a processor that fits it, a known hash."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from mu2_model.configuration_mu2 import Mu2Config
from mu2_model.errors import CheckpointError
from mu2_model.processing_mu2 import Mu2Processor
from mu2_model.stored_weights import BROKEN_CONFIG

HASH_BLOCK_BYTES = 1 << 20


def read_config(folder: Path) -> Mu2Config:
    """The config of a checkpoint folder; CheckpointError when there is none, it is broken or another model's."""
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"no config.json in the model folder {folder}")
    try:
        stored: Any = json.loads(file.read_text())
        model_type = stored.get("model_type") if isinstance(stored, dict) else None
        if model_type != Mu2Config.model_type:
            raise CheckpointError(
                f"{folder} holds a {model_type!r} model, not a μ²LLM; convert published weights first"
            )
        text = stored.get("text_config")
        if not isinstance(text, dict) or "model_type" not in text:
            # transformers would make a Llama of 7 billion parameters of it.
            raise CheckpointError(f"{file} does not say which language model it has: text_config is missing")
        config: Mu2Config = Mu2Config.from_pretrained(folder)
    except CheckpointError:
        raise
    except (OSError, *BROKEN_CONFIG) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    return config


def read_processor(folder: Path, config: Mu2Config) -> Mu2Processor:
    """The processor of a checkpoint folder; CheckpointError when there is none or it makes other input than the model takes."""
    if not (folder / "processor_config.json").is_file():
        raise CheckpointError(f"no processor_config.json in {folder}: the checkpoint came without a tokenizer")
    try:
        processor: Mu2Processor = Mu2Processor.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the tokenizer or processor_config.json in {folder} cannot be read: {error}") from error
    image = processor.image_processor
    pairs: dict[str, tuple[Any, Any]] = {
        "visual tokens": (processor.num_image_tokens, config.tokenizer.num_query_tokens),
        "channels": (image.num_channels, config.vision.num_channels),
        "voxels of a chunk": ([image.chunk_slices, image.size, image.size], list(config.vision.image_size)),
        "placeholder": (processor.image_token_id, config.image_token_id),
    }
    for what, (made, taken) in pairs.items():
        if made != taken:
            raise CheckpointError(f"{what}: the processor in {folder} makes {made}, but the model takes {taken}")
    return processor


def value_bytes(dtype: torch.dtype | str) -> int | None:
    """Bytes of a loaded weight; None for "auto", as it is stored. Raises CheckpointError for what is no such type."""
    if dtype == "auto":
        return None
    known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(known, torch.dtype) or not known.is_floating_point or known.itemsize < 2:
        raise CheckpointError(f"weights cannot be loaded as {dtype!r}: 'auto', 'float32', 'bfloat16' or 'float16'")
    return known.itemsize


def hash_weights(folder: Path) -> str:
    """SHA-256 of the folder's weights; CheckpointError when it holds none."""
    digests = []
    for file in sorted(folder.glob("model*.safetensors")):
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(HASH_BLOCK_BYTES):
                digest.update(block)
        digests.append(digest)
    if not digests:
        raise CheckpointError(f"no model*.safetensors file in the model folder {folder}")
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()
