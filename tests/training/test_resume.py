"""A stage that was killed goes on to the same weights, whatever learns: adapters with dropout, a policy beside its reference."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mu2_model import Mu2Processor
from training.collators import VolumeSource
from training.data import Case
from training.dpo import PreferencePair, train_dpo
from training.provenance import collect
from training.run_config import load_config, trainer_arguments
from training.sft import LoraSettings, train_sft
from training.volumes import VolumeCache

STEPS, KILLED_AFTER = 2, 1


@pytest.fixture(scope="module")
def source(world: Path, tmp_path_factory: pytest.TempPathFactory) -> VolumeSource:
    processor = Mu2Processor.from_pretrained(world / "init")
    return VolumeSource(VolumeCache(tmp_path_factory.mktemp("cache"), processor.image_processor))


def run(
    stage: str,
    world: Path,
    cases: list[Case],
    source: VolumeSource,
    out: Path,
    lora: LoraSettings | None,
    stop: int | None,
) -> list[float]:
    """Train in `out`, or go on there; returns the losses of all steps so far."""
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "save_steps": 1,
        "logging_steps": 1,
    }
    settings |= {"report_to": "none", "disable_tqdm": True, "learning_rate": 1e-3}
    arguments = trainer_arguments(stage, load_config("cpu"), out, **settings)
    provenance = collect(stage, 0, cases, {}, world / "init")
    trainer: Any
    if stage == "dpo":
        others = [*cases[1:], cases[0]]
        pairs = [
            PreferencePair(case.case_id, case.image, case.question, case.answer, other.answer, 1.0, 0.0)
            for case, other in zip(cases, others, strict=True)
        ]
        trainer = train_dpo(world / "init", pairs, source, arguments, provenance, lora=lora, stop_after=stop)
    else:
        trainer = train_sft(stage, world / "init", cases, source, arguments, provenance, lora=lora, stop_after=stop)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize(
    ("stage", "lora"),
    [("sft", LoraSettings(rank=2, dropout=0.1)), ("dpo", None)],
    ids=["adapters", "a policy and its reference"],
)
def test_a_killed_stage_goes_on_to_the_same_losses_and_weights(
    world: Path, cases: list[Case], source: VolumeSource, tmp_path: Path, stage: str, lora: LoraSettings | None
) -> None:
    whole = run(stage, world, cases[:4], source, tmp_path / "whole", lora, None)
    run(stage, world, cases[:4], source, tmp_path / "killed", lora, KILLED_AFTER)
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    resumed = run(stage, world, cases[:4], source, tmp_path / "killed", lora, None)
    assert len(whole) == STEPS
    assert resumed == whole
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
