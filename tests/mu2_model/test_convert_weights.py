"""Published checkpoints convert strictly; the key tree is that of the releases by name and shape."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mu2_model.configuration_mu2 import Mu2Config, Mu2VisionConfig
from mu2_model.convert_weights import convert_checkpoint, load_vision_tower, our_name, split_packed
from mu2_model.drafter import ReportDrafter
from mu2_model.errors import CheckpointError
from mu2_model.modeling_mu2 import Mu2ForConditionalGeneration
from mu2_model.processing_mu2 import Mu2Processor
from mu2_model.vision_tower import Mu2VisionTower
from tests.mu2_model.published_reference import Published, write_checkpoint

SMALL = Published(layers=1, vision_layers=1)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return SMALL.tensors()


@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded", "sharded_bin"])
def test_every_file_form_gives_the_same_model(form: str, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_checkpoint(tmp_path / "src", SMALL, tensors, form)
    convert_checkpoint(tmp_path / "src", tmp_path / "dst")
    state = Mu2ForConditionalGeneration.from_pretrained(tmp_path / "dst", dtype="auto").state_dict()
    mapped = {our_name(name): tensor for name, tensor in tensors.items()}
    assert state.keys() == mapped.keys()
    assert all(torch.equal(state[name], mapped[name]) for name in state)


@pytest.mark.parametrize(
    ("attention", "newer", "positions"),
    [("rma", True, "relative"), ("rma", False, "relative"), ("rope", True, "rotary"), ("mha", False, "none")],
)
def test_older_and_newer_configs_name_the_attention_and_the_keys_decide(
    attention: str, newer: bool, positions: str, tmp_path: Path
) -> None:
    published = Published(attention=attention, layers=1, vision_layers=1, extra={"newer": newer})
    write_checkpoint(tmp_path / "src", published, published.tensors())
    config = convert_checkpoint(tmp_path / "src", tmp_path / "dst")
    assert isinstance(config, Mu2Config)
    assert (config.tokenizer.positions, config.tokenizer.attention_over_first_axis) == (positions, attention == "mha")


def broken(change: Callable[[dict[str, Tensor]], None], tmp_path: Path, tensors: dict[str, Tensor]) -> str:
    changed = dict(tensors)
    change(changed)
    write_checkpoint(tmp_path / "src", SMALL, changed)
    with pytest.raises(CheckpointError) as error:
        convert_checkpoint(tmp_path / "src", tmp_path / "dst")
    return str(error.value)


def test_an_unexpected_tensor_is_named(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    message = broken(lambda t: t.update({"model.extra.weight": torch.zeros(2)}), tmp_path, tensors)
    assert message == "unexpected tensor: model.extra.weight (2,)"


def test_a_missing_tensor_is_named(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    message = broken(lambda t: t.__delitem__("model.mm_projector.projector.0.bias"), tmp_path, tensors)
    assert message == "missing tensor: model.projector.fc1.bias (32,)"


def test_a_mis_shaped_tensor_is_named(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    name = "model.u2tokenizer.svt_module.token_selection.score_net.bias"
    message = broken(lambda t: t.update({name: torch.zeros(9)}), tmp_path, tensors)
    assert message == "mis-shaped tensor: model.visual_tokenizer.selection.score.bias is (9,), not (8,)"


def test_a_tied_head_that_differs_from_the_embeddings_is_refused(tmp_path: Path) -> None:
    published = Published(layers=1, vision_layers=1, tied=True)
    tensors = published.tensors()
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    write_checkpoint(tmp_path / "src", published, tensors)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        convert_checkpoint(tmp_path / "src", tmp_path / "dst")


def test_a_shrunk_vocabulary_comes_from_the_tensors(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    shrunk = dict(tensors)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        shrunk[name] = shrunk[name][:30].clone()
    write_checkpoint(tmp_path / "src", SMALL, shrunk)
    config = convert_checkpoint(tmp_path / "src", tmp_path / "dst")
    assert isinstance(config, Mu2Config) and config.vocab_size == 30


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_checkpoint(tmp_path / "src", SMALL, tensors, "bin")
    torch.save({"model.norm.weight": Path}, tmp_path / "src" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="could run code"):
        convert_checkpoint(tmp_path / "src", tmp_path / "dst")


def test_a_folder_without_a_tokenizer_gives_weights_that_no_drafter_takes(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    folder = write_checkpoint(tmp_path / "src", SMALL, tensors)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    convert_checkpoint(folder, tmp_path / "dst")
    assert (
        Mu2ForConditionalGeneration.from_pretrained(tmp_path / "dst").config.tokenizer.num_query_tokens == SMALL.queries
    )
    with pytest.raises(CheckpointError, match="without a tokenizer"):
        ReportDrafter.from_pretrained(tmp_path / "dst")


def test_the_rotary_base_and_scaling_of_the_language_model_come_from_the_config(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    folder = write_checkpoint(tmp_path / "src", SMALL, tensors)
    flat = json.loads((folder / "config.json").read_text())
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    (folder / "config.json").write_text(json.dumps({**flat, "rope_theta": 500000.0, "rope_scaling": scaling}))
    convert_checkpoint(folder, tmp_path / "dst")
    text = Mu2Config.from_pretrained(tmp_path / "dst").get_text_config()
    assert text.rope_parameters == {**scaling, "rope_theta": 500000.0}


def test_a_config_of_another_model_is_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    folder = write_checkpoint(tmp_path / "src", SMALL, tensors)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="not one of u2llama, u2Qwen3"):
        convert_checkpoint(folder, tmp_path / "dst")


def test_the_converted_processor_lays_the_prompt_out_as_published(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_checkpoint(tmp_path / "src", SMALL, tensors)
    convert_checkpoint(tmp_path / "src", tmp_path / "dst", question_padding=12)
    processor = Mu2Processor.from_pretrained(tmp_path / "dst")
    text = processor(questions="w1 w2")
    assert text["input_ids"].tolist() == [[3] * SMALL.queries + [5, 6]]
    assert text["question_ids"].tolist() == [[5, 6] + [0] * 10]


@pytest.mark.parametrize(("attention", "count"), [("rma", 209), ("rope", 197), ("mha", 149)])
def test_the_key_tree_of_a_full_size_tokenizer_has_the_published_names_and_shapes(attention: str, count: int) -> None:
    published = Published(
        attention=attention, layers=4, vision_layers=12, vision_width=768, vision_mlp=3072, heads=8, width=2048,
        selected=1024, queries=256, bias_reach=512,
    )  # fmt: skip
    names = published_shapes(published)
    ours = {"positions": {"rma": "relative", "rope": "rotary", "mha": "first_axis"}[attention]}
    text = {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 1, "vocab_size": 64}
    config = Mu2Config.legacy(text, attention=ours["positions"])  # type: ignore[arg-type]
    with torch.device("meta"):
        expected = {k: tuple(v.shape) for k, v in Mu2ForConditionalGeneration(config).model.state_dict().items()}
    expected = {f"model.{k}": shape for k, shape in expected.items() if not k.startswith("language_model")}
    packed = {name: torch.empty(shape, device="meta") for name, shape in names.items()}
    mapped = {our_name(name): tuple(tensor.shape) for name, tensor in split_packed(packed)}
    assert mapped == expected
    assert sum(name.startswith("model.u2tokenizer.") for name in names) == count
    assert sum(name.startswith("model.vision_tower.") for name in names) == 138


def published_shapes(p: Published) -> dict[str, tuple[int, ...]]:
    """The table of the published layout, written out."""
    width, vision = p.width, p.vision_width
    tower = "model.vision_tower.vision_tower."
    shapes: dict[str, tuple[int, ...]] = {
        f"{tower}cls_token": (1, 1, vision),
        f"{tower}patch_embedding.position_embeddings": (1, 2048, vision),
        f"{tower}patch_embedding.patch_embeddings.1.weight": (vision, 1024),
        f"{tower}patch_embedding.patch_embeddings.1.bias": (vision,),
        "model.u2tokenizer.query_tokens": (1, p.queries, width),
        "model.u2tokenizer.svt_module.token_selection.score_net.weight": (p.selected, width),
        "model.u2tokenizer.svt_module.token_selection.score_net.bias": (p.selected,),
        "model.u2tokenizer.svt_module.dynamic_pool.gate_fc.weight": (1, width),
        "model.u2tokenizer.svt_module.dynamic_pool.gate_fc.bias": (1,),
    }

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    def norm(name: str, size: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)

    def attention(name: str, kind: str) -> None:
        if kind == "mha":
            shapes[f"{name}.in_proj_weight"], shapes[f"{name}.in_proj_bias"] = (3 * width, width), (3 * width,)
            linear(f"{name}.out_proj", width, width)
            return
        for part in ("wq", "wk", "wv", "dense"):
            linear(f"{name}.{part}", width, width)
        if kind == "rma":
            shapes[f"{name}.relative_bias"] = (1023, 8)

    norm(f"{tower}norm", vision)
    for index in range(p.vision_layers):
        block = f"{tower}blocks.{index}."
        norm(f"{block}norm1", vision)
        norm(f"{block}norm2", vision)
        linear(f"{block}attn.qkv", 3 * vision, vision, bias=False)
        linear(f"{block}attn.out_proj", vision, vision)
        linear(f"{block}mlp.linear1", p.vision_mlp, vision)
        linear(f"{block}mlp.linear2", vision, p.vision_mlp)
    linear("model.mm_projector.projector.0", width, vision)
    linear("model.mm_projector.projector.2", width, width)
    for index in range(p.layers):
        refiner = f"model.u2tokenizer.svt_module.attention_network.layers.{index}."
        attention(f"{refiner}spatial_attention", p.attention)
        attention(f"{refiner}temporal_attention", p.attention)
        layer = f"model.u2tokenizer.tta_module.layers_vt.{index}."
        attention(f"{layer}self_attention", p.attention)
        attention(f"{layer}visual_cross_attention", "cross")
        attention(f"{layer}text_cross_attention", "cross")
        for name in ("norm_cross_v", "norm_cross_t", "norm_self"):
            norm(f"{layer}{name}", width)
    attention("model.u2tokenizer.tta_module.layer_linagg.linear_aggregator", "cross")
    return shapes


def vision_file(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """`pretrained_ViT.bin` as published by M3D-CLIP, at 64 wide and 12 blocks: 138 keys."""
    generator = torch.Generator().manual_seed(3)
    full = published_shapes(Published(vision_width=64, vision_mlp=128, vision_layers=12))
    prefix = "model.vision_tower.vision_tower."
    state = {
        name.removeprefix(prefix): torch.randn(shape, generator=generator) * 0.05
        for name, shape in full.items()
        if name.startswith(prefix)
    }
    torch.save(state, folder / "pretrained_ViT.bin")
    return folder / "pretrained_ViT.bin", state


def test_a_vision_tower_alone_loads_strictly_from_138_keys(tmp_path: Path) -> None:
    file, state = vision_file(tmp_path)
    config = convert_checkpoint(file, tmp_path / "dst")
    assert len(state) == 138 and isinstance(config, Mu2VisionConfig)
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (64, 12, 128)
    torch.save({**state, "blocks.0.cross_attn.weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"unexpected tensor: blocks\.0\.cross_attn\.weight"):
        convert_checkpoint(file, tmp_path / "other")


def test_one_channel_weights_see_three_equal_channels_as_one(tmp_path: Path) -> None:
    file, _ = vision_file(tmp_path)
    sizes = {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 128}
    one = Mu2VisionTower(Mu2VisionConfig(num_channels=1, **sizes))
    three = Mu2VisionTower(Mu2VisionConfig(num_channels=3, **sizes))
    load_vision_tower(one, file)
    load_vision_tower(three, file)
    chunk = torch.rand(1, 1, 32, 256, 256)
    with torch.no_grad():
        embedded = [tower.patch_embedding(chunk.expand(1, tower.num_channels, -1, -1, -1)) for tower in (one, three)]
    assert torch.allclose(embedded[0], embedded[1], atol=1e-5)
