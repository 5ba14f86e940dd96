"""What test_distributed.py starts in fresh processes: one rank of a run on CPU (gloo), and a run to be killed."""

import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from mu2_model import Mu2Processor
from training.collators import VolumeSource
from training.data import read_manifest
from training.provenance import collect
from training.run_config import load_config, trainer_arguments
from training.sft import train_sft
from training.volumes import VolumeCache

GLOBAL_BATCH = 4
FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}


def train(world: Path, out: Path, processes: int = 1, fsdp: bool = False, **options: Any) -> Any:
    """A step of SFT an epoch over four cases, with the same global batch however many processes share it."""
    torch.set_num_threads(1)
    cases = read_manifest(world, "train")
    source = VolumeSource(VolumeCache(world / "cache", Mu2Processor.from_pretrained(world / "init").image_processor))
    changes: dict[str, Any] = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": GLOBAL_BATCH // processes,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "max_grad_norm": 1.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        **(FSDP if fsdp else {}),
        **options,
    }
    arguments = trainer_arguments("sft", load_config("cpu"), out, **changes)
    if fsdp:
        # accelerate turns FSDP on only where it sees GPUs; torch's fully_shard itself runs over gloo.
        arguments.distributed_state.distributed_type = DistributedType.MULTI_GPU
    provenance = collect("sft", 0, cases, {}, world / "init")
    return train_sft("sft", world / "init", cases, source, arguments, provenance)


def rank(number: int, world: Path, out: Path, port: int, fsdp: bool) -> None:
    """What each of the two processes runs."""
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    trainer = train(world, out, processes=2, fsdp=fsdp)
    spread = [isinstance(parameter, DTensor) for parameter in trainer.model_wrapped.parameters()]
    assert trainer.accelerator.num_processes == 2
    assert all(spread) if fsdp else not any(spread)
