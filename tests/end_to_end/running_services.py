"""The services as separate processes under the real supervisor, a receiver, and studies sent by real associations."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from tests.worker.hospital_site import slice_dataset, wait_for
from worker.core import settings as settings_module
from worker.core.database import Database
from worker.core.records import Study, StudyStatus
from worker.core.settings import Settings
from worker.demo import sender
from worker.supervisor import Backoff, Service, Supervisor

QUICK = Backoff(first_seconds=0.1, longest_seconds=1.0, steady_seconds=5.0, most_early_deaths=5)
READY_SECONDS = 60.0

T = TypeVar("T")


def settings(home: Path, **groups: dict[str, Any]) -> Settings:
    """Quick settings on free ports, the fake reporter, nothing of this machine's own; groups replace and add."""
    base: dict[str, dict[str, Any]] = {
        "dicom": {"port": 0, "metrics_port": 0, "quiet_seconds": 0.5},
        "store": {"floor_bytes": 1_000_000},
        "queue": {"sweep_seconds": 0.3, "lease_seconds": 3.0, "backoff_seconds": 0.2},
        "hl7": {"backoff_seconds": 0.2},
        "model": {"reporter": "fake"},
        "worker": {"metrics_port": 0, "stop_seconds": 5.0},
    }
    merged = {name: {**base.get(name, {}), **groups.get(name, {})} for name in {*base, *groups}}
    return settings_module.load(home=home, **merged)


def write_study(folder: Path, *, slices: int = 12, side: int = 16, uid: str | None = None, **elements: Any) -> str:
    """A folder with one axial series; returns its Study Instance UID."""
    uid = uid or str(generate_uid())
    series = str(generate_uid())
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(slices):
        save(slice_dataset(uid, series, index, side=side, **elements), folder / f"{index:04d}")
    return uid


def save(dataset: Dataset, path: Path) -> None:
    """One DICOM file."""
    dataset.save_as(path, enforce_file_format=True)


def drop_environment(monkeypatch: Any) -> None:
    """No MU2_ variable of this machine reaches the services."""
    for name in [name for name in os.environ if name.startswith("MU2_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MU2_CONFIG", os.devnull)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@dataclass
class Services:
    """Running services, and what a test asks of them."""

    settings: Settings
    database: Database
    supervisor: Supervisor

    @classmethod
    def start(cls, settings: Settings, services: Sequence[Service]) -> "Services":
        """Starts them and waits until all are ready."""
        supervisor = Supervisor(settings, services, backoff=QUICK, log_folder=settings.home / "logs")
        supervisor.start()
        try:
            supervisor.wait_ready(READY_SECONDS)
        except BaseException:
            supervisor.stop()
            raise
        return cls(settings, Database.from_settings(settings), supervisor)

    def stop(self) -> None:
        """Stops them in order."""
        self.supervisor.stop()
        self.database.close()

    def send(self, folder: Path) -> sender.Sent:
        """Sends a folder by a DICOM association."""
        dicom = self.settings.dicom
        content = sender.read_folder(folder)
        return sender.send(content.objects, "127.0.0.1", dicom.port, called_ae=dicom.ae_title)

    def study(self, uid: str) -> Study | None:
        """The row of a study, once it is there."""
        with self.database.read() as session:
            return session.scalars(sa.select(Study).where(Study.study_instance_uid == uid)).one_or_none()

    def wait_for_status(self, uid: str, status: StudyStatus, seconds: float = 30.0) -> Study:
        """The study's row when it stands there."""

        def look() -> Study | None:
            study = self.study(uid)
            return study if study is not None and study.status is status else None

        found = wait_for(look, seconds, f"{status}, but is {getattr(self.study(uid), 'status', 'not there')}")
        assert found is not None
        return found

    def rows(self, table: type[T], *where: Any) -> list[T]:
        """Rows of a table."""
        with self.database.read() as session:
            return list(session.scalars(sa.select(table).where(*where)))


def processes_of(home: Path) -> list[str]:
    """Command lines of processes whose MU2_HOME this is; Valkey, which hides its environment, names it in its title."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if command and (f"MU2_HOME={home}\0".encode() in environment or f":{home}/" in command):
            found.append(command)
    return found


def run_mu2(*arguments: str, home: Path | None = None, timeout: float = 60.0, **variables: str) -> Any:
    """The `mu2` command as its own process; MU2_HOME only where a home is given."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MU2_")}
    environment |= {"MU2_CONFIG": os.devnull, "OMP_NUM_THREADS": "1", **variables}
    if home is not None:
        environment["MU2_HOME"] = str(home)
    command = [sys.executable, "-m", "worker", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
