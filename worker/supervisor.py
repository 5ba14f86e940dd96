"""The processes of one machine: restarted when they die, stopped in order without losing work, never orphaned.

    supervisor ──┬── valkey      when no broker URL is set
                 ├── worker      celery -A worker worker
                 ├── listener    python -m dicom_listener
                 └── review      mu2 review

They start together, because each waits for what it needs, and stop from bottom to top: first nothing new arrives, then
the worker ends what it has in hand, then the broker goes. The kernel ties every child to this process
(PR_SET_PDEATHSIG), so that even a `kill -9` here leaves none behind; what they had in hand is found again in the rows
and in the store.
"""

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import IO

import structlog

from worker.core import schema
from worker.core.database import Database
from worker.core.errors import FinalError, SettingsError, StateError
from worker.core.health import PROCESS_HEADER
from worker.core.settings import Settings
from worker.process_logs import LogPump

log = structlog.get_logger(__name__)

TICK_SECONDS = 0.05  # how often deaths are looked for
PROBE_EVERY_SECONDS = 0.2
PROBE_TIMEOUT_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1
_LOCK_NAME = "supervisor.lock"
EVERY_INTERFACE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class ServiceError(FinalError):
    """A process of the system did not come up, or dies again whenever it is started."""


@dataclass(frozen=True)
class Service:
    """One process to keep alive."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]  # all of it
    stop_seconds: float  # between SIGTERM and SIGKILL
    is_ready: Callable[[int], bool]  # whether the process of this number, and no stranger, answers


@dataclass(frozen=True)
class Backoff:
    """How a dead process is started again."""

    first_seconds: float = 0.5
    longest_seconds: float = 30.0
    steady_seconds: float = 60.0  # who ran this long starts again from the first wait
    most_early_deaths: int = 5  # deaths before it was ready for the first time: given up

    def wait_seconds(self, deaths: int) -> float:
        """The wait after this many deaths in a row."""
        return float(min(self.first_seconds * 2 ** (deaths - 1), self.longest_seconds))


class Supervisor:
    """Runs services until `stop`; one supervisor per MU2_HOME. Use it as a context manager or call `start` and `stop`."""

    def __init__(
        self,
        settings: Settings,
        services: Sequence[Service],
        *,
        backoff: Backoff | None = None,
        log_folder: Path | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        """`log_folder` None leaves the children's lines on this process's stderr.

        `tell` is called, in the supervisor's thread, with a sentence and the last words of a service that died before it
        was ever ready: someone waits for it.
        """
        self.settings = settings
        self.backoff = backoff or Backoff()
        self._tell = tell
        self._children = [_Child(s, self.backoff, log_folder, self._died_early) for s in services]
        self._stopping = threading.Event()
        self._hurry = threading.Event()
        self._given_up: ServiceError | None = None
        self._lock: IO[str] | None = None
        # The kernel's tie holds to the thread that forked, so one thread starts, restarts and stops all children.
        self._thread = threading.Thread(target=self._supervise, name="supervisor")

    def __enter__(self) -> "Supervisor":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Takes the lock of MU2_HOME, brings a default database up to date and starts every service.

        Raises `StateError` when another supervisor holds MU2_HOME, `SettingsError` when a configured database is not at
        this code's revision.
        """
        self._lock = _take_lock(self.settings.home)
        try:
            prepare_database(self.settings)
            self._thread.start()
        except BaseException:
            self._lock.close()
            raise

    def wait_ready(self, timeout_seconds: float) -> None:
        """Waits until every service answers; raises `ServiceError` with what the slowest one said last."""
        deadline = time.monotonic() + timeout_seconds
        while not self.is_ready:
            self.check()
            if time.monotonic() > deadline:
                waiting = next(c for c in self._children if not c.ready)
                raise ServiceError(
                    f"{waiting.service.name} is not ready after {timeout_seconds:.0f} s{waiting.last_words()}"
                )
            self._stopping.wait(TICK_SECONDS)

    def check(self) -> None:
        """Raises `ServiceError` when a service was given up or the supervisor has ended."""
        if self._given_up is not None:
            raise self._given_up
        if not self._thread.is_alive():
            raise ServiceError("the supervisor has ended; see the log")

    @property
    def is_ready(self) -> bool:
        """Whether every service answers."""
        return all(self.ready.values())

    @property
    def ready(self) -> dict[str, bool]:
        """Which service answers."""
        return {child.service.name: child.ready for child in self._children}

    @property
    def restarts(self) -> dict[str, int]:
        """How often each service was started again."""
        return {child.service.name: child.starts - 1 for child in self._children}

    def pid(self, name: str) -> int | None:
        """The process number of a service, or None between two starts."""
        return next(child.pid for child in self._children if child.service.name == name)

    def stop(self) -> None:
        """Stops every service in order and waits for them. Harmless when called again."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def hurry(self) -> None:
        """Cuts the waits of `stop` short: what still runs is killed. For a second Ctrl-C."""
        self._hurry.set()

    def _supervise(self) -> None:
        try:
            while not self._stopping.is_set():
                if not self._tend():
                    break
                self._stopping.wait(TICK_SECONDS)
        finally:
            for child in reversed(self._children):
                child.stop(self._hurry)

    def _died_early(self, child: "_Child", exit_code: int) -> None:
        if self._tell is not None:
            self._tell(f"{child.service.name} died before it was ready (exit code {exit_code}){child.last_words()}")

    def _tend(self) -> bool:
        """One look at every child; False when one was given up."""
        for child in self._children:
            if not child.tend():
                self._given_up = ServiceError(
                    f"{child.service.name} died {child.deaths} times before it was ready{child.last_words()}"
                )
                log.error("service_given_up", process=child.service.name, count=child.deaths)
                return False
        return True


class _Child:
    """One service's process over its lives."""

    def __init__(
        self,
        service: Service,
        backoff: Backoff,
        log_folder: Path | None,
        on_early_death: Callable[["_Child", int], None],
    ) -> None:
        self.service = service
        self.starts = 0
        self.deaths = 0  # in a row
        self.ready = False
        self.first_start = True  # has never been ready
        self._backoff = backoff
        self._log_folder = log_folder
        self._on_early_death = on_early_death
        self._process: subprocess.Popen[bytes] | None = None
        self._pump: LogPump | None = None
        self._started = 0.0
        self._start_at = 0.0
        self._probe_at = 0.0

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None else None

    def tend(self) -> bool:
        """Starts, probes or buries the process; False when it is given up."""
        now = time.monotonic()
        if self._process is None:
            if now >= self._start_at:
                self._start(now)
            return True
        if _has_ended(self._process.pid):
            return self._bury(self._process, now)
        if not self.ready and now >= self._probe_at:
            self._probe_at = now + PROBE_EVERY_SECONDS
            if self.service.is_ready(self._process.pid):
                self.ready, self.first_start = True, False
                log.info("service_ready", process=self.service.name, seconds=round(now - self._started, 2))
        return True

    def stop(self, hurry: threading.Event) -> None:
        """SIGTERM, a bounded wait, SIGKILL to whatever of its group is left."""
        if self._process is None:
            return
        self._process.terminate()
        deadline = time.monotonic() + self.service.stop_seconds
        while not _has_ended(self._process.pid):
            if hurry.wait(TICK_SECONDS) or time.monotonic() > deadline:
                log.warning("service_killed", process=self.service.name, seconds=self.service.stop_seconds)
                break
        self._end_group(self._process)
        if self._pump is not None:
            self._pump.close()

    def _end_group(self, process: subprocess.Popen[bytes]) -> int:
        """Kills what is left of the process's group, then reaps it; a group's number is free only after that."""
        os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        self._process = None
        self.ready = False
        return code

    def last_words(self) -> str:
        """The end of its log, for an error message."""
        if self._pump is None or not self._pump.tail:
            return "; see its log"
        lines = "\n  ".join(self._pump.tail)
        return f"; its last lines:\n  {lines}"

    def _start(self, now: float) -> None:
        if self._log_folder is not None and self._pump is None:
            self._pump = LogPump(self._log_folder / f"{self.service.name}.log")
        self._process = subprocess.Popen(
            self.service.command,
            env=dict(self.service.environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if self._pump else sys.stderr.fileno(),
            stderr=subprocess.STDOUT,
            process_group=0,  # a Ctrl-C on the terminal reaches the supervisor alone
            preexec_fn=_tie_to_parent(os.getpid()),
        )
        if self._pump is not None and self._process.stdout is not None:
            self._pump.follow(self._process.stdout)
        self.starts += 1
        self._started = now
        self._probe_at = now
        log.info("service_started", process=self.service.name, pid=self._process.pid)

    def _bury(self, process: subprocess.Popen[bytes], now: float) -> bool:
        code = self._end_group(process)
        if self._pump is not None:
            self._pump.drain()
        if now - self._started >= self._backoff.steady_seconds:
            self.deaths = 0
        self.deaths += 1
        wait = self._backoff.wait_seconds(self.deaths)
        self._start_at = now + wait
        log.error("service_died", process=self.service.name, exit_code=code, count=self.deaths, retry_seconds=wait)
        if self.first_start:
            self._on_early_death(self, code)
        return not (self.first_start and self.deaths >= self._backoff.most_early_deaths)


def prepare_database(settings: Settings) -> None:
    """Brings the default SQLite file to the newest revision; a configured database must be there already."""
    database = Database.from_settings(settings)
    try:
        if settings.database.url.get_secret_value():
            schema.require_head(database)
        else:
            schema.upgrade(database)
    finally:
        database.close()


def answers(host: str, port: int, pid: int) -> bool:
    """Whether process `pid` serves /readyz there (`worker.core.health`) and says that it is ready.

    Another process on that port, such as the service of another MU2_HOME, does not count.
    """
    connection = HTTPConnection(EVERY_INTERFACE.get(host, host), port, timeout=PROBE_TIMEOUT_SECONDS)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        return answer.status == 200 and answer.getheader(PROCESS_HEADER) == str(pid)
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _take_lock(home: Path) -> IO[str]:
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = (home / _LOCK_NAME).open("a+")
    except OSError as error:
        raise SettingsError(f"MU2_HOME cannot be written ({error.strerror}); choose another folder") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise StateError(f"process {holder} runs the services of this MU2_HOME already; stop it first") from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _tie_to_parent(parent: int) -> Callable[[], None] | None:
    """What a child does before it becomes its program: asks the kernel to be killed when its parent's thread ends."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def tie() -> None:
        if prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0 or os.getppid() != parent:
            os._exit(1)

    return tie


def _has_ended(pid: int) -> bool:
    """Whether the process is dead; it is left to be reaped."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
