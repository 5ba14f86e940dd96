"""What one worker process holds, from its start to its end: database, model, heart, senders, sweep, health.

The Celery bootstep `Lifecycle` makes it before the first message is received and ends it before the pool goes. Stopping
has three steps: `stopping` ends the claiming of new work; after `worker.stop_seconds` `halting` ends the drafts that are
still under way and gives their studies back; then the threads end.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import structlog
from celery import bootsteps, signals
from sqlalchemy.orm import Session

from worker import queues
from worker.claims import Heart
from worker.core import schema, settings, studies
from worker.core.database import Database
from worker.core.errors import BrokerUnavailableError, DatabaseUnavailableError, Mu2Error, SettingsError
from worker.core.health import HealthServer
from worker.core.records import Stage, new_id
from worker.core.settings import Settings
from worker.core.studies import Claim, Limits
from worker.inference import reporter as inference
from worker.inference.reporter import ModelMetrics, Reporter
from worker.metrics import Metrics
from worker.pipeline import Means, rules
from worker.senders import Sender, Senders
from worker.sweeper import Sweeper

log = structlog.get_logger(__name__)

T = TypeVar("T")

RECORD_SECONDS = 2.0  # one try to record a result; tried again until the worker halts
LOOK_SECONDS = 0.05
HALT_SECONDS = 5.0  # for giving a study back, or ending a preparation, once the process halts
DEAF_SECONDS = 60.0  # work is due and nothing was claimed for this long: not ready


class Slots:
    """How many studies of a stage may be under way at once, and whether someone rang while all were. Safe for threads."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.rung = threading.Event()
        self._taken = 0
        self._lock = threading.Lock()

    @property
    def is_busy(self) -> bool:
        """Whether any slot is taken."""
        return self._taken > 0

    @property
    def is_full(self) -> bool:
        """Whether every slot is taken."""
        return self._taken == self.count

    def take(self) -> bool:
        """Takes a slot if one is free, without waiting."""
        with self._lock:
            if self._taken == self.count:
                return False
            self._taken += 1
            return True

    def give(self) -> None:
        """Gives a slot back."""
        with self._lock:
            self._taken -= 1


class WorkerProcess:
    """Everything that the tasks of one process share."""

    def __init__(self, config: Settings, serves: Collection[str], concurrency: int, doorbell: queues.Doorbell) -> None:
        self.settings = config
        self.serves = tuple(name for name in queues.QUEUES if name in serves)
        self.stages = tuple(stage for stage in Stage if stage.value in self.serves)
        self.name = f"{socket.gethostname()[:50]}:{os.getpid()}:{new_id()[:8]}"
        self.started_at = studies.now()
        self.stopping = threading.Event()
        self.halting = threading.Event()
        self.failed = threading.Event()  # this process ends itself because a part of it is broken
        self.slots = _slots(config, self.stages, concurrency, len(self.serves))
        self.metrics = Metrics()
        self.database = Database.from_settings(config)
        self.doorbell = doorbell
        self.heart = Heart(self.database, config.queue.lease_seconds)
        self.senders = Senders(self.database, config.hl7, self.metrics)
        self.means = Means(self.database, config, self.metrics, self.name, self.record)
        self.claimed_at: dict[Stage, float] = {}  # of `time.monotonic()`
        self.limits = Limits(
            lease_seconds=config.queue.lease_seconds,
            max_attempts=config.queue.max_attempts,
            max_crashes=config.queue.max_crashes,
            backoff_seconds=config.queue.backoff_seconds,
        )
        self._reporter: Reporter | None = None
        self._sweeper = Sweeper(self)
        self._health: HealthServer | None = None

    @property
    def reporter(self) -> Reporter:
        """The model; raises `SettingsError` in a worker that does not serve the draft queue."""
        if self._reporter is None:
            raise SettingsError("this worker has no model: it does not serve the draft queue")
        return self._reporter

    def start(self) -> None:
        """Loads the model and starts the threads.

        Raises `SettingsError` for a database that is not migrated, for rules of the choice of series that are none and for
        a metrics port that is taken, `ModelError` for a checkpoint that does not load: a worker that cannot work must not
        fail study after study.
        """
        self._require_database()
        if Stage.PREPARE in self.stages:
            rules(self.settings.imaging)
        if Stage.DRAFT in self.stages:
            counters = ModelMetrics(self.metrics.batch_size, self.metrics.out_of_memory)
            self._reporter = inference.build(self.settings, counters)
        checks = {"database": self._database_answers, "broker": self._broker_answers, "claims": self.hears}
        where = self.settings.worker
        self._health = HealthServer(
            where.metrics_host, where.metrics_port, self.metrics.registry, checks, group="WORKER"
        )
        self.heart.start()
        self._sweeper.start()
        log.info("worker_started", worker=self.name, queues=list(self.serves), port=self._health.port)

    def claim(self, stage: Stage) -> tuple[Claim | None, bool]:
        """Claims the most urgent due study of a stage, and says whether more are due. Raises `DatabaseUnavailableError`."""

        def take(session: Session) -> tuple[Claim | None, bool]:
            claim = studies.claim(session, stage, self.name, self.limits)
            return claim, claim is not None and studies.due_count(session, stage) > 0

        claim, more = self.database.run(take, busy_seconds=RECORD_SECONDS)
        if claim is not None:
            self.claimed_at[stage] = time.monotonic()
        return claim, more

    def record(self, change: Callable[[Session], T]) -> T:
        """Commits a result, however long the database is away: nobody else can claim meanwhile.

        Raises `DatabaseUnavailableError` once the worker halts.
        """
        while True:
            try:
                return self.database.run(change, busy_seconds=RECORD_SECONDS)
            except DatabaseUnavailableError:
                if self.halting.is_set():
                    raise

    def hears(self) -> bool:
        """Whether this process claims when work is due: alive but deaf is not ready."""
        return self._sweeper.longest_wait_seconds < DEAF_SECONDS

    def leave_if_broken(self) -> None:
        """Stops this process in order when its accelerator failed: the supervisor starts one that works."""
        if self._reporter is not None and self._reporter.is_broken:
            self._leave()

    def on_thread_died(self, died: threading.ExceptHookArgs) -> None:
        """The hook for a thread's uncaught error: logged without its text.

        A sender is made again at the next ring. Without the heart, the sweep or the model the process is of no use: it
        leaves and the supervisor starts another.
        """
        log.critical("thread_died", exc_info=died.exc_value)
        if not isinstance(died.thread, Sender):
            self._leave()

    def _leave(self) -> None:
        self.failed.set()
        if not self.stopping.is_set():
            log.critical("worker_leaves", worker=self.name)
            os.kill(os.getpid(), signal.SIGTERM)

    def begin_stop(self, seconds: float) -> None:
        """No new work from here on; what is under way has this long. A shorter time later shortens it.

        The time runs in a thread of its own, because Celery's cold shutdown holds the main thread until the pool is idle.
        """
        self.stopping.set()
        timer = threading.Timer(seconds, self.halting.set)
        timer.daemon = True
        timer.start()

    def stop(self) -> None:
        """Ends the process's work in order; returns when every thread of ours is idle or its time is over."""
        self.begin_stop(self.settings.worker.stop_seconds)
        self._sweeper.close()
        while self._is_busy() and not self.halting.wait(LOOK_SECONDS):
            pass
        self.halting.set()
        limit = time.monotonic() + HALT_SECONDS
        while self._is_busy() and time.monotonic() < limit:
            time.sleep(LOOK_SECONDS)
        self.senders.close(self.settings.worker.stop_seconds)
        self.heart.close()
        if self._reporter is not None:
            self._reporter.close()
        if self._health is not None:
            self._health.close()
        self.doorbell.close()
        self.database.close()
        log.info("worker_stopped", worker=self.name)

    def _is_busy(self) -> bool:
        return any(slots.is_busy for slots in self.slots.values())

    def _require_database(self) -> None:
        limit = time.monotonic() + self.settings.database.busy_seconds
        while True:
            try:
                schema.require_head(self.database)
                return
            except DatabaseUnavailableError:
                if time.monotonic() > limit:
                    raise
                log.warning("database_unavailable", retry_seconds=1)
            time.sleep(1)

    def _database_answers(self) -> bool:
        try:
            with self.database.read() as session:
                session.connection()
        except DatabaseUnavailableError:
            return False
        return True

    def _broker_answers(self) -> bool:
        try:
            self.doorbell.waiting(self.serves[0])
        except BrokerUnavailableError:
            return False
        return True


def _slots(config: Settings, stages: Collection[Stage], concurrency: int, queues_served: int) -> dict[Stage, Slots]:
    """As many slots as the settings ask for, but never all threads: a doorbell must find one to run in."""
    if concurrency < queues_served:
        raise SettingsError(
            f"{concurrency} threads cannot serve {queues_served} queues; raise worker.concurrency or restrict -Q"
        )
    wanted = {
        Stage.PREPARE: config.worker.prepare_slots or max(1, (os.cpu_count() or 2) // 2),
        Stage.DRAFT: config.model.max_batch,
    }
    share = max(1, (concurrency - 1) // max(1, len(stages)))
    return {stage: Slots(min(wanted[stage], share)) for stage in stages}


_current: list[WorkerProcess] = []


def current() -> WorkerProcess:
    """The worker of this process; raises `SettingsError` outside one."""
    if not _current:
        raise SettingsError("no worker runs in this process; start one with `celery -A worker worker`")
    return _current[0]


class Lifecycle(bootsteps.StartStopStep):  # type: ignore[misc]
    """Ties the `WorkerProcess` to Celery's worker: made after the pool and before messages come, ended before the pool."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        self.process: WorkerProcess | None = None

    def start(self, parent: Any) -> None:
        """Makes and starts the process's parts; an error of ours ends the worker with its sentence on stderr."""
        serves = set(parent.app.amqp.queues.consume_from)
        doorbell = queues.Doorbell(queues.new_app(settings.current()))
        try:
            self.process = WorkerProcess(settings.current(), serves, parent.concurrency, doorbell)
            threading.excepthook = self.process.on_thread_died
            self.process.start()
        except Mu2Error as error:
            sys.stderr.write(f"{error}\n")  # Celery logs it too, but the log leaves out ports, paths and revisions
            raise
        _current[:] = [self.process]
        signals.worker_shutting_down.connect(self._on_shutting_down)
        self._celerys_sigquit = signal.signal(signal.SIGQUIT, self._on_sigquit)

    def close(self, parent: Any) -> None:
        """No new work from here on."""
        if self.process is not None:
            self.process.stopping.set()

    def stop(self, parent: Any) -> None:
        """Ends the process's parts, with patience for what is under way."""
        if self.process is not None:
            self.process.stop()

    def terminate(self, parent: Any) -> None:
        """Ends the process's parts; drafts under way are given back at once."""
        if self.process is not None:
            self.process.begin_stop(0)
            self.process.stop()

    def _on_shutting_down(self, **_: Any) -> None:
        """SIGTERM or Ctrl-C: heard here before Celery's loop comes round."""
        if self.process is not None:
            self.process.begin_stop(self.process.settings.worker.stop_seconds)

    def _on_sigquit(self, number: int, frame: Any) -> None:
        """Cold shutdown: Celery's handler waits for the pool, which would work on for ever without this."""
        if self.process is not None:
            self.process.begin_stop(0)
        if callable(self._celerys_sigquit):
            self._celerys_sigquit(number, frame)
