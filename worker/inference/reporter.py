"""What the pipeline asks of a model: sentences about the volumes of one study, before a deadline."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Counter, Histogram

from worker.core.errors import ModelBusyError
from worker.core.report import Provenance, Sentence
from worker.core.settings import ModelSettings, Settings


class Shown(Protocol):
    """What a question is made from."""

    @property
    def regions(self) -> tuple[str, ...]:
        """Body regions that a volume shows, from head to foot; () when nothing tells."""


class CtVolume(Shown, Protocol):
    """A volume as `worker.imaging` builds one; only what a reporter reads."""

    @property
    def hu(self) -> NDArray[np.float32]:
        """Hounsfield units, (slices, rows, columns)."""

    @property
    def affine(self) -> NDArray[np.float64]:
        """4x4: (slice, row, column, 1) to RAS millimetres."""


@dataclass(frozen=True)
class Drafted:
    """What a reporter wrote about one study."""

    sentences: tuple[Sentence, ...]
    provenance: Provenance


@dataclass(frozen=True, eq=False)
class Explained:
    """Where the model looked for one of its sentences, and what it was worth."""

    volume: int  # number of the study's volume, from 1
    region: str
    text: str
    heat: NDArray[np.float32]  # (slices, rows, columns) of patches, non-negative
    affine: NDArray[np.float64]  # 4x4: (slice, row, column, 1) of a patch's centre to RAS millimetres
    support: float  # drop of the mean log-probability per token when the hottest patches are blanked
    control: float  # the largest of the same for several draws of as many patches at random


@dataclass(frozen=True)
class Deadline:
    """When a draft must stop: at a time, or when one of the flags is set (lease lost, worker stops)."""

    at: float  # of `time.monotonic()`
    flags: tuple[threading.Event, ...] = ()

    @classmethod
    def after(cls, seconds: float, *flags: threading.Event) -> "Deadline":
        """A deadline this many seconds from now."""
        return cls(time.monotonic() + seconds, flags)

    @property
    def remaining_seconds(self) -> float:
        """Seconds left; 0 when passed or flagged."""
        return 0.0 if any(flag.is_set() for flag in self.flags) else max(0.0, self.at - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether work must stop now."""
        return self.remaining_seconds == 0.0

    def check(self) -> None:
        """Raises `ModelBusyError` when passed."""
        if self.passed:
            raise ModelBusyError("the deadline passed before the draft was complete; it is tried again")


@dataclass(frozen=True)
class ModelMetrics:
    """What a batching reporter counts."""

    batch_size: Histogram
    out_of_memory: Counter


class Reporter(Protocol):
    """Drafts reports. Called from several threads at once; a reporter that batches does so behind this call."""

    @property
    def name(self) -> str:
        """The model's name."""

    @property
    def version(self) -> str:
        """The model's version, as it stands in messages (ASCII)."""

    @property
    def weights_sha256(self) -> str:
        """Hash of the weights."""

    @property
    def is_broken(self) -> bool:
        """Whether only a new process can draft again."""

    def draft(self, volumes: Sequence[CtVolume], deadline: Deadline) -> Drafted:
        """Sentences about the volumes of one study, the main volume first.

        Raises `ModelBusyError` when memory or time ran out, `ModelError` when the model refuses the input.
        """

    def explain(self, volumes: Sequence[CtVolume], deadline: Deadline) -> list[Explained]:
        """Drafts once more and says for every sentence where the model looked; raises as `draft`."""

    def close(self) -> None:
        """Gives the model's memory and threads back."""


def build(settings: Settings, metrics: ModelMetrics) -> Reporter:
    """The reporter that the settings name, loaded and ready; raises `ModelError`."""
    if settings.model.reporter == "fake":
        from worker.inference.fake import FakeReporter

        return FakeReporter(settings.model)
    from worker.inference.mu2 import load  # torch is imported only where the model runs

    return load(settings, metrics)


@dataclass(frozen=True)
class Question:
    """One question about one volume."""

    volume: int  # index into the study's volumes
    region: str  # where its answer belongs; empty where the study shows one region only
    text: str


def questions(volumes: Sequence[Shown], model: ModelSettings) -> list[Question]:
    """One question a body region, from head to foot within a volume; a region is asked of its first volume only.

    A volume of which nothing tells the region is asked one plain question.
    """
    shown: list[tuple[int, str]] = []
    for index, volume in enumerate(volumes):
        known = {region for _, region in shown}
        fresh = [region for region in volume.regions if region not in known]
        shown.extend((index, region) for region in fresh)
        if not volume.regions:
            shown.append((index, ""))
    if len(shown) == 1:
        return [Question(shown[0][0], "", model.question)]
    return [Question(index, region, _about(region, model.question)) for index, region in shown]


def _about(region: str, question: str) -> str:
    return f"{question} Report on the {region} only." if region else question
