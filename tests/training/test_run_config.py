import json
import shutil
from pathlib import Path

import pytest
import typer
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from peft import get_peft_model
from transformers import Qwen3Config
from typer.testing import CliRunner

from mu2_model import Mu2Config, Mu2ForConditionalGeneration
from training import commands
from training.run_config import (
    CONFIG_FOLDER,
    GIB,
    ConfigError,
    adapter_parameters,
    arguments_to_check,
    estimate_memory,
    load_config,
    parameter_counts,
    trainer_arguments,
)
from training.sft import FROZEN, LoraSettings

SHIPPED = sorted(file.stem for file in CONFIG_FOLDER.glob("*.yaml"))


@pytest.fixture(scope="module")
def published() -> Mu2Config:
    text = Qwen3Config(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    return Mu2Config(text_config=text)


def test_there_is_a_config_for_every_kind_of_machine() -> None:
    assert SHIPPED == ["a100x4_fsdp2", "a100x4_zero2", "cpu", "cpu_bf16", "gpu", "slurm_fsdp2"]
    assert (CONFIG_FOLDER / "slurm.sbatch").is_file()


@pytest.mark.parametrize("name", SHIPPED)
def test_accelerate_reads_the_launch_part(name: str, tmp_path: Path) -> None:
    file = tmp_path / "launch.yaml"
    file.write_text(yaml.safe_dump(load_config(name).launch))
    read = load_config_from_file(str(file))
    assert read.num_processes == load_config(name).processes


@pytest.mark.parametrize("stage", ["sft-align", "sft", "dpo"])
def test_trl_takes_the_training_part(stage: str, tmp_path: Path) -> None:
    arguments = trainer_arguments(stage, load_config("cpu"), tmp_path)
    expected = {"sft-align": 1e-4, "sft": 1e-5, "dpo": 1e-6}[stage]
    assert arguments.learning_rate == expected
    assert arguments.remove_unused_columns is False
    if stage == "dpo":
        assert arguments.beta == 0.1


def test_options_stand_above_the_file_and_the_file_above_defaults(tmp_path: Path) -> None:
    arguments = trainer_arguments("sft", load_config("cpu"), tmp_path, max_length=99, learning_rate=None)
    assert (arguments.max_length, arguments.learning_rate) == (99, 1e-5)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("trainning: {}", "unknown sections"),
        ("training: [1]", "not a mapping"),
        ("training: {learning_rat: 1}", "learning_rat"),
    ],
)
def test_a_wrong_key_is_named(content: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=said):
        trainer_arguments("sft", load_config(str(file)), tmp_path)


def test_an_unknown_config_lists_those_that_ship() -> None:
    with pytest.raises(ConfigError, match="a100x4_fsdp2"):
        load_config("a200")


def test_parameters_are_counted_without_making_a_weight(world: Path, published: Mu2Config) -> None:
    model = Mu2ForConditionalGeneration.from_pretrained(world / "init")
    total, learning = parameter_counts(model.config, FROZEN["sft-align"])
    assert total == sum(p.numel() for p in model.parameters())
    assert learning == sum(
        p.numel() for part in ("projector", "visual_tokenizer") for p in model.model.get_submodule(part).parameters()
    )
    assert 2.0e9 < parameter_counts(published, ())[0] < 2.3e9


def estimate(name: str, stage: str, config: Mu2Config, out: Path) -> float:
    run = load_config(name)
    arguments = arguments_to_check(stage, run, out)
    return estimate_memory(config, run, arguments, FROZEN[stage]).total / GIB


def test_full_training_of_the_published_size_fits_four_gpus_and_not_one(published: Mu2Config, tmp_path: Path) -> None:
    alone = estimate("gpu", "sft", published, tmp_path)
    spread = estimate("a100x4_fsdp2", "sft", published, tmp_path)
    zero2 = estimate("a100x4_zero2", "sft", published, tmp_path)
    assert alone > 32
    assert spread < zero2 < 80


@pytest.mark.parametrize("stage", ["sft-align", "sft", "dpo"])
@pytest.mark.parametrize("name", ["gpu", "a100x4_fsdp2", "a100x4_zero2", "slurm_fsdp2"])
def test_check_answers_on_a_machine_without_a_gpu(name: str, stage: str, world: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    commands.mount(app)
    data = ["--pairs", "pairs.jsonl"] if stage == "dpo" else ["--data", str(world)]
    options = ["--model", str(world / "init"), *data, "--out", str(tmp_path / "out"), "--config", name]
    result = CliRunner().invoke(app, [stage, *options, "--check"])
    assert result.exit_code == 0, result.output
    assert "bf16 True" in result.output
    assert "memory per device" in result.output
    assert "fits into" in result.output
    assert not (tmp_path / "out").exists()


def test_frozen_parts_need_neither_gradients_nor_moments(published: Mu2Config, tmp_path: Path) -> None:
    everything = estimate("gpu", "sft", published, tmp_path)
    align = estimate("gpu", "sft-align", published, tmp_path)
    assert align < everything - 15


def test_adapters_on_one_gpu_fit_where_the_whole_model_does_not(published: Mu2Config, tmp_path: Path) -> None:
    run = load_config("gpu")
    arguments = arguments_to_check("sft", run, tmp_path)
    adapted = estimate_memory(published, run, arguments, lora_rank=16).total
    assert adapted < 24 * GIB < estimate_memory(published, run, arguments).total


def test_with_adapters_dpo_needs_no_second_model(world: Path, tmp_path: Path) -> None:
    config, run = Mu2Config.from_pretrained(world / "init"), load_config("gpu")
    arguments = arguments_to_check("dpo", run, tmp_path)
    assert estimate_memory(config, run, arguments, lora_rank=4).reference == 0
    assert estimate_memory(config, run, arguments).reference > 0


def test_adapters_are_counted_as_peft_makes_them(world: Path) -> None:
    model = Mu2ForConditionalGeneration.from_pretrained(world / "init")
    adapted = get_peft_model(model, LoraSettings(4, 8).config())
    made = sum(p.numel() for name, p in adapted.named_parameters() if ".lora_" in name)
    assert adapter_parameters(model.config, 4) == made > 0


def test_a_large_vocabulary_costs_memory(world: Path, tmp_path: Path) -> None:
    small, large = (Mu2Config.from_pretrained(world / "init") for _ in range(2))
    large.text_config.vocab_size = 10_000
    arguments = arguments_to_check("sft", load_config("gpu"), tmp_path)
    more, less = (estimate_memory(c, load_config("gpu"), arguments).activations for c in (large, small))
    assert more - less == 8 * 1536 * (10_000 - small.text_config.vocab_size)


def test_activations_follow_the_longest_volume_of_the_checkpoint(published: Mu2Config, tmp_path: Path) -> None:
    run = load_config("gpu")
    arguments = arguments_to_check("sft", run, tmp_path)

    def activations(max_slices: int, frozen: tuple[str, ...] = ()) -> int:
        return estimate_memory(published, run, arguments, frozen, max_slices=max_slices).activations

    short, middle, long = (activations(slices) for slices in (64, 128, 256))
    assert long - middle == 2 * (middle - short) > 0
    assert activations(256, ("vision_tower",)) < activations(256)


def test_check_reads_the_longest_volume_from_the_checkpoints_own_processor(world: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    commands.mount(app)

    def told(max_slices: int) -> str:
        folder = tmp_path / str(max_slices)
        shutil.copytree(world / "init", folder)
        settings = json.loads((folder / "processor_config.json").read_text())
        settings["image_processor"]["max_slices"] = max_slices
        (folder / "processor_config.json").write_text(json.dumps(settings))
        options = ["--model", str(folder), "--data", str(world), "--out", str(tmp_path / "out"), "--check"]
        return str(CliRunner().invoke(app, ["sft", *options]).output)

    assert "memory per device" in told(32)
    assert told(64) != told(3200)


def test_dpo_holds_a_reference_too(published: Mu2Config, tmp_path: Path) -> None:
    assert estimate("gpu", "dpo", published, tmp_path) > estimate("gpu", "sft", published, tmp_path)
