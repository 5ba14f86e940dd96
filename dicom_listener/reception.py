"""All associations of one process: their limits, their parts, their end. A listener has one, a receiving process too."""

import threading
import time
from socket import socket

import structlog
from sqlalchemy.exc import SQLAlchemyError

from dicom_listener.arrivals import Ranking
from dicom_listener.association import Association, Ending
from dicom_listener.commitment import CommitmentService
from dicom_listener.committer import Rows
from dicom_listener.door import oldest_of_busiest
from dicom_listener.handlers import Services
from dicom_listener.metrics import Metrics
from dicom_listener.negotiation import Refusal, Refused
from dicom_listener.storage import Store
from dicom_listener.tls import server_context
from worker.core import audit
from worker.core.database import Database
from worker.core.errors import DatabaseUnavailableError
from worker.core.settings import DicomSettings, Settings

log = structlog.get_logger(__name__)

HALF_OPEN = 32  # associations that have spoken but not yet named themselves; more shed the oldest
SHED_SECONDS = 0.1  # one that is shed is waited for, so that its thread is gone before the next begins
STOP_SECONDS = 10.0  # what is being received may finish within this
AUDIT_BUSY_SECONDS = 2.0
REFUSAL_QUIET_SECONDS = 60.0  # a peer that is refused again for the same reason is counted, not audited anew
MOST_REFUSALS_REMEMBERED = 1_024


class Refusals:
    """Logs and audits refused associations, each peer and reason once a minute, so that a flood cannot fill the audit."""

    def __init__(self, database: Database, metrics: Metrics) -> None:
        self._database = database
        self._metrics = metrics
        self._lock = threading.Lock()
        self._noted: dict[tuple[str, str, Refusal], tuple[float, int]] = {}  # when audited, how often since

    def note(self, refused: Refused, address: str) -> None:
        """Notes one refused association."""
        self._metrics.associations.labels(Ending.REFUSED.value).inc()
        key = (address, refused.calling_ae_title, refused.reason)
        with self._lock:
            noted_at, repeats = self._noted.get(key, (float("-inf"), 0))
            if time.monotonic() - noted_at < REFUSAL_QUIET_SECONDS:
                self._noted[key] = (noted_at, repeats + 1)
                return
            if len(self._noted) >= MOST_REFUSALS_REMEMBERED:
                self._noted.clear()
            self._noted[key] = (time.monotonic(), 0)
        log.warning("association_refused", address=address, reason=refused.reason, count=repeats)
        try:
            self._database.run(
                lambda session: audit.append(
                    session,
                    "association_refused",
                    actor=f"ae:{refused.calling_ae_title}",
                    origin=address,
                    outcome="refused",
                    reason=refused.reason.value,
                    repeats=repeats,
                ),
                busy_seconds=AUDIT_BUSY_SECONDS,
            )
        except (DatabaseUnavailableError, SQLAlchemyError) as error:
            log.error("audit_unavailable", exc_info=error)


class Reception:
    """Serves connections that have begun to speak. Raises `SettingsError` or `StoreUnavailableError` at the start."""

    def __init__(self, settings: Settings, database: Database, metrics: Metrics) -> None:
        self.settings: DicomSettings = settings.dicom
        self.tls = server_context(settings.dicom)
        self.store = Store(settings.store_root, settings.store.floor_bytes)
        self.commitments = CommitmentService(settings.dicom, self.store, database)
        self.services = Services(self.store, Ranking.of(settings), metrics)
        self._metrics = metrics
        self._refusals = Refusals(database, metrics)
        self._lock = threading.Lock()
        self._associations: dict[int, Association] = {}  # in order of age
        self._established = 0
        self._number = 0
        self._stopping = False

    @property
    def entered(self) -> int:
        """Connections taken in so far."""
        return self._number

    @property
    def present(self) -> int:
        """Connections served now."""
        return len(self._associations)

    def enter(self, connection: socket, address: str, rows: Rows, *, tls: bool) -> None:
        """Gives a connection its thread; the oldest half-open one goes when there are too many.

        `tls` says that it came in by a port that speaks TLS. Raises `RuntimeError` when the system gives no thread; the
        connection is then as it was.
        """
        self._make_room()
        with self._lock:
            self._number += 1
            association = Association(self, self._number, connection, address, rows, self.tls if tls else None)
            self._associations[association.number] = association
            self._metrics.half_open.set(len(self._associations) - self._established)
        try:
            association.start()
        except RuntimeError:  # no more threads: the connection is the caller's again
            rows.close()
            self.ended(association, Ending.CONNECTION_LOST)
            raise

    def _make_room(self) -> None:
        """Sheds a half-open association when there are too many, one that was not shed before and is still on its way out."""
        with self._lock:
            half_open = [a for a in self._associations.values() if not a.established and not a.leaving]
            if len(half_open) < HALF_OPEN:
                return
            shed = half_open[oldest_of_busiest(a.address for a in half_open)]
            shed.cut()
        self._metrics.shed.inc()
        shed.join(SHED_SECONDS)

    def admit(self, association: Association) -> Refusal | None:
        """Counts an association in once its request is there, or says why not."""
        with self._lock:
            if self._stopping:
                return Refusal.STOPPING
            if self._established >= self.settings.max_associations:
                return Refusal.TOO_MANY
            association.established = True
            self._established += 1
            self._metrics.open_associations.set(self._established)
            return None

    def refused(self, refused: Refused, address: str) -> None:
        """Logs and audits a refused association."""
        self._refusals.note(refused, address)

    def ended(self, association: Association, ending: Ending) -> None:
        """Forgets an association."""
        with self._lock:
            del self._associations[association.number]
            if association.established:
                self._established -= 1
                self._metrics.open_associations.set(self._established)
            self._metrics.half_open.set(len(self._associations) - self._established)
        if ending is not Ending.REFUSED:
            self._metrics.associations.labels(ending.value).inc()

    def close(self) -> None:
        """Lets what is being received finish for `STOP_SECONDS`, answers it, and aborts the rest."""
        with self._lock:
            self._stopping = True
        for association in self._open():
            association.stop()
        limit = time.monotonic() + STOP_SECONDS
        for association in self._open():
            association.join(max(0.0, limit - time.monotonic()))
        for association in self._open():
            association.cut()
            association.join(1.0)
        self.store.close()

    def _open(self) -> list[Association]:
        with self._lock:
            return list(self._associations.values())
