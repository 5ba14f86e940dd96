"""What the stages with a loop of their own share: optimiser, schedule, and a state from which a killed run goes on alike."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from training.recipes import write_json


class LoopSettings(Protocol):
    """What the loop reads of a stage's settings, a frozen dataclass."""

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""

    @property
    def learning_rate(self) -> float:
        """Highest rate."""

    @property
    def weight_decay(self) -> float:
        """Of AdamW."""

    @property
    def warmup_ratio(self) -> float:
        """Share of the steps in which the rate rises."""


M = TypeVar("M", bound=nn.Module)
S = TypeVar("S", bound=LoopSettings)


def rate_share(step: int, steps: int, warmup_ratio: float) -> float:
    """Share of the highest rate at a step: a linear rise, then half a cosine down to 0.

    >>> [round(rate_share(step, 12, 1 / 6), 2) for step in (0, 1, 2, 7, 12)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    warmup = max(1, int(warmup_ratio * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


class Resumable(Generic[M, S]):
    """A model in training and its newest state on disk: `NAME_state.pt` to go on from, `NAME_history.json` to read."""

    def __init__(self, name: str, out: Path, model: M, parameters: Iterable[nn.Parameter], settings: S) -> None:
        self.model, self.settings = model, settings
        self.parameters = list(parameters)
        self.state_file, self.history_file = out / f"{name}_state.pt", out / f"{name}_history.json"
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.98)
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: rate_share(step, settings.steps, settings.warmup_ratio)
        )
        self.step = 0
        self.history: list[dict[str, Any]] = []

    def resume(self, device: torch.device | str = "cpu") -> None:
        """Take up the state on disk, if there is one."""
        if not self.state_file.is_file():
            return
        state = torch.load(self.state_file, weights_only=True, map_location=device)
        for part in ("model", "optimizer", "schedule"):
            getattr(self, part).load_state_dict(state[part])
        self.step, self.history = state["step"], json.loads(state["history"])

    def save(self) -> None:
        """Store the state; a reader sees the old one or the new one."""
        state: dict[str, Any] = {part: getattr(self, part).state_dict() for part in ("model", "optimizer", "schedule")}
        partial = self.state_file.with_suffix(".pt.partial")
        torch.save({**state, "step": self.step, "history": json.dumps(self.history)}, partial)
        partial.replace(self.state_file)
        settings: Any = self.settings
        write_json(self.history_file, {"settings": asdict(settings), "history": self.history})

    def descend(self, loss: Tensor) -> float:
        """One optimiser step down a loss, its gradient clipped to norm 1; returns the loss."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return float(loss.detach())
