"""What `mu2 doctor` looks at: each check says what it found and, unless all is well, what to do."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from worker.core.settings import Settings


class Outcome(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"  # works, but someone should know
    FAIL = "fail"  # does not work until someone acts


@dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    outcome: Outcome
    finding: str
    advice: str = ""  # what to do; empty when all is well


def ok(name: str, finding: str) -> Check:
    """All is well."""
    return Check(name, Outcome.OK, finding)


def warn(name: str, finding: str, advice: str) -> Check:
    """It works, but someone should know."""
    return Check(name, Outcome.WARN, finding, advice)


def fail(name: str, finding: str, advice: str) -> Check:
    """It does not work until someone acts."""
    return Check(name, Outcome.FAIL, finding, advice)


def run(settings: Settings) -> Iterator[Check]:
    """All checks, the cheap ones first; each is bounded to seconds and none stops the others."""
    from worker.doctor import data, peers, work

    groups: tuple[Callable[[Settings], Iterator[Check]], ...] = (
        data.home,
        data.database,
        data.store,
        work.broker,
        work.workers,
        work.model,
        peers.listener,
        peers.destinations,
    )
    for group in groups:
        yield from group(settings)
