"""What `mu2 doctor` looks at: each check says what it found and, unless all is well, what to do."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from worker.core.errors import Mu2Error
from worker.core.settings import Settings

# What files, sockets, databases and brokers raise when they are in a state that no check foresaw.
_SURPRISES = (Mu2Error, OSError, ValueError, SQLAlchemyError, RedisError)


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
    """All checks, the cheap ones first; each is bounded to seconds and none stops the others.

    A group that meets what it did not expect of the outside world ends with a failed check of its name.
    """
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
        try:
            yield from group(settings)
        except _SURPRISES as error:
            yield _surprised(group.__name__, error)


def _surprised(name: str, error: Exception) -> Check:
    """The check for a group that ended early; the text of an error that is not ours may quote anything."""
    cause = str(error) if isinstance(error, Mu2Error) else type(error).__name__
    return fail(name, f"could not be checked to the end ({cause})", "mend what failed above first, then run it again")
