"""Group commit: one thread places what all associations have ready, and one transaction makes their rows durable.

While a group is being committed the next one gathers, so the cost of a commit is shared by as many instances as arrive
in its time; a lone association never waits for company.

    association: write, fsync file ──▶ inbox ──▶ rename each, fsync each folder once, commit rows ──▶ answer to each
"""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
from sqlalchemy.exc import SQLAlchemyError

from dicom_listener.metrics import Metrics
from dicom_listener.storage import Held, Store
from worker.core import arrivals
from worker.core.arrivals import Arrival, Recorded
from worker.core.database import Database
from worker.core.errors import DatabaseUnavailableError, Mu2Error, RetryableError

log = structlog.get_logger(__name__)

MOST_IN_A_GROUP = 256

Outcome = Recorded | Mu2Error


class RowRefusedError(RetryableError):
    """The database refuses this instance's row; the file stays in the store and is looked at again at the next start."""


@dataclass(frozen=True)
class _Waiting:
    held: Held
    arrival: Arrival
    answer: "queue.SimpleQueue[Outcome]"


class Committer:
    """Owns the thread; `commit` is called by many associations at once."""

    def __init__(self, store: Store, database: Database, metrics: Metrics, on_failure: Callable[[], None]) -> None:
        self._store = store
        self._database = database
        self._metrics = metrics
        self._on_failure = on_failure  # files without rows are left behind
        self._inbox: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Commits what waits, then ends the thread."""
        self._inbox.put(None)
        self._thread.join()

    def commit(self, held: Held, arrival: Arrival, answer: "queue.SimpleQueue[Outcome]") -> Recorded:
        """Returns once the instance is durable in store and database; raises the `RetryableError` that prevented it.

        `answer` is the caller's own queue, reused from instance to instance.
        """
        self._inbox.put(_Waiting(held, arrival, answer))
        outcome = answer.get()
        if isinstance(outcome, Mu2Error):
            raise outcome
        return outcome

    def _run(self) -> None:
        while (first := self._inbox.get()) is not None:
            group, last = self._gather(first)
            self._commit(group)
            if last:
                return

    def _gather(self, first: _Waiting) -> tuple[list[_Waiting], bool]:
        """Everything that waits now, and whether the end was among it."""
        group = [first]
        while len(group) < MOST_IN_A_GROUP:
            try:
                waiting = self._inbox.get_nowait()
            except queue.Empty:
                break
            if waiting is None:
                return group, True
            group.append(waiting)
        return group, False

    def _commit(self, group: list[_Waiting]) -> None:
        began = time.perf_counter()
        placed: list[_Waiting] = []
        unsynced: set[Path] = set()
        for waiting in group:
            try:
                self._store.place(waiting.held, waiting.arrival.path, unsynced)
                placed.append(waiting)
            except Mu2Error as error:
                waiting.answer.put(error)
        if not placed:
            return
        try:
            self._store.sync(unsynced)
        except Mu2Error as error:
            self._fail(placed, error)
            return
        self._record(placed)
        self._metrics.group_size.observe(len(placed))
        self._metrics.commit_seconds.observe(time.perf_counter() - began)

    def _record(self, placed: list[_Waiting]) -> None:
        try:
            recorded = arrivals.record(self._database, [w.arrival for w in placed])
        except DatabaseUnavailableError as error:
            self._fail(placed, error)
        except SQLAlchemyError as error:
            # One row that the database refuses must not take its group with it.
            if len(placed) > 1:
                for waiting in placed:
                    self._record([waiting])
                return
            log.error("row_refused", exc_info=error)
            self._fail(placed, RowRefusedError("the database refuses the instance's row; see the log"))
        else:
            for waiting, outcome in zip(placed, recorded, strict=True):
                waiting.answer.put(outcome)

    def _fail(self, placed: list[_Waiting], error: Mu2Error) -> None:
        self._on_failure()
        for waiting in placed:
            waiting.answer.put(error)
