"""Delivery: one thread a destination and process, so that a slow or dead destination holds up nobody else.

A sender is made when its destination is first rung and keeps its MLLP connection. It claims the next message, sends it
and records the answer, until nothing is due; the sweep rings again when a back-off is over.
"""

import threading
import time
from collections.abc import Callable, Iterable

import structlog
from sqlalchemy.orm import Session

from worker.core import outbox
from worker.core.database import Database
from worker.core.errors import (
    DatabaseUnavailableError,
    DeliveryRefusedError,
    DeliveryUnavailableError,
    FinalError,
    LeaseLostError,
    Mu2Error,
    RetryableError,
    SettingsError,
)
from worker.core.outbox import Claimed
from worker.core.settings import Destination, Hl7Settings
from worker.delivery.acknowledgement import Acknowledgement
from worker.delivery.mllp import MllpConnection
from worker.metrics import Metrics

log = structlog.get_logger(__name__)

CLAIM_SECONDS = 2.0  # a claim waits this long for the database; the sweep rings again
RECORD_SECONDS = 5.0  # one try to record an answer; tried again until the worker stops
LEASE_MARGIN_SECONDS = 5.0


def lease_seconds(destination: Destination) -> float:
    """How long one send may take: connection, answer, the application's answer, and a margin to record it."""
    answers = 2 if destination.wait_for_application_answer else 1
    return destination.connect_seconds + answers * destination.answer_seconds + LEASE_MARGIN_SECONDS


class Senders:
    """The senders of one process. Safe for threads."""

    def __init__(self, database: Database, settings: Hl7Settings, metrics: Metrics) -> None:
        self._database = database
        self._settings = settings
        self._metrics = metrics
        self._destinations = {destination.name: destination for destination in settings.destinations}
        self._senders: dict[str, Sender] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def ring(self, name: str) -> bool:
        """Wakes the sender of a destination, made at the first ring; says whether this worker knows the destination."""
        destination = self._destinations.get(name)
        if destination is None or self._stop.is_set():
            return False
        with self._lock:
            if name not in self._senders or not self._senders[name].is_alive():
                self._senders[name] = Sender(self._database, destination, self._settings, self._metrics, self._stop)
                self._senders[name].start()
            self._senders[name].ring()
        return True

    def close(self, seconds: float) -> None:
        """Lets every sender finish the message under way, for at most `seconds` in all senders together."""
        self._stop.set()
        with self._lock:
            senders = list(self._senders.values())
        for sender in senders:
            sender.ring()
        _join(senders, seconds)


class Sender(threading.Thread):
    """Sends what is due to one destination, one message at a time, in the outbox's order."""

    def __init__(
        self,
        database: Database,
        destination: Destination,
        settings: Hl7Settings,
        metrics: Metrics,
        stop: threading.Event,
    ) -> None:
        super().__init__(name=f"send-{destination.name}", daemon=True)
        self._database = database
        self._destination = destination
        self._settings = settings
        self._metrics = metrics
        self._stop_event = stop
        self._rung = threading.Event()
        self._connection = MllpConnection(destination)

    def ring(self) -> None:
        """Something may be due."""
        self._rung.set()

    def run(self) -> None:
        """Sends until the process stops."""
        structlog.contextvars.bind_contextvars(destination=self._destination.name)
        with self._connection:
            while not self._stop_event.is_set():
                self._rung.wait()
                self._rung.clear()
                try:
                    while not self._stop_event.is_set() and self._send_next():
                        pass
                except DatabaseUnavailableError:
                    log.warning("delivery_waits_for_database")

    def _send_next(self) -> bool:
        """Sends one message; False when nothing is due. Raises `DatabaseUnavailableError` when none could be claimed."""
        claimed = self._database.run(
            lambda session: outbox.claim(session, self._destination.name, lease_seconds(self._destination)),
            busy_seconds=CLAIM_SECONDS,
        )
        if claimed is None:
            return False
        change, outcome, code = self._try(claimed)
        self._record(claimed, change)
        self._metrics.messages.labels(self._destination.name, outcome).inc()
        log.info(
            "message_tried",
            study_id=claimed.study_id,
            message_id=claimed.message_id,
            outcome=outcome,
            code=code,
            attempt=claimed.attempts + 1,
        )
        return True

    def _try(self, claimed: Claimed) -> tuple[Callable[[Session], None], str, str]:
        """Sends, and returns how to record the answer, its name for the metrics, and its code."""
        try:
            answer: Acknowledgement = self._connection.send(claimed.payload, claimed.control_id)
        except (RetryableError, SettingsError) as error:  # TLS files that cannot be read may be mended meanwhile
            return self._retry(claimed, error), "retry", _code(error)
        except FinalError as error:
            return self._refuse(claimed, error), "refused", _code(error)
        return (lambda session: outbox.acknowledge(session, claimed, answer.code, answer.text)), "sent", answer.code

    def _refuse(self, claimed: Claimed, error: Mu2Error) -> Callable[[Session], None]:
        return lambda session: outbox.refuse(session, claimed, error, _code(error), _text(error))

    def _retry(self, claimed: Claimed, error: Mu2Error) -> Callable[[Session], None]:
        return lambda session: outbox.retry_later(
            session,
            claimed,
            error,
            max_attempts=self._settings.max_attempts,
            backoff_seconds=self._settings.backoff_seconds,
            code=_code(error),
            answer_text=_text(error),
        )

    def _record(self, claimed: Claimed, change: Callable[[Session], None]) -> None:
        """Records an answer however long the database is away.

        When the worker stops first, or another sender took over, the same bytes go out again under the same control id,
        which the receiver recognises.
        """
        while True:
            try:
                self._database.run(change, busy_seconds=RECORD_SECONDS)
                return
            except DatabaseUnavailableError:
                if self._stop_event.is_set():
                    log.error("answer_not_recorded", message_id=claimed.message_id)
                    return
            except LeaseLostError:
                log.warning("message_lease_lost", message_id=claimed.message_id)
                return


def _code(error: Mu2Error) -> str:
    return error.code if isinstance(error, DeliveryUnavailableError | DeliveryRefusedError) else ""


def _text(error: Mu2Error) -> str:
    return error.answer_text if isinstance(error, DeliveryUnavailableError | DeliveryRefusedError) else ""


def _join(senders: Iterable[threading.Thread], seconds: float) -> None:
    limit = time.monotonic() + seconds
    for sender in senders:
        sender.join(timeout=max(0.0, limit - time.monotonic()))
