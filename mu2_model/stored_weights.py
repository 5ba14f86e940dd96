"""The tensors that a checkpoint's files hold, told from their headers, against those that its config asks for.

Nothing is read or allocated: a config that does not belong to the weights is told before a model of its sizes takes memory.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from mu2_model.configuration_mu2 import Mu2Config
from mu2_model.errors import CheckpointError
from mu2_model.modeling_mu2 import Mu2ForConditionalGeneration

Shape = tuple[int, ...]
# What transformers raises for values of a config that fit no model, wherever it first meets them.
BROKEN_CONFIG = (
    StrictDataclassError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
WEIGHT_TYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
LANGUAGE_MODEL = "model.language_model."


@dataclass(frozen=True)
class StoredTensor:
    """What the header says of a tensor: its shape, and its type by the name that safetensors gives it."""

    shape: Shape
    dtype: str


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's model*.safetensors; CheckpointError when there is no such file or one is damaged."""
    found: dict[str, StoredTensor] = {}
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(f"no model*.safetensors file in the model folder {folder}")
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict: it cannot be iterated)
                    part = opened.get_slice(name)
                    found[name] = StoredTensor(tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            raise CheckpointError(f"{file.name} in {folder} is damaged or cut off, copy it again: {error}") from error
    return found


def skeleton(config: Mu2Config) -> Mu2ForConditionalGeneration:
    """The model of a config without values, on the meta device; CheckpointError when no model has such a config."""
    try:
        with torch.device("meta"):
            return Mu2ForConditionalGeneration(config)
    except BROKEN_CONFIG as error:
        raise CheckpointError(f"no model can be built from config.json: {error}") from error


def check_stored(folder: Path, config: Mu2Config) -> None:
    """CheckpointError that names a tensor when the folder's weights are not those of the config."""
    stored = stored_tensors(folder)
    for name, tensor in stored.items():
        if tensor.dtype not in WEIGHT_TYPES:
            raise CheckpointError(f"{name} in {folder} is of type {tensor.dtype}, not {', '.join(WEIGHT_TYPES)}")
    found = {name: tensor.shape for name, tensor in stored.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton(config).state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")
        found.pop("lm_head.weight", None)
    if _stored_otherwise(found, expected):
        found, expected = ({n: s for n, s in shapes.items() if not _is_text(n)} for shapes in (found, expected))
    try:
        check_names(found, expected)
    except CheckpointError as error:
        raise CheckpointError(f"the weights in {folder} are not those of its config.json: {error}") from error


def check_names(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """CheckpointError that names the first unexpected, missing or mis-shaped tensor."""
    for name in sorted(found.keys() - expected.keys()):
        raise CheckpointError(f"unexpected tensor: {name} {tuple(found[name])}")
    for name in sorted(expected.keys() - found.keys()):
        raise CheckpointError(f"missing tensor: {name} {tuple(expected[name])}")
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise CheckpointError(f"mis-shaped tensor: {name} is {tuple(found[name])}, not {tuple(shape)}")


def _is_text(name: str) -> bool:
    return name.startswith(LANGUAGE_MODEL)


def _stored_otherwise(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> bool:
    """Whether the decoder's values are all there under other names: transformers stores experts apart that it runs as one."""
    texts = [{name: shape for name, shape in shapes.items() if _is_text(name)} for shapes in (found, expected)]
    values = [sum(map(math.prod, shapes.values())) for shapes in texts]
    return texts[0].keys() != texts[1].keys() and values[0] == values[1]
