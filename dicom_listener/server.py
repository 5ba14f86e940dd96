"""The listener as a whole: its parts, their start and their clean end. `serve()` is the process."""

import itertools
import logging
import threading
import warnings
from collections.abc import Callable
from socket import socket

import pydicom.config
import structlog

from dicom_listener.arrivals import Completer, Holds, Ranking, Recovery, Submit
from dicom_listener.association import Association
from dicom_listener.committer import Committer, LocalRows
from dicom_listener.corrected_headers import Corrections
from dicom_listener.door import Door, Entrance, listen
from dicom_listener.metrics import Metrics
from dicom_listener.receivers import ROWS_THREAD, Pool
from dicom_listener.reception import Reception
from worker.core.database import Database
from worker.core.errors import DatabaseUnavailableError, SettingsError, StoreUnavailableError
from worker.core.health import HealthServer
from worker.core.settings import Settings

log = structlog.get_logger(__name__)


class Listener:
    """One listener; `start`, then `close`. Raises `SettingsError` or `StoreUnavailableError` at the start."""

    def __init__(self, settings: Settings, submit: Submit) -> None:
        self._settings = settings
        self.metrics = Metrics()
        self._database = Database.from_settings(settings)
        self._reception = Reception(settings, self._database, self.metrics)
        self._committer = Committer(self._database, self.metrics, self._recover)
        self._corrections = Corrections(self._reception.store, self._database)
        self._holds = Holds(settings.dicom.open_association_limit_seconds)
        self._numbers = itertools.count()
        self._pool = Pool(settings, self._rows, self._recover) if settings.dicom.processes > 1 else None
        ranking = Ranking.of(settings)
        self._recovery = Recovery(self._reception.store, self._database, ranking, self.metrics)
        self._completer = Completer(self._database, settings.dicom.quiet_seconds, self._holds, submit, self.metrics)
        self._door: Door | None = None
        self._closing = False
        self._health: HealthServer | None = None
        self.port = 0
        self.tls_port: int | None = None  # where the two are apart
        self.metrics_port = 0

    def start(self) -> None:
        """Opens the store, starts the threads and receiving processes, then the port."""
        self._reception.store.open()
        registry = self.metrics.registry
        if self._pool is not None:
            self._pool.start()
            registry = self._pool.merged(registry)
        self._recovery.start()
        self._reception.commitments.start()
        settings = self._settings.dicom
        enter = self._pool.enter if self._pool else self._enter
        self._door = Door(self._entrances(), enter, settings.artim_seconds, self.metrics)
        self._door.start()
        self._completer.start()
        checks = {"database": self._database_answers, "store": self._store_has_room, "rows": self._recovery.done}
        where = settings.metrics_host, settings.metrics_port
        self._health = HealthServer(*where, registry, checks, self.is_alive, group="DICOM")
        self.metrics_port = self._health.port
        log.info("listener_started", host=settings.host, port=self.port, tls=self._reception.tls is not None)

    def _entrances(self) -> list[Entrance]:
        dicom, tls = self._settings.dicom, self._reception.tls is not None
        if dicom.tls_port is None:
            only = Entrance(_listen(dicom.host, dicom.port, "PORT"), tls)
            self.port = only.listener.getsockname()[1]
            return [only]
        plain = Entrance(_listen(dicom.host, dicom.port, "PORT"))
        try:
            secure = Entrance(_listen(dicom.host, dicom.tls_port, "TLS_PORT"), tls=True)
        except SettingsError:
            plain.listener.close()
            raise
        self.port, self.tls_port = (entrance.listener.getsockname()[1] for entrance in (plain, secure))
        return [plain, secure]

    def close(self) -> None:
        """Lets what is being received finish for a bounded time, answers it, aborts the rest, and ends every thread."""
        self._closing = True
        if self._door is not None:
            self._door.close()
        if self._pool is not None:
            self._pool.close()
        for part in (self._completer, self._recovery, self._reception.commitments, self._reception, self._committer):
            part.close()
        if self._health is not None:
            self._health.close()
        self._database.close()
        log.info("listener_stopped")

    def is_alive(self) -> bool:
        """Whether every thread runs without which this listener is of no use, or is being ended in order."""
        parts = (self._door, self._pool, self._completer, self._recovery, self._reception.commitments)
        return self._closing or all(part.is_alive() for part in parts if part is not None)

    def _enter(self, connection: socket, address: str, tls: bool) -> None:
        self._reception.enter(connection, address, self._rows(), tls=tls)

    def _rows(self) -> LocalRows:
        return LocalRows(self._committer, self._corrections, self._holds, next(self._numbers))

    def _recover(self) -> None:
        self._recovery.request()

    def _database_answers(self) -> bool:
        try:
            with self._database.read() as session:
                session.connection().exec_driver_sql("SELECT 1")
        except DatabaseUnavailableError:
            return False
        return True

    def _store_has_room(self) -> bool:
        try:
            self._reception.store.check_floor()
        except StoreUnavailableError:
            return False
        return True


def _listen(host: str, port: int, setting: str) -> socket:
    try:
        return listen(host, port)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {host} port {port} ({error.strerror}); stop what holds it or set MU2_DICOM__{setting}"
        ) from error


def serve(
    settings: Settings, stop: threading.Event, submit: Submit, ready: Callable[[Listener], None] | None = None
) -> bool:
    """Runs the listener until `stop` is set; `ready` is called with it once its port is open.

    Returns false when it left because a thread died without which it is of no use: the supervisor starts another.
    """
    quieten_libraries()
    listener = Listener(settings, submit)
    died = threading.Event()

    def on_thread_died(dead: threading.ExceptHookArgs) -> None:
        log.critical("thread_died", exc_info=dead.exc_value)  # the log writes no text of an error
        if not (isinstance(dead.thread, Association) or (dead.thread and dead.thread.name == ROWS_THREAD)):
            died.set()
            stop.set()

    hook, threading.excepthook = threading.excepthook, on_thread_died
    try:
        listener.start()
        if ready is not None:
            ready(listener)
        stop.wait()
        if died.is_set():
            log.critical("listener_leaves")
    finally:
        listener.close()
        threading.excepthook = hook
    return not died.is_set()


def quieten_libraries() -> None:
    """Silences pydicom and pynetdicom, which quote what peers send in warnings and logs."""
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    for name in ("pynetdicom", "pydicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module=r"py(net)?dicom\b")
