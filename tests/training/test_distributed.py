"""Two processes on CPU over gloo, plain and FSDP2, against one process with the same global batch."""

import multiprocessing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import free_port
from tests.training import distributed_run

TIMEOUT_SECONDS = 110


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("alone")
    distributed_run.train(world, out)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("fsdp", [False, True], ids=["plain", "FSDP2"])
def test_two_processes_end_with_the_weights_of_one(
    world: Path, alone: dict[str, torch.Tensor], tmp_path: Path, fsdp: bool
) -> None:
    # A fork server imports torch and TRL once; each rank is a clean fork of it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.distributed_run"])
    port = free_port()
    ranks = [
        context.Process(target=distributed_run.rank, args=(number, world, tmp_path, port, fsdp)) for number in range(2)
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
    moved = max(float((alone[name] - start[name]).abs().max()) for name in alone)
    apart = max(float((alone[name] - both[name]).abs().max()) for name in alone)
    assert set(both) == set(alone)
    assert moved > 1e-3
    assert apart < 0.02 * moved
