"""The Celery tasks: each is a doorbell that works until nothing is due. Retry policy and recorded outcome, nothing else.

A doorbell takes a slot of its stage without waiting. When every slot is busy it goes home at once: whoever holds a slot
claims the next study anyway. So doorbells never block the pool, and a thousand waiting studies need a few rings.
"""

import threading
import time
from collections.abc import Callable

import structlog
from celery import Task

from worker import evidence, pipeline, process, queues
from worker.celery import app
from worker.claims import Hold
from worker.core import logs, studies
from worker.core.errors import (
    BrokerUnavailableError,
    DatabaseUnavailableError,
    LeaseLostError,
    RetryableError,
)
from worker.core.records import Stage
from worker.core.studies import Claim
from worker.inference.reporter import Deadline
from worker.process import WorkerProcess

log = structlog.get_logger(__name__)


@app.task(name=queues.TASKS[queues.PREPARE], bind=True)
def prepare(self: Task, study_id: str) -> None:
    """Prepares the most urgent complete study, and the next ones, until none is due."""
    answer(process.current(), Stage.PREPARE, self.request.id)


@app.task(name=queues.TASKS[queues.DRAFT], bind=True)
def draft(self: Task, study_id: str) -> None:
    """Drafts the most urgent prepared study, and the next ones, until none is due; then answers requests for evidence."""
    answer(process.current(), Stage.DRAFT, self.request.id)
    answer_evidence(process.current())


@app.task(name=queues.TASKS[queues.DELIVER])
def deliver(destination: str) -> None:
    """Wakes the sender of a destination."""
    if not process.current().senders.ring(destination):
        log.warning("destination_unknown", destination=destination)


def answer(worker: WorkerProcess, stage: Stage, task_id: str) -> None:
    """Works on a stage until nothing is due, the worker stops, or every slot is busy."""
    slots = worker.slots[stage]
    while True:
        slots.rung.set()
        if not slots.take():
            return  # whoever holds the last slot looks at `rung` before it goes home
        try:
            slots.rung.clear()
            while not worker.stopping.is_set() and _do_next(worker, stage, task_id):
                pass
        finally:
            slots.give()
        if worker.stopping.is_set() or not slots.rung.is_set():
            return


def answer_evidence(worker: WorkerProcess) -> None:
    """Answers requests for evidence, one after the other, while no draft is due here."""
    try:
        while not worker.stopping.is_set() and _answer_request(worker):
            pass
    except DatabaseUnavailableError:
        log.warning("claim_waits_for_database", stage="evidence")


def _answer_request(worker: WorkerProcess) -> bool:
    """Answers one request; False when none waits. Raises `DatabaseUnavailableError`."""
    seconds = worker.settings.model.deadline_seconds
    request = worker.record(lambda session: evidence.claim(session, worker.name, seconds))
    if request is None:
        return False
    deadline = Deadline.after(seconds, worker.halting)
    logs.bind(study_id=request.study_id, stage="evidence")
    try:
        error = _caught(lambda: evidence.answer(worker.means, request, worker.reporter, deadline))
        if error is not None:
            worker.record(lambda session: evidence.settle(session, request, error))
        log.info("evidence_answered", outcome="done" if error is None else "refused", exc_info=error)
    finally:
        logs.unbind()
    return True


def _do_next(worker: WorkerProcess, stage: Stage, task_id: str) -> bool:
    """Claims and does one study; False when nothing is due or the database is away."""
    try:
        claim, more = worker.claim(stage)
    except DatabaseUnavailableError:
        log.warning("claim_waits_for_database", stage=stage.value)
        return False
    if claim is None:
        return False
    logs.bind(study_id=claim.study_id, task_id=task_id, stage=stage.value, revision=claim.revision)
    try:
        if more:
            _ring(worker, stage.value, claim.study_id)  # for the next free slot, here or on another machine
        with worker.heart.hold(claim) as hold:
            _do(worker, claim, hold)
    finally:
        logs.unbind()
    return True


def _do(worker: WorkerProcess, claim: Claim, hold: Hold) -> None:
    """One stage of one study, its outcome recorded and counted."""
    started = time.monotonic()
    work = {Stage.PREPARE: _prepare, Stage.DRAFT: _draft}[claim.stage]
    outcome = _record_outcome(worker, claim, lambda: work(worker, claim, hold.lost))
    seconds = time.monotonic() - started
    worker.metrics.studies.labels(claim.stage.value, outcome).inc()
    worker.metrics.stage_seconds.labels(claim.stage.value).observe(seconds)
    log.info("stage_ended", outcome=outcome, seconds=round(seconds, 3), attempt=claim.attempts + 1)


def _prepare(worker: WorkerProcess, claim: Claim, lost: threading.Event) -> None:
    pipeline.prepare(worker.means, claim)
    _ring(worker, queues.DRAFT, claim.study_id)


def _draft(worker: WorkerProcess, claim: Claim, lost: threading.Event) -> None:
    deadline = Deadline.after(worker.settings.model.deadline_seconds, lost, worker.halting)
    for destination in pipeline.draft(worker.means, claim, worker.reporter, deadline):
        _ring(worker, queues.DELIVER, destination)


def _record_outcome(worker: WorkerProcess, claim: Claim, work: Callable[[], None]) -> str:
    """Runs the work and records what became of it; returns the outcome's name."""
    error = _caught(work)
    if error is None:
        return "done"
    try:
        return _settle(worker, claim, error)
    except LeaseLostError:
        worker.metrics.leases_lost.labels(claim.stage.value).inc()
        log.warning("result_refused")
    except DatabaseUnavailableError:
        log.error("outcome_not_recorded")  # the worker stops; the lease runs out and the stage is done again
    return "lost"


def _caught(work: Callable[[], None]) -> Exception | None:
    """Runs the work and returns what it raised: the task's door, where one study's surprise must not end the others."""
    try:
        work()
    except Exception as error:  # noqa: BLE001
        return error
    return None


def _settle(worker: WorkerProcess, claim: Claim, error: Exception) -> str:
    """The one place where an error's class decides what becomes of a study. Raises `LeaseLostError`."""
    if isinstance(error, LeaseLostError):
        raise error
    if isinstance(error, RetryableError) and worker.halting.is_set() and worker.failed.is_set():
        # Given back free, a study that breaks each process would do so for ever: the lease runs out and counts as a crash.
        log.error("lease_left", exc_info=error)
        return "lost"
    if isinstance(error, RetryableError) and worker.halting.is_set():
        worker.record(lambda session: studies.give_back(session, claim))
        log.info("stage_given_back")
        return "stopped"
    if isinstance(error, RetryableError):
        waits = worker.record(lambda session: studies.postpone(session, claim, error, worker.limits))
        log.warning("stage_postponed" if waits else "stage_given_up", exc_info=error)
        return "retry" if waits else "failed"
    worker.record(lambda session: studies.fail(session, claim, error))
    log.error("stage_failed", exc_info=error)
    return "failed"


def _ring(worker: WorkerProcess, queue: str, subject: str) -> None:
    try:
        worker.doorbell.ring(queue, subject)
    except BrokerUnavailableError as error:
        log.warning("ring_failed", queue=queue, error=type(error).__name__)  # the sweep rings when the broker is back
