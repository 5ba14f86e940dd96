"""The files of a published checkpoint: its flat config.json and its tensors, safetensors or pickles, in one file or many.

What a file says that this package does not compute, and a file that cannot be read, is a CheckpointError that names it.
"""

import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mu2_model.errors import CheckpointError

FAMILIES = ("u2llama", "u2qwen3")
SWITCHES = ("use_multi_scale", "enable_diffts", "enable_dmtp")
SIZES = ("u2t_num_heads", "u2t_top_k")
OPTIONAL_SIZES = ("image_channel", "proj_pooling_size", "u2t_num_layers", "num_3d_query_token")
AXES = ("image_size", "patch_size")
# Other values are other computations over tensors of the same names and shapes: nothing else would tell them.
COMPUTED = {
    "vision_tower": "vit3d",
    "vision_select_layer": -1,
    "vision_select_feature": "patch",
    "mm_projector_type": "spp",
    "proj_layer_type": "mlp",
    "proj_layer_num": 2,
    "proj_pooling_type": "spatial",
    "enable_u2tokenizer": True,
}


def read_published_config(folder: Path) -> dict[str, Any]:
    """config.json of a published checkpoint; CheckpointError when it is none, or of a computation that is not ours."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"no config.json in {folder}")
    try:
        published: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    kind = published.get("model_type") if isinstance(published, dict) else None
    if str(kind).lower() not in FAMILIES:
        raise CheckpointError(f"model_type {kind!r} is not one of u2llama, u2Qwen3")
    missing = [key for key in (*AXES, *SIZES, *SWITCHES) if published.get(key) is None]
    if missing:
        raise CheckpointError(f"config.json lacks {', '.join(missing)}")
    if published.get("quantization_config") is not None:
        raise CheckpointError(
            "config.json says quantization_config: only weights that are not quantised can be converted"
        )
    for key, known in COMPUTED.items():
        if published.get(key) not in (None, known):
            raise CheckpointError(f"config.json says {key} {published[key]!r}; only {known!r} can be converted")
    for key in (*SIZES, *(key for key in OPTIONAL_SIZES if published.get(key) is not None)):
        if not _is_size(published[key]):
            raise CheckpointError(f"config.json says {key} {published[key]!r}, which is no count")
    for key in AXES:
        axes = published[key]
        if not (isinstance(axes, list) and len(axes) == 3 and all(map(_is_size, axes))):
            raise CheckpointError(f"config.json says {key} {axes!r}: three lengths are needed")
    return published


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, mapped rather than read; CheckpointError when there are none or one stands in two files."""
    tensors: dict[str, Tensor] = {}
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        for file in sorted(folder.glob(pattern)):
            for name, tensor in read_tensor_file(file):
                if name in tensors:
                    raise CheckpointError(f"tensor {name} of {file.name} stands in another file of {folder}, too")
                tensors[name] = tensor
        if tensors:
            return tensors
    raise CheckpointError(f"no *.safetensors or pytorch_model*.bin in {folder}")


def read_tensor_file(file: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one file; pickles are opened with weights_only=True, so that nothing in them runs."""
    if file.suffix != ".safetensors":
        yield from _read_pickle(file).items()
        return
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict: it cannot be iterated)
                yield name, opened.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"{file.name} is damaged or cut off, fetch it again: {error}") from error


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        # Pickles from before 2020 are no archives and cannot be mapped.
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file.name} is no file of tensors, or holds more than tensors and could run code; it was not opened"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{file.name} is damaged or cut off, fetch it again") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{file.name} holds a {type(loaded).__name__}, not tensors by their names")
    for name, value in loaded.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{file.name} holds {name!r}, which is no name of a tensor")
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{file.name} holds {name!r}, a {type(value).__name__} and no tensor")
    return loaded
