"""Several receiving processes behind one door, for machines with more cores than one Python process can use.

    listener: door, rows, completion,  ──connection, channel for its rows──▶  receiving process: associations, store
    recovery, metrics                  ◀──what it serves and has counted────

A connection that has begun to speak is handed, as a descriptor over a Unix socket, to the process that serves the fewest,
and with it one end of a channel. What the association has made durable in the store goes through the channel to the
listener, which commits the rows of all processes in common groups; so the database has one writer, and the end of the
channel says that the association is over. The end of a process's own socket tells it to finish and end, also when the
listener was killed.
"""

import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from dicom_listener.committer import Rows
from dicom_listener.metrics import Metrics
from dicom_listener.reception import STOP_SECONDS, Reception
from worker.core import logs
from worker.core.arrivals import Arrival, Recorded
from worker.core.database import Database
from worker.core.errors import DatabaseUnavailableError, Mu2Error, StoreUnavailableError
from worker.core.settings import Settings

log = structlog.get_logger(__name__)

STATUS_SECONDS = 0.25
START_SECONDS = 60.0
RESTART_PAUSE_SECONDS = 0.5  # a process that dies at once must not be started in a tight loop
ROWS_THREAD = "rows"  # one for each association; its end ends no other
MESSAGE_BYTES = 200_000  # below the system's limit of one packet
_GAUGE = "gauge"

Samples = list[tuple[str, str, dict[str, str], float]]  # family, sample name, labels, value


@dataclass
class _Receiver:
    """One receiving process as the listener sees it."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    sent: int = 0  # connections handed over
    entered: int = 0  # of these, taken in by the last status
    present: int = 0
    samples: Samples = field(default_factory=list)
    started: threading.Event = field(default_factory=threading.Event)

    @property
    def load(self) -> int:
        return self.present + self.sent - self.entered


class Pool:
    """The receiving processes; `enter` is called by one thread."""

    def __init__(self, settings: Settings, rows: Callable[[], Rows], on_lost_rows: Callable[[], None]) -> None:
        count = settings.dicom.processes
        share = -(-settings.dicom.max_associations // count)
        dicom = settings.dicom.model_copy(update={"processes": 1, "max_associations": share})
        self._settings = settings.model_copy(update={"dicom": dicom})
        self._count = count
        self._rows = rows
        self._on_lost_rows = on_lost_rows  # a process died between file and row
        self._lock = threading.Lock()
        self._receivers: list[_Receiver] = []
        self._retired: Samples = []  # counts of processes that died
        self._running = False
        self._stopping = False
        self._thread = threading.Thread(target=self._watch, name="receivers", daemon=True)

    def start(self) -> None:
        """Starts the processes and waits until each can receive; raises `StoreUnavailableError` when one cannot."""
        with self._lock:
            self._receivers = [self._launch() for _ in range(self._count)]
            waiting = list(self._receivers)
        self._thread.start()
        limit = time.monotonic() + START_SECONDS
        for receiver in waiting:
            receiver.started.wait(max(0.0, limit - time.monotonic()))
            if receiver.process.poll() is not None or not receiver.started.is_set():
                raise StoreUnavailableError("a receiving process did not start; its error stands above")
        self._running = True

    def close(self) -> None:
        """Lets every process finish what it receives, then ends it."""
        self._stopping = True
        if self._thread.is_alive():
            self._thread.join()
        for receiver in self._receivers:
            receiver.control.close()
        limit = time.monotonic() + STOP_SECONDS + 5.0
        for receiver in self._receivers:
            try:
                receiver.process.wait(max(0.1, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                receiver.process.kill()
                receiver.process.wait()

    def is_alive(self) -> bool:
        """Whether the thread that watches over the processes runs."""
        return self._thread.is_alive()

    def enter(self, connection: socket.socket, address: str, tls: bool) -> None:
        """Hands a connection to the process that serves the fewest."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        guest = json.dumps([address, tls]).encode()
        with connection, theirs, self._lock:
            for receiver in sorted(self._receivers, key=lambda r: r.load):
                try:
                    socket.send_fds(receiver.control, [guest], [connection.fileno(), theirs.fileno()])
                except OSError as error:  # it just died, or its queue is full
                    log.warning("receiver_unavailable", error=type(error).__name__)
                    continue
                receiver.sent += 1
                self._serve_rows(ours)
                return
        ours.close()

    def _serve_rows(self, channel: socket.socket) -> None:
        try:
            threading.Thread(target=_serve_rows, args=(channel, self._rows()), name=ROWS_THREAD, daemon=True).start()
        except RuntimeError:  # the process hears the channel's end and answers "out of resources"
            channel.close()
            raise

    def merged(self, registry: CollectorRegistry) -> CollectorRegistry:
        """A registry that adds the processes' figures to the listener's own."""
        merged = CollectorRegistry()
        merged.register(_Merged(registry, self._samples))
        return merged

    def _samples(self) -> Samples:
        with self._lock:
            return self._retired + [sample for receiver in self._receivers for sample in receiver.samples]

    def _launch(self) -> _Receiver:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "dicom_listener.receivers", str(theirs.fileno())]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        ours.send(pickle.dumps(self._settings))
        ours.setblocking(False)
        return _Receiver(process, ours)

    def _watch(self) -> None:
        """Takes in statuses, and starts a process anew that died."""
        while not self._stopping:
            with self._lock:
                by_fd = {receiver.control.fileno(): receiver for receiver in self._receivers}
            poll = select.poll()
            for fd in by_fd:
                poll.register(fd, select.POLLIN)
            for fd, _ in poll.poll(STATUS_SECONDS * 1000):
                self._hear(by_fd[fd])

    def _hear(self, receiver: _Receiver) -> None:
        try:
            message = receiver.control.recv(MESSAGE_BYTES)
        except ConnectionError:
            message = b""
        if not message:
            self._replace(receiver)
            return
        status = json.loads(message)
        with self._lock:
            receiver.entered, receiver.present = status["entered"], status["present"]
            receiver.samples = [(family, name, labels, value) for family, name, labels, value in status["samples"]]
        receiver.started.set()

    def _replace(self, dead: _Receiver) -> None:
        code = dead.process.wait()
        dead.control.close()
        if not self._running:
            with self._lock:
                self._receivers.remove(dead)
            dead.started.set()  # `start` sees that it is dead
            return
        log.error("receiver_died", exit_code=code)
        with self._lock:
            self._retired += [sample for sample in dead.samples if not sample[0].startswith(_GAUGE)]
            self._receivers[self._receivers.index(dead)] = self._launch()
        self._on_lost_rows()  # what it had placed without rows
        time.sleep(RESTART_PAUSE_SECONDS)


class _Merged(Collector):
    """Adds samples of other processes to those of a registry of this one."""

    def __init__(self, own: CollectorRegistry, others: Callable[[], Samples]) -> None:
        self._own = own
        self._others = others

    def collect(self) -> Iterable[Metric]:
        """The families of the own registry with all processes' values summed."""
        sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        for _, name, labels, value in self._others():
            key = (name, tuple(sorted(labels.items())))
            sums[key] = sums.get(key, 0.0) + value
        for family in self._own.collect():
            merged = Metric(family.name, family.documentation, family.type)
            for sample in family.samples:
                if sample.name.endswith("_created"):
                    continue
                key = (sample.name, tuple(sorted(sample.labels.items())))
                merged.add_sample(sample.name, sample.labels, sample.value + sums.pop(key, 0.0))
            for key in [key for key in sums if key[0].startswith(family.name)]:
                merged.add_sample(key[0], dict(key[1]), sums.pop(key))
            yield merged


class ChannelRows:
    """The rows of one association of a receiving process, committed by the listener."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel

    def commit(self, arrival: Arrival) -> Recorded:
        """Returns once the listener says that the row is durable; raises the `RetryableError` that prevented it."""
        try:
            self._channel.send(pickle.dumps(arrival))
            answer = self._channel.recv(MESSAGE_BYTES)
        except OSError as error:
            raise DatabaseUnavailableError("the listener that commits the rows is gone") from error
        if not answer:
            raise DatabaseUnavailableError("the listener that commits the rows is gone")
        outcome = pickle.loads(answer)
        if isinstance(outcome, Recorded):
            return outcome
        raise outcome

    def close(self) -> None:
        """Tells the listener that the association is over."""
        self._channel.close()


def _serve_rows(channel: socket.socket, rows: Rows) -> None:
    """The listener's end of a channel: commits what comes until the association is over."""
    with channel:
        try:
            while request := channel.recv(MESSAGE_BYTES):
                try:
                    answer: Recorded | Mu2Error = rows.commit(pickle.loads(request))
                except Mu2Error as error:
                    answer = error
                channel.send(pickle.dumps(answer))
        except OSError as error:
            log.warning("receiver_unavailable", error=type(error).__name__)
        finally:
            rows.close()


def _snapshot(metrics: Metrics) -> Samples:
    return [
        (f"{family.type} {family.name}", sample.name, sample.labels, sample.value)
        for family in metrics.registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    ]


def _receive(control: socket.socket, settings: Settings) -> None:
    """The receiving process: takes connections in until the listener's end of `control` is closed."""
    metrics = Metrics()
    database = Database.from_settings(settings)
    reception = Reception(settings, database, metrics)
    reception.store.open()
    poll = select.poll()
    poll.register(control, select.POLLIN)
    next_status = 0.0
    while True:
        now = time.monotonic()
        if now >= next_status:
            status = {
                "entered": reception.entered,
                "present": reception.present,
                "samples": _snapshot(metrics),
            }
            try:
                control.send(json.dumps(status).encode())
            except OSError:
                break
            next_status = now + STATUS_SECONDS
        if not poll.poll(max(0.0, next_status - time.monotonic()) * 1000):
            continue
        guest, descriptors, _, _ = socket.recv_fds(control, 256, 2)
        if not descriptors:
            break
        connection, channel = (socket.socket(fileno=descriptor) for descriptor in descriptors)
        address, tls = json.loads(guest)
        try:
            reception.enter(connection, address, ChannelRows(channel), tls=tls)
        except RuntimeError as error:
            log.error("connection_not_served", error=type(error).__name__)
            connection.close()
    reception.close()
    database.close()


def _on_thread_died(dead: threading.ExceptHookArgs) -> None:
    log.critical("thread_died", exc_info=dead.exc_value)  # one association's; the log writes no text of an error


def main(fd: int) -> None:
    """The receiving process as it is started: settings come first over the socket."""
    from dicom_listener.server import quieten_libraries  # the server imports this module

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the listener tells when to stop; a terminal's Ctrl-C reaches all
    os.set_inheritable(fd, False)
    with socket.socket(fileno=fd) as control:
        settings = pickle.loads(control.recv(MESSAGE_BYTES))  # from the listener, which is this very program
        logs.configure("listener", settings.log.level)
        threading.excepthook = _on_thread_died
        quieten_libraries()
        _receive(control, settings)


if __name__ == "__main__":
    main(int(sys.argv[1]))
