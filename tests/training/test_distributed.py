"""Two processes on CPU over gloo, plain and FSDP2, against one process with the same global batch."""

import functools
import multiprocessing
import multiprocessing.context
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import free_port
from tests.training import distributed_run
from training.provenance import FILE

TIMEOUT_SECONDS = 110


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, torch.Tensor]]:
    """The weights that one process ends with, by stage."""

    @functools.cache
    def train(stage: str) -> dict[str, torch.Tensor]:
        out = tmp_path_factory.mktemp(f"alone-{stage}")
        distributed_run.STAGES[stage](world, out)
        return load_file(out / "model.safetensors")

    return train


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """A fork server that imports torch and TRL once; each process is a clean fork of it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.distributed_run"])
    return context


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("fsdp", [False, True], ids=["plain", "FSDP2"])
def test_two_processes_end_with_the_weights_of_one(
    world: Path,
    alone: Callable[[str], dict[str, torch.Tensor]],
    processes: multiprocessing.context.ForkServerContext,
    tmp_path: Path,
    fsdp: bool,
    stage: str,
) -> None:
    port = free_port()
    ranks = [
        processes.Process(target=distributed_run.rank, args=(number, stage, world, tmp_path, port, fsdp))
        for number in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(TIMEOUT_SECONDS)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]
    both = load_file(tmp_path / "model.safetensors")
    start = load_file(world / "init" / "model.safetensors")
    one = alone(stage)
    moved = max(float((one[name] - start[name]).abs().max()) for name in one)
    # A bias before a softmax shifts every logit alike and has no gradient: Adam blows up what rounding leaves of it.
    told = [name for name in one if not name.endswith(("key.bias", "selection.score.bias"))]
    apart = max(float((one[name] - both[name]).abs().max()) for name in told)
    assert set(both) == set(one)
    assert moved > 1e-3
    assert apart < 0.001 * moved


CHECKPOINTS = {"num_train_epochs": 10, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 10}


def test_a_run_that_gets_sigkill_goes_on_to_the_same_losses(
    world: Path, processes: multiprocessing.context.ForkServerContext, tmp_path: Path
) -> None:
    run = processes.Process(target=distributed_run.train, args=(world, tmp_path / "killed"), kwargs=CHECKPOINTS)
    run.start()
    third = tmp_path / "killed" / "checkpoint-3" / FILE
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not third.is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    run.kill()
    run.join()
    assert run.exitcode == -signal.SIGKILL
    # What a kill in the middle of a save leaves behind.
    (tmp_path / "killed" / "checkpoint-9").mkdir(exist_ok=True)
    resumed = distributed_run.train(world, tmp_path / "killed", **CHECKPOINTS)
    whole = distributed_run.train(world, tmp_path / "whole", **{**CHECKPOINTS, "save_strategy": "no"})

    def losses(trainer: Any) -> list[float]:
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    assert losses(resumed) == losses(whole)
    assert len(losses(whole)) == 10
