"""The listener as a whole: its parts, their start and their clean end. `serve()` is the process."""

import logging
import ssl
import threading
import time
import warnings
from collections.abc import Callable
from socket import socket

import pydicom.config
import structlog

from dicom_listener.arrivals import Completer, Holds, Ranking, Recovery, Submit
from dicom_listener.association import Association, Ending
from dicom_listener.commitment import CommitmentService
from dicom_listener.committer import Committer
from dicom_listener.door import Door, listen, oldest_of_busiest
from dicom_listener.handlers import Services
from dicom_listener.metrics import Metrics
from dicom_listener.negotiation import Refusal, Refused
from dicom_listener.storage import Store
from worker.core import audit
from worker.core.database import Database
from worker.core.errors import DatabaseUnavailableError, SettingsError, StoreUnavailableError
from worker.core.health import HealthServer
from worker.core.settings import DicomSettings, Settings

log = structlog.get_logger(__name__)

HALF_OPEN = 32  # associations that have spoken but not yet named themselves; more shed the oldest
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
        log.warning("association_refused", address=address, reason=refused.reason.value, count=repeats)
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
        except DatabaseUnavailableError as error:
            log.error("audit_unavailable", error=type(error).__name__)


class Listener:
    """One listening process; `start`, then `close`. Raises `SettingsError` or `StoreUnavailableError` at the start."""

    def __init__(self, settings: Settings, submit: Submit) -> None:
        self.settings: DicomSettings = settings.dicom
        self.metrics = Metrics()
        self.tls = _tls(settings.dicom)
        self._database = Database.from_settings(settings)
        self._store = Store(settings.store_root, settings.store.floor_bytes)
        self._holds = Holds(settings.dicom.open_association_limit_seconds)
        ranking = Ranking(settings.queue.priority_rules)
        self._recovery = Recovery(self._store, self._database, ranking, self.metrics)
        self._committer = Committer(self._store, self._database, self.metrics, self._recovery.request)
        self._completer = Completer(
            self._database, settings.dicom.quiet_seconds, self._holds.held, submit, self.metrics
        )
        self.commitments = CommitmentService(settings.dicom, self._store, self._database)
        self.services = Services(self._store, self._committer, self._holds, ranking, self.metrics)
        self._refusals = Refusals(self._database, self.metrics)
        self._lock = threading.Lock()
        self._associations: dict[int, Association] = {}  # in order of age
        self._established = 0
        self._number = 0
        self._stopping = False
        self._door: Door | None = None
        self._health: HealthServer | None = None
        self.port = 0
        self.metrics_port = 0

    def start(self) -> None:
        """Opens the store, starts the threads, then the port."""
        self._store.open()
        for part in (self._recovery, self._completer, self.commitments):
            part.start()
        settings = self.settings
        try:
            listening = listen(settings.host, settings.port)
        except OSError as error:
            raise SettingsError(
                f"cannot listen on {settings.host} port {settings.port} ({error.strerror}); "
                "stop what holds it or set MU2_DICOM__PORT"
            ) from error
        self.port = listening.getsockname()[1]
        self._door = Door(listening, self._enter, settings.artim_seconds, self.metrics)
        self._door.start()
        checks = {"database": self._database_answers, "store": self._store_has_room, "rows": self._recovery.done}
        self._health = HealthServer(settings.host, settings.metrics_port, self.metrics.registry, checks)
        self.metrics_port = self._health.port
        log.info("listener_started", host=settings.host, port=self.port, tls=self.tls is not None)

    def close(self) -> None:
        """Lets what is being received finish for `STOP_SECONDS`, answers it, aborts the rest, and ends every thread."""
        with self._lock:
            self._stopping = True
        if self._door is not None:
            self._door.close()
        for association in self._open():
            association.stop()
        limit = time.monotonic() + STOP_SECONDS
        for association in self._open():
            association.join(max(0.0, limit - time.monotonic()))
        for association in self._open():
            association.cut()
            association.join(1.0)
        for part in (self._completer, self._recovery, self.commitments, self._committer):
            part.close()
        if self._health is not None:
            self._health.close()
        self._store.close()
        self._database.close()
        log.info("listener_stopped")

    def admit(self, association: Association) -> Refusal | None:
        """Counts an association in once its request is there, or says why not."""
        with self._lock:
            if self._stopping:
                return Refusal.STOPPING
            if self._established >= self.settings.max_associations:
                return Refusal.TOO_MANY
            association.established = True
            self._established += 1
            self.metrics.open_associations.set(self._established)
            return None

    def refused(self, refused: Refused, address: str) -> None:
        """Logs and audits a refused association."""
        self._refusals.note(refused, address)

    def ended(self, association: Association, ending: Ending) -> None:
        """Forgets an association; its studies are no longer held back."""
        with self._lock:
            del self._associations[association.number]
            if association.established:
                self._established -= 1
                self.metrics.open_associations.set(self._established)
            self.metrics.half_open.set(len(self._associations) - self._established)
        self._holds.end(association.number)
        if ending is not Ending.REFUSED:
            self.metrics.associations.labels(ending.value).inc()

    def _enter(self, connection: socket, address: str) -> None:
        """Gives a connection its thread; the oldest half-open one goes when there are too many."""
        with self._lock:
            self._number += 1
            association = Association(self, self._number, connection, address)
            half_open = [a for a in self._associations.values() if not a.established]
            if len(half_open) >= HALF_OPEN:
                half_open[oldest_of_busiest(a.address for a in half_open)].cut()
                self.metrics.shed.inc()
            self._associations[association.number] = association
            self.metrics.half_open.set(len(half_open) + 1)
        association.start()

    def _open(self) -> list[Association]:
        with self._lock:
            return list(self._associations.values())

    def _database_answers(self) -> bool:
        try:
            with self._database.read() as session:
                session.connection().exec_driver_sql("SELECT 1")
        except DatabaseUnavailableError:
            return False
        return True

    def _store_has_room(self) -> bool:
        try:
            self._store.check_floor()
        except StoreUnavailableError:
            return False
        return True


def serve(
    settings: Settings, stop: threading.Event, submit: Submit, ready: Callable[[Listener], None] | None = None
) -> None:
    """Runs the listener until `stop` is set; `ready` is called with it once its port is open."""
    quieten_libraries()
    listener = Listener(settings, submit)
    listener.start()
    try:
        if ready is not None:
            ready(listener)
        stop.wait()
    finally:
        listener.close()


def quieten_libraries() -> None:
    """Silences pydicom and pynetdicom, which quote what peers send in warnings and logs."""
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    for name in ("pynetdicom", "pydicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module=r"py(net)?dicom\b")


def _tls(settings: DicomSettings) -> ssl.SSLContext | None:
    """The server's TLS context, or None when no certificate is set."""
    if settings.tls_certificate is None:
        if settings.tls_key or settings.tls_ca or any(peer.tls for peer in settings.peers):
            raise SettingsError("TLS is asked for without MU2_DICOM__TLS_CERTIFICATE; set it and MU2_DICOM__TLS_KEY")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(settings.tls_certificate, settings.tls_key)
        if settings.tls_ca is not None:
            context.load_verify_locations(settings.tls_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"a TLS file cannot be read ({type(error).__name__}); look at MU2_DICOM__TLS_*") from error
    return context
