"""Chains of stages at the smallest size: what is done is kept, what is compared shares its tower."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from rich.progress import Progress
from safetensors.torch import load_file

from mu2_model import Mu2ForConditionalGeneration
from training import ablate, pipeline
from training.data import Case, read_manifest
from training.dense_data import DenseData
from training.metrics.findings import Stated
from training.phantoms.generate import Split
from training.readout import read_out, readout_command
from training.vision import (
    VisionSettings,
    VisionTraining,
    finding_loss,
    score_cells,
    train_vision,
)
from training.volumes import VolumeCache

SETTINGS = VisionSettings(steps=6, batch_size=4, learning_rate=3e-3, score_every=6, save_every=3)


@pytest.fixture(scope="module")
def towered(world: Path, cases: list[Case], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vision")
    train_vision(world / "init", cases, world / "cache", out, SETTINGS, Progress(disable=True))
    return out


def dense(cases: list[Case], training: VisionTraining, world: Path) -> DenseData:
    return DenseData(
        cases, VolumeCache(world / "cache", training.processor.image_processor), training.patch, training.cell
    )


def test_a_killed_vision_run_goes_on_to_the_same_weights(
    world: Path, cases: list[Case], towered: Path, tmp_path: Path
) -> None:
    first = VisionTraining(world / "init", tmp_path, SETTINGS)
    first.run(dense(cases[:4], first, world), dense(cases[4:], first, world), Progress(disable=True), stop_at=3)
    again = VisionTraining(world / "init", tmp_path, SETTINGS)
    assert again.step == 3
    again.run(dense(cases[:4], again, world), dense(cases[4:], again, world), Progress(disable=True))
    whole, resumed = load_file(towered / pipeline.WEIGHTS), load_file(tmp_path / pipeline.WEIGHTS)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_vision_stage_changes_the_tower_alone(world: Path, towered: Path) -> None:
    before, after = load_file(world / "init" / pipeline.WEIGHTS), load_file(towered / pipeline.WEIGHTS)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("model.vision_tower.") for name in moved)
    assert (towered / "vision_state.pt").is_file()


def test_the_tower_learns_a_ball_in_a_minute(world: Path, cases: list[Case], tmp_path: Path) -> None:
    settings = VisionSettings(steps=120, batch_size=6, learning_rate=1e-2, score_every=120)
    training = VisionTraining(world / "init", tmp_path, settings)
    data = dense(cases, training, world)
    before = score_cells(training.model, data).micro_f1
    for _ in range(settings.steps):
        training.one_step(data)
    assert score_cells(training.model, data).micro_f1 > max(0.5, before + 0.3)


def test_saying_no_everywhere_is_no_way_out_of_the_loss() -> None:
    fractions = torch.zeros(2, 64, 3)
    fractions[0, :4, 1] = 0.5
    never = torch.full((2, 64, 3), -6.0)
    found = torch.where(fractions > 0, 6.0, -6.0)
    assert finding_loss(found, fractions) < 0.2 < 5 < finding_loss(never, fractions)


@pytest.mark.parametrize("arm", ["baseline", ablate.DPO, ablate.LEGACY])
def test_an_arm_begins_with_the_shared_tower_and_language_model(arm: str, towered: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    ablate.make_arm(arm, towered, first, seed=3)
    ablate.make_arm(arm, towered, second, seed=4)
    one, other, shared = (load_file(folder / pipeline.WEIGHTS) for folder in (first, second, towered))
    new = ("model.projector.", "model.visual_tokenizer.")
    assert all(torch.equal(one[name], tensor) for name, tensor in shared.items() if not name.startswith(new))
    assert any(not torch.equal(one[name], other[name]) for name in one if name.startswith(new))
    Mu2ForConditionalGeneration.from_pretrained(first)


@pytest.fixture
def arms(world: Path, towered: Path, tmp_path: Path) -> Any:
    def run(*names: str) -> list[dict[str, Any]]:
        out = tmp_path / "arms"
        options: dict[str, Any] = {"arms": list(names), "seeds": 1, "cache": world / "cache"}
        options |= {"tokenizer_steps": 3, "sft_epochs": 1, "dpo_epochs": 1, "threads": 1, "bf16": False}
        ablate.ablate(towered, [world], [world], [world], out, **options)
        return list(json.loads((out / ablate.RESULT).read_text())["arms"])

    return run


def test_arms_are_trained_scored_and_kept(arms: Any, tmp_path: Path) -> None:
    rows = arms("baseline", "legacy")
    assert [row["name"] for row in rows] == ["baseline", "legacy"]
    assert all(row["rouge1"] is not None and row["seeds"] == 1 for row in rows)
    quirks = json.loads((tmp_path / "arms" / "legacy-0" / "sft" / "config.json").read_text())["tokenizer_config"]
    assert (quirks["refiner_residual"], quirks["mask_empty_chunks"]) == (False, False)
    stamp = (tmp_path / "arms" / "legacy-0" / "sft" / pipeline.WEIGHTS).stat().st_mtime_ns
    arms("baseline", "legacy")
    assert (tmp_path / "arms" / "legacy-0" / "sft" / pipeline.WEIGHTS).stat().st_mtime_ns == stamp
    assert "| baseline |" in (tmp_path / "arms" / ablate.REPORT).read_text()


def test_an_ablation_that_was_begun_with_other_options_is_not_mixed_up(tmp_path: Path) -> None:
    ablate.same_options(tmp_path, {"tokenizer_steps": 10})
    ablate.same_options(tmp_path, {"tokenizer_steps": 10})
    with pytest.raises(typer.BadParameter, match="tokenizer_steps: 10 then, 20 now"):
        ablate.same_options(tmp_path, {"tokenizer_steps": 20})


def test_the_read_out_finds_what_the_tokens_tell_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    present = rng.random(200) < 0.4
    truths = [[Stated("lung_nodule", "left")] if yes else [] for yes in present]
    telling = np.stack([present + rng.normal(0, 0.1, 200), rng.normal(0, 1, 200)], axis=1)
    silent = rng.normal(0, 1, (200, 2))
    assert read_out(telling[:150], truths[:150], telling[150:], truths[150:]).micro_f1 > 0.95
    assert read_out(silent[:150], truths[:150], silent[150:], truths[150:]).micro_f1 < 0.75


def test_the_read_out_of_a_checkpoint_is_written(world: Path, towered: Path, tmp_path: Path) -> None:
    readout_command(towered, [world], [world], tmp_path / "readout.json", world / "cache", 1)
    assert json.loads((tmp_path / "readout.json").read_text())["cases"] == len(read_manifest(world))


def test_a_stage_that_is_there_is_not_run_again(tmp_path: Path) -> None:
    calls: list[int] = []
    pipeline.unless_there(tmp_path, lambda: calls.append(1))
    (tmp_path / pipeline.WEIGHTS).write_bytes(b"")
    pipeline.unless_there(tmp_path, lambda: calls.append(2))
    assert calls == [1]


def test_sets_are_made_once_with_voxel_labels(tmp_path: Path) -> None:
    wanted = (pipeline.PhantomSet("tiny", 931, 1, Split.TRAIN),)
    pipeline.make_sets(tmp_path, wanted, processes=1)
    case = read_manifest(tmp_path / "tiny")[0]
    with np.load(case.image) as stored:
        assert {"hu", "affine", "organs", "findings"} <= set(stored)
