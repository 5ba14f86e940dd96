"""The sweep: a thread of every worker that keeps its heartbeat, and in one worker at a time rings what is due.

The rows are the truth: whatever was lost on the way (a message, a worker, the whole broker), its study or message is due by
its row, and is rung again within a sweep. An error of the database or the broker only postpones the sweep.
"""

import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa
import structlog
from sqlalchemy.orm import Session

from worker import evidence
from worker.core import outbox, studies
from worker.core.errors import BrokerUnavailableError, DatabaseUnavailableError
from worker.core.records import Heartbeat, Lease, Stage

if TYPE_CHECKING:
    from worker.process import WorkerProcess

log = structlog.get_logger(__name__)

LEASE = "sweep"
LEASE_SWEEPS = 3.0  # the lease outlives this many sweeps, so that one late sweep does not change the holder
MOST_RINGS = 4  # a sweep; whoever is rung rings on while more is due
DATABASE_SECONDS = 1.0
FORGET_AFTER = timedelta(days=1)  # heartbeats of processes that are gone
SUBJECT = "sweep"


class Sweeper:
    """Sweeps every `queue.sweep_seconds` until closed."""

    def __init__(self, worker: "WorkerProcess") -> None:
        self._worker = worker
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)
        self._due_since: dict[Stage, float] = {}  # of `time.monotonic()`
        self._unknown: set[str] = set()

    @property
    def longest_wait_seconds(self) -> float:
        """How long work has been due without this process claiming any, over its stages; 0 when nothing is due."""
        now = time.monotonic()
        waits = [
            now - max(since, self._worker.claimed_at.get(stage, since))
            for stage, since in dict(self._due_since).items()
        ]
        return max(waits, default=0.0)

    def start(self) -> None:
        """Starts the thread; the first sweep is at once."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread after the sweep under way."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self._worker.settings.queue.sweep_seconds + DATABASE_SECONDS)

    def sweep(self) -> None:
        """One sweep; raises `DatabaseUnavailableError` or `BrokerUnavailableError`."""
        is_holder, due, asked, destinations = self._worker.database.run(self._look, busy_seconds=DATABASE_SECONDS)
        self._observe(due)
        if not is_holder:
            return
        for stage, count in due.items():
            wanted = count + (asked if stage is Stage.DRAFT else 0)
            self._ring(stage.value, SUBJECT, min(wanted, MOST_RINGS))
        known = {destination.name for destination in self._worker.settings.hl7.destinations}
        for name in destinations:
            if name in known:
                self._ring("deliver", name, 1)
            elif name not in self._unknown:
                self._unknown.add(name)
                log.warning("destination_unknown", destination=name)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._worker.leave_if_broken()
            try:
                self.sweep()
            except (DatabaseUnavailableError, BrokerUnavailableError) as error:
                log.warning("sweep_postponed", exc_info=error)
            self._stop.wait(self._worker.settings.queue.sweep_seconds)

    def _look(self, session: Session) -> tuple[bool, dict[Stage, int], bool, list[str]]:
        """Beats, takes or keeps the lease, and counts what is due; the third says whether evidence is asked for."""
        self._beat(session)
        is_holder = self._take_lease(session)
        due = {stage: studies.due_count(session, stage) for stage in Stage}
        if not is_holder:
            return False, due, False, []
        return True, due, evidence.due(session), outbox.due_destinations(session)

    def _beat(self, session: Session) -> None:
        worker, at = self._worker, studies.now()
        row = session.get(Heartbeat, worker.name)
        if row is None:
            row = Heartbeat(
                owner=worker.name,
                service="worker",
                queues=",".join(worker.serves),
                started_at=worker.started_at,
                beat_at=at,
            )
            session.add(row)
            gone = sa.delete(Heartbeat).where(Heartbeat.service == "worker", Heartbeat.beat_at < at - FORGET_AFTER)
            session.execute(gone)
        row.beat_at = at
        if worker.claimed_at:
            row.claimed_at = at - timedelta(seconds=time.monotonic() - max(worker.claimed_at.values()))

    def _take_lease(self, session: Session) -> bool:
        """Whether this process is the one that rings until the lease runs out."""
        at = studies.now()
        until = at + timedelta(seconds=LEASE_SWEEPS * self._worker.settings.queue.sweep_seconds)
        lease = session.get(Lease, LEASE, with_for_update=True)
        if lease is None:
            session.add(Lease(name=LEASE, owner=self._worker.name, until=until))
            return True
        if lease.owner != self._worker.name and lease.until > at:
            return False
        lease.owner, lease.until = self._worker.name, until
        return True

    def _observe(self, due: dict[Stage, int]) -> None:
        now = time.monotonic()
        for stage, count in due.items():
            self._worker.metrics.due.labels(stage.value).set(count)
            if stage not in self._worker.stages:
                continue
            if count == 0 or self._worker.slots[stage].is_full:  # whoever is at work claims the next one
                self._due_since.pop(stage, None)
                self._worker.metrics.claim_age_seconds.labels(stage.value).set(0)
                continue
            since = self._due_since.setdefault(stage, now)
            age = now - max(since, self._worker.claimed_at.get(stage, since))
            self._worker.metrics.claim_age_seconds.labels(stage.value).set(age)

    def _ring(self, queue: str, subject: str, wanted: int) -> None:
        """Rings `wanted` times less what lies in the queue already."""
        for _ in range(wanted - self._worker.doorbell.waiting(queue)):
            if self._worker.doorbell.ring(queue, subject):
                self._worker.metrics.rings.labels(queue).inc()
