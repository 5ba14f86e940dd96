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
from training.dpo import PreferencePair, train_dpo
from training.provenance import collect
from training.run_config import load_config, trainer_arguments
from training.sft import train_sft
from training.volumes import VolumeCache

GLOBAL_BATCH = 4
FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}


def train(world: Path, out: Path, processes: int = 1, fsdp: bool = False, **options: Any) -> Any:
    """A step of SFT an epoch over four cases, with the same global batch however many processes share it."""
    cases = read_manifest(world, "train")
    arguments = _arguments("sft", out, processes, fsdp, options)
    return train_sft(
        "sft", world / "init", cases, _source(world), arguments, collect("sft", 0, cases, {}, world / "init")
    )


def prefer(world: Path, out: Path, processes: int = 1, fsdp: bool = False, **options: Any) -> Any:
    """A step of DPO an epoch over four pairs, against a reference that is spread as the policy is."""
    cases = read_manifest(world, "train")
    # Each report was preferred to that of the next case.
    others = [*cases[1:], cases[0]]
    pairs = [
        PreferencePair(case.case_id, case.image, case.question, case.answer, other.answer, 1.0, 0.0)
        for case, other in zip(cases, others, strict=True)
    ]
    # Plain descent: near ln 2 gradients are small, and Adam would blow up what rounding leaves of some and hide a wrong scale.
    arguments = _arguments("dpo", out, processes, fsdp, {"optim": "sgd", "learning_rate": 0.3, **options})
    return train_dpo(world / "init", pairs, _source(world), arguments, collect("dpo", 0, cases, {}, world / "init"))


STAGES = {"sft": train, "dpo": prefer}


def _source(world: Path) -> VolumeSource:
    return VolumeSource(VolumeCache(world / "cache", Mu2Processor.from_pretrained(world / "init").image_processor))


def _arguments(stage: str, out: Path, processes: int, fsdp: bool, options: dict[str, Any]) -> Any:
    torch.set_num_threads(1)
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
    arguments = trainer_arguments(stage, load_config("cpu"), out, **changes)
    if fsdp:
        # accelerate turns FSDP on only where it sees GPUs; torch's fully_shard itself runs over gloo.
        arguments.distributed_state.distributed_type = DistributedType.MULTI_GPU
    return arguments


def rank(number: int, stage: str, world: Path, out: Path, port: int, fsdp: bool) -> None:
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
    trainer = STAGES[stage](world, out, processes=2, fsdp=fsdp)
    models = [trainer.model_wrapped, *([trainer.ref_model] if stage == "dpo" else [])]
    spread = [isinstance(parameter, DTensor) for model in models for parameter in model.parameters()]
    assert trainer.accelerator.num_processes == 2
    assert all(spread) if fsdp else not any(spread)
