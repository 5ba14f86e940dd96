"""A hospital site for tests: store, database, embedded broker, real worker processes, and studies that arrive."""

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import redis
import sqlalchemy as sa
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from sqlalchemy.orm import Session

from worker import queues
from worker.broker import EmbeddedBroker
from worker.core import arrivals, settings, studies
from worker.core.arrivals import Arrival
from worker.core.database import Database
from worker.core.records import Base, Instance, Message, Priority, Study, StudyStatus

REPOSITORY = Path(__file__).resolve().parents[2]
CANARY = "Canarynova"
"""Family name of every test patient: it must appear nowhere but in the database, the store and the ORU."""

T = TypeVar("T")


def slice_dataset(study_uid: str, series_uid: str, index: int, *, side: int = 16, **elements: Any) -> Dataset:
    """One axial CT slice of a warm cylinder in air; keyword elements replace or add."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid(
        entropy_srcs=[study_uid, series_uid, str(index)]
    )
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study_uid, series_uid, study_uid
    ds.Modality, ds.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.PatientName, ds.PatientID, ds.PatientSex = f"{CANARY}^Ada", f"{CANARY}-ID-77", "F"
    ds.SeriesNumber, ds.InstanceNumber, ds.ConvolutionKernel = 1, index + 1, "B30f"
    ds.BodyPartExamined, ds.SliceThickness = "CHEST", 3.0
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.ImagePositionPatient = [0.0, 0.0, 3.0 * index]
    ds.PixelSpacing, ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = [1.0, 1.0], 1, -1024, "HU"
    ds.Rows = ds.Columns = side
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
    rows, columns = np.mgrid[:side, :side] - side / 2
    inside = rows**2 + columns**2 < (side / 3) ** 2
    ds.PixelData = np.where(inside, 1064 + index, 0).astype("<u2").tobytes()
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def wait_for(condition: Callable[[], T], seconds: float = 60.0, what: str = "") -> T:
    """The first true value of `condition`; fails after `seconds`."""
    limit = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > limit:
            raise AssertionError(f"not within {seconds} s: {what or condition}")
        time.sleep(0.03)


class Worker:
    """One real worker process, its log kept."""

    def __init__(self, environment: Mapping[str, str], *arguments: str) -> None:
        command = [sys.executable, "-m", "celery", "-A", "worker", "worker", *arguments]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    @property
    def output(self) -> str:
        """Everything it printed so far."""
        return "\n".join(self.lines)

    def events(self, name: str) -> list[dict[str, Any]]:
        """Log lines of one event."""
        found = [json.loads(line) for line in list(self.lines) if line.startswith("{") and f'"{name}"' in line]
        return [fields for fields in found if fields["event"] == name]

    def wait_for_event(self, name: str, seconds: float = 20.0) -> dict[str, Any]:
        """The first log line of an event."""

        def look() -> list[dict[str, Any]]:
            assert self.process.poll() is None or self.events(name), self.output
            return self.events(name)

        return wait_for(look, seconds, f"event {name}")[0]

    def kill(self) -> None:
        """kill -9."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=10)
        self._reader.join(timeout=5)

    def freeze(self) -> None:
        """SIGSTOP: alive for the kernel, dead for everybody else."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def stop(self, seconds: float = 30.0) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=seconds)
        self._reader.join(timeout=5)
        return code


class Site:
    """Everything of one site but the workers, which tests start."""

    def __init__(self, home: Path, database: Database, **environment: str) -> None:
        self.home = home
        self.database = database
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("MU2_")},
            "MU2_HOME": str(home),
            "MU2_DATABASE__URL": database.url.render_as_string(hide_password=False),
            "MU2_MODEL__REPORTER": "fake",
            "MU2_WORKER__METRICS_PORT": "0",
            "MU2_WORKER__STOP_SECONDS": "5",
            "MU2_QUEUE__SWEEP_SECONDS": "0.3",
            "MU2_QUEUE__LEASE_SECONDS": "3",
            "MU2_QUEUE__BACKOFF_SECONDS": "0.2",
            "MU2_HL7__BACKOFF_SECONDS": "0.2",
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        self.broker = EmbeddedBroker(home / "valkey" / "valkey.sock")
        self.store = home / "store"
        self.workers: list[Worker] = []

    def settings(self) -> settings.Settings:
        """The settings as a worker process reads them."""
        with _environment(self.environment):
            return settings.load()

    def doorbell(self) -> queues.Doorbell:
        """A doorbell of the test's own."""
        return queues.Doorbell(queues.new_app(self.settings()))

    def deliver_to(self, *destinations: Mapping[str, Any]) -> None:
        """Sets the HL7 receivers of workers that are started from here on."""
        self.environment["MU2_HL7__DESTINATIONS"] = json.dumps(list(destinations))

    def start_worker(self, *arguments: str, ready: bool = True, **environment: str) -> Worker:
        """A worker process; waits until it has started unless told not to."""
        worker = Worker({**self.environment, **environment}, *arguments)
        self.workers.append(worker)
        if ready:
            worker.wait_for_event("worker_started")
        return worker

    def lock_database(self) -> sqlite3.Connection:
        """Holds SQLite's write lock until the returned connection rolls back."""
        url = self.database.url.database
        assert url is not None
        lock = sqlite3.connect(url, isolation_level=None, timeout=20, check_same_thread=False)
        lock.execute("BEGIN IMMEDIATE")
        return lock

    def flush_broker(self) -> None:
        """FLUSHALL."""
        with redis.Redis(unix_socket_path=str(self.broker.socket_path)) as client:
            client.flushall()

    def close(self) -> None:
        """Kills what still runs."""
        for worker in self.workers:
            worker.kill()
        self.broker.kill()

    def receive(self, study_uid: str, datasets: list[Dataset], **columns: Any) -> str:
        """Stores objects as the listener does and records them; returns the study's id."""
        arrived = [self._store(study_uid, dataset, **columns) for dataset in datasets]
        return arrivals.record(self.database, arrived)[0].study_id

    def complete(self, study_id: str) -> None:
        """The study was quiet for long enough."""
        self.database.run(lambda session: studies.complete(session, studies.get(session, study_id)))

    def add_study(self, *, slices: int = 12, side: int = 16, **columns: Any) -> str:
        """A complete study with one axial series."""
        uid = str(generate_uid())
        series = str(generate_uid())
        study_id = self.receive(uid, [slice_dataset(uid, series, i, side=side) for i in range(slices)], **columns)
        self.complete(study_id)
        return study_id

    def status(self, study_id: str) -> StudyStatus:
        """Where a study stands."""
        with self.database.read() as session:
            return studies.get(session, study_id).status

    def study(self, study_id: str) -> Study:
        """A study's row."""
        with self.database.read() as session:
            return studies.get(session, study_id)

    def wait_for_status(self, study_id: str, status: StudyStatus, seconds: float = 20.0) -> None:
        """Returns when the study stands there."""
        wait_for(lambda: self.status(study_id) is status, seconds, f"{status} but is {self.status(study_id)}")

    def let_wait_pass(self, study_id: str) -> None:
        """The back-off of a study is over."""

        def due_now(session: Session) -> None:
            studies.get(session, study_id).due_at = None

        self.database.run(due_now)

    def count(self, table: type[Base], *where: Any) -> int:
        """How many rows of a table there are."""
        with self.database.read() as session:
            return session.scalar(sa.select(sa.func.count()).select_from(table).where(*where)) or 0

    def wait_for_count(self, table: type[Base], count: int) -> None:
        """Returns when a table has this many rows."""
        wait_for(lambda: self.count(table) == count, what=f"{count} rows of {table.__tablename__}")

    def owns(self, study_id: str, path: Path) -> bool:
        """Whether a file of the store belongs to a study."""
        relative = str(path.relative_to(self.store))
        return any(row.study_id == study_id for row in self.rows(Instance, Instance.path == relative))

    def messages(self) -> list[Message]:
        """The outbox."""
        with self.database.read() as session:
            return list(session.scalars(sa.select(Message).order_by(Message.id)))

    def catch(self, study_id: str, status: StudyStatus, seconds: float = 20.0) -> None:
        """Returns the moment the study stands there, by a look every millisecond."""
        url = self.database.url.database
        assert url is not None
        with sqlite3.connect(f"file:{url}?mode=ro", uri=True) as look:
            limit = time.monotonic() + seconds
            while time.monotonic() < limit:
                (now,) = look.execute("SELECT status FROM studies WHERE id = ?", (uuid.UUID(study_id).hex,)).fetchone()
                if now == status:
                    return
                time.sleep(0.001)
        raise AssertionError(f"the study was never seen as {status}")

    def rows(self, table: type[T], *where: Any) -> list[T]:
        """Rows of a table."""
        with self.database.read() as session:
            return list(session.scalars(sa.select(table).where(*where)))

    def _store(self, study_uid: str, dataset: Dataset, **columns: Any) -> Arrival:
        path = Path("instances", f"{uuid.uuid4().hex}.dcm")
        target = self.store / path
        target.parent.mkdir(parents=True, exist_ok=True)
        dataset.save_as(target, enforce_file_format=True)
        fields: dict[str, Any] = {
            "patient_identifier": str(dataset.PatientID),
            "patient_name": str(dataset.PatientName),
            "patient_sex": "F",
            "accession": uuid.uuid4().hex[:12],
            "priority": Priority.ROUTINE,
        }
        return Arrival(
            path=str(path),
            size_bytes=target.stat().st_size,
            sha256=hashlib.sha256(target.read_bytes()).hexdigest(),
            sop_class_uid=dataset.SOPClassUID,
            sop_instance_uid=dataset.SOPInstanceUID,
            transfer_syntax_uid=dataset.file_meta.TransferSyntaxUID,
            study_instance_uid=study_uid,
            series_instance_uid=dataset.SeriesInstanceUID,
            received_at=datetime.now(UTC),
            modality="CT",
            **{**fields, **columns},
        )


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
