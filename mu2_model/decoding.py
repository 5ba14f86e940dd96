"""How text is decoded: named settings, and stopping at a deadline."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria

from mu2_model.errors import DeadlineExceededError, QuestionError


@dataclass(frozen=True)
class DecodeSettings:
    """Settings of one generation; greedy unless `sample`. The seed makes sampling repeatable."""

    sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `generate`."""
        if not self.sample:
            return {"do_sample": False, "repetition_penalty": self.repetition_penalty}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
        }


SETTINGS: dict[str, DecodeSettings] = {
    "greedy": DecodeSettings(),
    "published": DecodeSettings(sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.1),
    # Varied drafts of one volume, from which preferences are made.
    "varied": DecodeSettings(sample=True, temperature=1.0, top_p=0.9),
}


def decode_settings(settings: DecodeSettings | str) -> DecodeSettings:
    """Settings by their name, or as they are; QuestionError for a name that nobody gave."""
    if isinstance(settings, DecodeSettings):
        return settings
    if settings not in SETTINGS:
        raise QuestionError(f"no decode settings are called {settings!r}; there are {', '.join(SETTINGS)}")
    return SETTINGS[settings]


class Deadline:
    """A point in time; `check` raises DeadlineExceededError once it has passed."""

    def __init__(self, seconds: float | None):
        self.seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    def remaining(self) -> float | None:
        """Seconds that are left; None without a deadline."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def has_passed(self) -> bool:
        """Whether the time is over."""
        return self._end is not None and time.monotonic() > self._end

    def check(self) -> None:
        """Raise DeadlineExceededError when the time is over."""
        if self.has_passed():
            raise DeadlineExceededError(f"the draft was stopped after its {self.seconds:g} seconds")


class GenerationWatch(StoppingCriteria):
    """Called after every generated token: checks the deadline and reports progress. Never stops a sequence itself."""

    def __init__(self, deadline: Deadline, on_token: Callable[[Tensor], None] | None = None):
        self.deadline, self.on_token = deadline, on_token

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        """Raises DeadlineExceededError; otherwise False for every sequence."""
        self.deadline.check()
        if self.on_token is not None:
            self.on_token(input_ids)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class TokenLogProbabilities:
    """Records the model's own log-probability of every generated token, without keeping the logits.

    It listens to the head, so penalties, temperature and nucleus do not bend the figure. A row that has ended keeps being
    fed padding; what is recorded there is cut off by whoever cuts the text.
    """

    def __init__(self) -> None:
        self._next: Tensor | None = None
        self._recorded: list[Tensor] = []

    def listen(self, module: nn.Module, arguments: tuple[Tensor, ...], logits: Tensor) -> None:
        """Forward hook of the head: keep the distribution of the next token, logits (B, S, vocabulary)."""
        self._next = torch.log_softmax(logits[:, -1].float(), dim=-1)

    def after_token(self, input_ids: Tensor) -> None:
        """Record the token that was chosen from the kept distribution."""
        if self._next is not None:
            self._recorded.append(self._next.gather(1, input_ids[:, -1:]).squeeze(1))

    def stacked(self) -> Tensor:
        """(sequences, tokens)."""
        return torch.stack(self._recorded, dim=1)
