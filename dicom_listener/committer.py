"""Group commit: one transaction makes the rows of many instances durable.

    associations: write, name, fsync file and folder ──▶ commit(): one transaction for all that wait ──▶ answer to each

The first that comes leads: it commits at once, in its own thread, so a lone association never waits for company or for
another thread. Those that come meanwhile form the next group, whose first member is woken to lead it. So the cost of a
commit is shared by as many instances as arrive in the time of one.
"""

import threading
import time
from collections.abc import Callable
from typing import Protocol

import structlog
from sqlalchemy.exc import SQLAlchemyError

from dicom_listener.arrivals import Holds
from dicom_listener.corrected_headers import Corrections
from dicom_listener.metrics import Metrics
from worker.core.arrivals import Arrival, Recorded
from worker.core.database import Database
from worker.core.errors import DatabaseUnavailableError, Mu2Error, RetryableError
from worker.core.recorder import Recorder

log = structlog.get_logger(__name__)


class RowRefusedError(RetryableError):
    """The database refuses this instance's row; the file stays in the store and is looked at again later."""


class _Waiting:
    """One instance that waits for its commit."""

    def __init__(self, arrival: Arrival) -> None:
        self.arrival = arrival
        self.outcome: Recorded | Mu2Error | None = None
        self.wake = threading.Lock()  # free once there is an outcome, or a group to lead
        self.wake.acquire()


class Rows(Protocol):
    """Where one association brings what it has stored; it is here or, for a receiving process, in the listener."""

    def commit(self, arrival: Arrival) -> Recorded:
        """Returns once the row is durable; raises the `RetryableError` that prevented it."""

    def close(self) -> None:
        """The association ended: its studies are no longer held back."""


class Committer:
    """Commits instances for many associations at once. Safe for threads."""

    def __init__(
        self,
        database: Database,
        metrics: Metrics,
        on_failure: Callable[[], None],
    ) -> None:
        self._recorder = Recorder(database)
        self._metrics = metrics
        self._on_failure = on_failure  # files without rows are left behind
        self._lock = threading.Lock()
        self._leading = False
        self._next: list[_Waiting] = []

    def commit(self, arrival: Arrival) -> Recorded:
        """Returns once the row of a stored instance is durable; raises the `RetryableError` that prevented it."""
        mine = _Waiting(arrival)
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
        self._record(group)
        self._metrics.group_size.observe(len(group))
        self._metrics.commit_seconds.observe(time.perf_counter() - began)

    def _record(self, group: list[_Waiting]) -> None:
        try:
            recorded = self._recorder.record([waiting.arrival for waiting in group])
        except DatabaseUnavailableError as error:
            self._fail(group, error)
        except SQLAlchemyError as error:
            # One row that the database refuses must not take its group with it.
            if len(group) > 1:
                for waiting in group:
                    self._record([waiting])
                return
            log.error("row_refused", exc_info=error)
            self._fail(group, RowRefusedError("the database refuses the instance's row; see the log"))
        else:
            for waiting, outcome in zip(group, recorded, strict=True):
                waiting.outcome = outcome

    def close(self) -> None:
        """Gives the database connection back; no association is left by then."""
        self._recorder.close()

    def _fail(self, group: list[_Waiting], error: Mu2Error) -> None:
        self._on_failure()
        for waiting in group:
            waiting.outcome = error


class LocalRows:
    """The rows of one association, committed in this process."""

    def __init__(self, committer: Committer, corrections: Corrections, holds: Holds, association: int) -> None:
        self._committer = committer
        self._corrections = corrections
        self._holds = holds
        self._association = association

    def commit(self, arrival: Arrival) -> Recorded:
        """Commits and holds the study back while the association is open."""
        self._holds.note(self._association, arrival.study_instance_uid)
        recorded = self._corrections.settle(arrival, self._committer.commit(arrival))
        self._holds.note(self._association, arrival.study_instance_uid)  # a commit that waited for long counts from now
        return recorded

    def close(self) -> None:
        """Lets the studies go."""
        self._holds.end(self._association)
