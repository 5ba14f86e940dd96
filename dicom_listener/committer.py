"""Group commit: one association places what all have ready, and one transaction makes their rows durable.

    association: write, fsync file ──▶ commit() ──▶ rename each, fsync each folder once, commit rows ──▶ answer to each

The first that comes leads: it commits at once, in its own thread, so a lone association never waits for company or for
another thread. Those that come meanwhile form the next group, whose first member is woken to lead it. So the cost of a
commit is shared by as many instances as arrive in the time of one.
"""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import structlog
from sqlalchemy.exc import SQLAlchemyError

from dicom_listener.metrics import Metrics
from dicom_listener.storage import Held, Store
from worker.core.arrivals import Arrival, Recorded
from worker.core.database import Database
from worker.core.errors import DatabaseUnavailableError, Mu2Error, RetryableError
from worker.core.recorder import Recorder

log = structlog.get_logger(__name__)


class RowRefusedError(RetryableError):
    """The database refuses this instance's row; the file stays in the store and is looked at again later."""


class _Waiting:
    """One instance that waits for its commit."""

    def __init__(self, held: Held, arrival: Arrival) -> None:
        self.held = held
        self.arrival = arrival
        self.outcome: Recorded | Mu2Error | None = None
        self.wake = threading.Lock()  # free once there is an outcome, or a group to lead
        self.wake.acquire()


class Committer:
    """Commits instances for many associations at once. Safe for threads."""

    def __init__(
        self,
        store: Store,
        database: Database,
        metrics: Metrics,
        on_failure: Callable[[], None],
        turn: AbstractContextManager[None] | None = None,
    ) -> None:
        self._store = store
        self._turn: AbstractContextManager[None] = (
            turn or nullcontext()
        )  # processes that share one SQLite file take turns
        self._recorder = Recorder(database)
        self._metrics = metrics
        self._on_failure = on_failure  # files without rows are left behind
        self._lock = threading.Lock()
        self._leading = False
        self._next: list[_Waiting] = []

    def commit(self, held: Held, arrival: Arrival) -> Recorded:
        """Returns once the instance is durable in store and database; raises the `RetryableError` that prevented it."""
        mine = _Waiting(held, arrival)
        with self._lock:
            self._next.append(mine)
            lead = not self._leading
            self._leading = True
        if not lead:
            mine.wake.acquire()
        if mine.outcome is None:
            self._lead(mine)
        if isinstance(mine.outcome, Mu2Error):
            raise mine.outcome
        assert mine.outcome is not None
        return mine.outcome

    def _lead(self, mine: _Waiting) -> None:
        """Commits everything that waits, this instance among it, and passes the lead on."""
        with self._lock:
            group, self._next = self._next, []
        try:
            self._commit(group)
        finally:
            for waiting in group:
                if waiting.outcome is None:  # a fault of ours: its own thread sees it, the others must not hang
                    waiting.outcome = RowRefusedError("the commit of the group failed; see the log")
                if waiting is not mine:
                    waiting.wake.release()
            with self._lock:
                if self._next:
                    self._next[0].wake.release()
                else:
                    self._leading = False

    def _commit(self, group: list[_Waiting]) -> None:
        began = time.perf_counter()
        placed: list[_Waiting] = []
        unsynced: set[str] = set()
        for waiting in group:
            try:
                self._store.place(waiting.held, waiting.arrival.path, unsynced)
                placed.append(waiting)
            except Mu2Error as error:
                waiting.outcome = error
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
            with self._turn:
                recorded = self._recorder.record([waiting.arrival for waiting in placed])
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
                waiting.outcome = outcome

    def close(self) -> None:
        """Gives the database connection back; no association is left by then."""
        self._recorder.close()

    def _fail(self, placed: list[_Waiting], error: Mu2Error) -> None:
        self._on_failure()
        for waiting in placed:
            waiting.outcome = error
