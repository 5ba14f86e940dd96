"""Published files that are damaged, hostile or of another computation are refused by name, and nothing is overwritten."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mu2_model.configuration_mu2 import Mu2Config
from mu2_model.convert_weights import convert_checkpoint, convert_vision_tower
from mu2_model.errors import CheckpointError
from mu2_model.published_files import read_tensor_file
from tests.mu2_model.published_reference import Published, write_checkpoint
from tests.mu2_model.test_convert_weights import vision_file

SMALL = Published(layers=1, vision_layers=1)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return SMALL.tensors()


class Marker:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.place,)


def refusal(folder: Path, dst: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        convert_checkpoint(folder, dst)
    assert not dst.exists()
    return str(error.value)


def set_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_pickle_from_before_archives_is_read(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_checkpoint(tmp_path / "src", SMALL, tensors, "bin")
    torch.save(tensors, tmp_path / "src" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert isinstance(convert_checkpoint(tmp_path / "src", tmp_path / "dst"), Mu2Config)


@pytest.mark.parametrize("archive", [True, False])
def test_nothing_in_a_pickle_runs(archive: bool, tmp_path: Path) -> None:
    file, mark = tmp_path / "pytorch_model.bin", tmp_path / "it ran"
    if archive:
        torch.save({"a": Marker(mark)}, file)
    else:
        file.write_bytes(pickle.dumps(Marker(mark)))
    with pytest.raises(CheckpointError, match="could run code"):
        dict(read_tensor_file(file))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_file_that_is_cut_off_is_named(name: str, kept: float, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    folder = write_checkpoint(tmp_path / "src", SMALL, tensors, "safetensors" if "safe" in name else "bin")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(kept * len(content))])
    assert f"{name} is damaged or cut off" in refusal(folder, tmp_path / "dst")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "holds a list"),
        ({"state_dict": {}}, "holds 'state_dict', a dict"),
        ({"step": 3}, "holds 'step', a int"),
        ({7: torch.zeros(2)}, "holds 7, which is no name"),
    ],
)
def test_a_pickle_of_something_else_says_what_it_holds(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "pretrained_ViT.bin")
    with pytest.raises(CheckpointError, match=message):
        convert_vision_tower(tmp_path / "pretrained_ViT.bin", tmp_path / "dst")


def test_a_tensor_in_two_files_is_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    folder = write_checkpoint(tmp_path / "src", SMALL, tensors, "sharded")
    save_file({"model.norm.weight": torch.ones(32)}, folder / "model-00003-of-00003.safetensors")
    assert "model.norm.weight of model-00003-of-00003.safetensors" in refusal(folder, tmp_path / "dst")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("proj_pooling_type", "sequence", "proj_pooling_type 'sequence'; only 'spatial' can be converted"),
        ("vision_select_layer", -2, "vision_select_layer -2; only -1 can be converted"),
        ("vision_select_feature", "cls_patch", "vision_select_feature 'cls_patch'; only 'patch' can be converted"),
        ("vision_tower", "other", "vision_tower 'other'; only 'vit3d' can be converted"),
        ("enable_u2tokenizer", False, "enable_u2tokenizer False; only True can be converted"),
        ("image_size", [8, 16], "image_size [8, 16]: three lengths are needed"),
        ("image_size", 16, "image_size 16: three lengths are needed"),
        ("patch_size", [3, 4, 4], "image_size [8, 16, 16] is not a multiple of patch_size [3, 4, 4]"),
        ("u2t_num_heads", 0, "u2t_num_heads 0, which is no count"),
        ("u2t_num_heads", 3, "width 32 is not a multiple of 3 tokenizer heads"),
        ("proj_pooling_size", 3, "projector grid [4, 4, 4] is not a multiple of pooling size 3"),
        ("enable_dmtp", None, "config.json lacks enable_dmtp"),
        ("quantization_config", {"bits": 4}, "only weights that are not quantised"),
        ("num_hidden_layers", "two", "num_hidden_layers"),
        ("rms_norm_eps", None, "rms_norm_eps"),
        ("num_attention_heads", 7, "attention heads (7)"),
        ("num_attention_heads", 0, "config.json"),
        ("rope_scaling", [1], "config.json"),
        ("rope_scaling", {"rope_type": "weird"}, "weird"),
        ("rope_theta", "big", "config.json"),
        ("hidden_act", "foo", "foo"),
    ],
)
def test_a_config_of_another_computation_or_that_fits_nothing_is_refused_with_what_does_not_fit(
    key: str, value: object, told: str, tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    folder = write_checkpoint(tmp_path / "src", SMALL, tensors)
    set_config(folder, **{key: value})
    assert told in refusal(folder, tmp_path / "dst")


@pytest.mark.parametrize("content", ["{", "[]", '"u2llama"'])
def test_a_config_that_is_no_config_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"is not JSON|model_type None"):
        convert_checkpoint(tmp_path, tmp_path / "dst")


@pytest.mark.parametrize(("key", "missing"), [("u2t_num_layers", "layers.1"), ("num_3d_query_token", "query_tokens")])
def test_a_count_that_the_config_states_is_demanded_of_the_tensors(
    key: str, missing: str, tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    folder = write_checkpoint(tmp_path / "src", SMALL, tensors)
    set_config(folder, **{key: 1 + {"u2t_num_layers": SMALL.layers, "num_3d_query_token": SMALL.queries}[key]})
    assert missing in refusal(folder, tmp_path / "dst")


def test_a_tensor_without_its_axes_is_named(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    changed = {**tensors, "model.embed_tokens.weight": torch.tensor(1.0)}
    folder = write_checkpoint(tmp_path / "src", SMALL, changed)
    assert "embed_tokens.weight is (), 2 axes" in refusal(folder, tmp_path / "dst")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
def test_a_tensor_of_another_type_than_weights_is_named(
    dtype: torch.dtype, tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    changed = {**tensors, "model.norm.weight": tensors["model.norm.weight"].to(dtype)}
    folder = write_checkpoint(tmp_path / "src", SMALL, changed)
    assert f"model.language_model.norm.weight holds values of type {dtype}" in refusal(folder, tmp_path / "dst")


@pytest.mark.parametrize("padding", [0, -5])
def test_questions_are_not_padded_to_nothing(padding: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"padded to {padding} tokens"):
        convert_checkpoint(tmp_path, tmp_path / "dst", padding)


@pytest.mark.parametrize("alone", [False, True])
def test_a_folder_that_cannot_be_made_is_named(alone: bool, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    (tmp_path / "file").touch()
    source = write_checkpoint(tmp_path / "src", SMALL, tensors)
    if alone:
        source, _ = vision_file(tmp_path)
    assert f"{tmp_path / 'file' / 'dst'} cannot be written" in refusal(source, tmp_path / "file" / "dst")


def test_a_placeholder_beyond_the_embeddings_is_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    shrunk = dict(tensors)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        shrunk[name] = shrunk[name][:3].clone()
    folder = write_checkpoint(tmp_path / "src", SMALL, shrunk)
    assert "belongs to another vocabulary" in refusal(folder, tmp_path / "dst")


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_a_broken_file_beside_the_weights_is_named(name: str, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    folder = write_checkpoint(tmp_path / "src", SMALL, tensors)
    (folder / name).write_text("{")
    assert name.split(".")[0] in refusal(folder, tmp_path / "dst")


def test_published_weights_are_not_overwritten(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    folder = write_checkpoint(tmp_path / "src", SMALL, tensors)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(CheckpointError, match="is not empty"):
        convert_checkpoint(folder, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
