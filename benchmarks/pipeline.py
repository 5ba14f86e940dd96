"""The whole pipe without the model: from "complete" to the acknowledgement, studies an hour, and a long queue.

    python benchmarks/pipeline.py [--studies 20] [--slices 100] [--waiting 1000] [--json OUT]

The real services run as `mu2 up` runs them (embedded Valkey, SQLite, listener, one Celery worker with the fake reporter, an
HL7 receiver that acknowledges), everything under one folder on tmpfs or disk. Studies are 512 x 512 uncompressed CT sent by
dcmtk's `storescu` (`TCP_NODELAY=1`) or, where it is missing, by pynetdicom; the senders use the same cores.

- latency: studies one after another; seconds from the row's `complete` to the acknowledgement.
- throughput: all studies at once over four associations; first C-STORE to last acknowledgement, the quiet period included.
- queue: many small studies wait while the worker is stopped; then how fast the first and the last hundred are drained,
  and how long a STAT study takes that arrives while the others wait.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import sqlalchemy as sa
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from rich.progress import Progress

from worker.core import logs, studies
from worker.core import settings as settings_module
from worker.core.arrivals import Arrival, record
from worker.core.database import Database
from worker.core.records import Message, MessageState, Priority, Report, ReportVersion, Study, StudyStatus
from worker.core.settings import (
    Destination,
    DicomSettings,
    Hl7Settings,
    ModelSettings,
    QueueSettings,
    Settings,
    StoreSettings,
)
from worker.delivery.mllp_receiver import MllpReceiver
from worker.demo import sender
from worker.services import listener_service, services, with_chosen_ports
from worker.supervisor import Service, Supervisor

STREAMS = 4
QUIET_SECONDS = 1.0
READY_SECONDS = 120.0
PATIENCE_SECONDS = 1800.0
SMALL_SLICES, SMALL_SIDE = 12, 64
MARK = "9" * 30  # a part of every UID, replaced study by study


def slice_bytes(series: int, index: int, side: int) -> bytes:
    """One CT slice as a DICOM file whose study part of every UID is `MARK`."""
    study = f"2.25.{MARK}"
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{study}.{series}.{index + 1}"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, f"{study}.{series}", study
    ds.Modality, ds.ImageType, ds.ConvolutionKernel = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"], "B30f"
    ds.PatientName, ds.PatientID, ds.AccessionNumber, ds.PatientSex = "BENCH^MARK", "BENCH", MARK[:16], "O"
    ds.SeriesNumber, ds.InstanceNumber, ds.BodyPartExamined, ds.SliceThickness = series, index + 1, "CHEST", 3.0
    ds.ImageOrientationPatient, ds.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0.0, 0.0, 3.0 * index]
    ds.PixelSpacing, ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = [0.7, 0.7], 1, -1024, "HU"
    ds.Rows = ds.Columns = side
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    rng = np.random.default_rng(index)
    body = np.hypot(*(np.mgrid[:side, :side] - side / 2)) < 0.4 * side
    ds.PixelData = np.where(body, rng.integers(900, 1200, (side, side)), 0).astype("<u2").tobytes()
    with tempfile.SpooledTemporaryFile() as file:
        dcmwrite(file, ds, enforce_file_format=True)
        file.seek(0)
        return file.read()


class StudyMaker:
    """Writes studies that differ in every UID and in the accession number."""

    def __init__(self, slices: int, side: int) -> None:
        self._templates = [slice_bytes(1, index, side) for index in range(slices)]
        self._made = 0

    def write(self, folder: Path) -> str:
        """Writes one study and returns its Study Instance UID."""
        self._made += 1
        number = str(10**29 + time.time_ns() % 10**18 * 1000 + self._made)
        folder.mkdir(parents=True)
        for index, template in enumerate(self._templates):
            data = template.replace(MARK.encode(), number.encode()).replace(MARK[:16].encode(), number[-16:].encode())
            (folder / f"{index}.dcm").write_bytes(data)
        return f"2.25.{number}"


def send(folder: Path, settings: Settings) -> None:
    """Sends one folder in one association."""
    port, title = settings.dicom.port, settings.dicom.ae_title
    if shutil.which("storescu"):
        command = ["storescu", "-aec", title, "-pdu", "131072", "+sd", "127.0.0.1", str(port), str(folder)]
        subprocess.run(command, check=True, env={**os.environ, "TCP_NODELAY": "1"}, stdout=subprocess.DEVNULL)
    else:
        sender.send(sender.read_folder(folder).objects, "127.0.0.1", port, called_ae=title)


@contextmanager
def site(home: Path, receiver: MllpReceiver) -> Iterator[tuple[Settings, Database, list[Service]]]:
    """Settings, an empty database and the services that belong to them."""
    destination = Destination(name="bench", host="127.0.0.1", port=receiver.port, drafts="R")
    base = settings_module.load(
        home=home,
        dicom=DicomSettings(port=0, metrics_port=0, quiet_seconds=QUIET_SECONDS),
        store=StoreSettings(floor_bytes=0),
        queue=QueueSettings(sweep_seconds=1.0),
        hl7=Hl7Settings(destinations=(destination,)),
        model=ModelSettings(reporter="fake"),
    )
    settings = with_chosen_ports(base)
    made = services(settings, review=False)
    database = Database.from_settings(settings)
    try:
        yield settings, database, made
    finally:
        database.close()


def journeys(database: Database) -> list[tuple[str, float, float, float]]:
    """(study UID, complete, acknowledged, priority) of every acknowledged study, times in seconds."""
    query = (
        sa.select(Study.study_instance_uid, Study.completed_at, Message.acknowledged_at, Study.priority)
        .join(Report, Report.study_id == Study.id)
        .join(ReportVersion, ReportVersion.report_id == Report.id)
        .join(Message, Message.version_id == ReportVersion.id)
        .where(Message.state == MessageState.ACKNOWLEDGED)
    )
    with database.read() as session:
        rows = session.execute(query).all()
    return [(uid, done.timestamp(), acknowledged.timestamp(), rank) for uid, done, acknowledged, rank in rows]


def wait_for(database: Database, count: int) -> None:
    """Waits until so many studies are acknowledged."""
    limit = time.monotonic() + PATIENCE_SECONDS
    query = sa.select(sa.func.count()).select_from(Message).where(Message.state == MessageState.ACKNOWLEDGED)
    ended = sa.select(Study.reason).where(Study.status.in_((StudyStatus.FAILED, StudyStatus.SKIPPED)))
    while time.monotonic() < limit:
        with database.read() as session:
            if (session.scalar(query) or 0) >= count:
                return
            for reason in session.scalars(ended):
                raise SystemExit(f"a study was not drafted: {reason}")
        time.sleep(0.2)
    raise SystemExit(f"not all of {count} studies were acknowledged within {PATIENCE_SECONDS:.0f} s")


def latency(folder: Path, number: int, slices: int, progress: Progress) -> dict[str, float]:
    """Studies one after another."""
    maker = StudyMaker(slices, 512)
    task = progress.add_task("latency", total=number)
    with MllpReceiver() as receiver, site(folder / "latency", receiver) as (settings, database, made):
        with Supervisor(settings, made, log_folder=settings.home / "logs") as supervisor:
            supervisor.wait_ready(READY_SECONDS)
            for done in range(1, number + 1):
                maker.write(folder / "out")
                send(folder / "out", settings)
                shutil.rmtree(folder / "out")
                wait_for(database, done)
                progress.advance(task)
        seconds = [acknowledged - complete for _, complete, acknowledged, _ in journeys(database)]
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


def throughput(folder: Path, number: int, slices: int, progress: Progress) -> dict[str, float]:
    """All studies at once over four associations."""
    maker = StudyMaker(slices, 512)
    outgoing = [folder / f"out{n}" for n in range(number)]
    for out in outgoing:
        maker.write(out)
    task = progress.add_task("throughput", total=number)
    with (
        MllpReceiver() as receiver,
        site(folder / "throughput", receiver) as (settings, database, made),
        Supervisor(settings, made, log_folder=settings.home / "logs") as supervisor,
    ):
        supervisor.wait_ready(READY_SECONDS)
        start = time.time()
        with ThreadPoolExecutor(STREAMS) as pool:
            for _ in pool.map(lambda out: send(out, settings), outgoing):
                progress.advance(task)
        received = time.time() - start
        wait_for(database, number)
        took = time.time() - start
    for out in outgoing:
        shutil.rmtree(out)
    return {"studies_per_hour": number / took * 3600, "seconds": took, "receiving_s": received}


def queue(folder: Path, waiting: int, progress: Progress) -> dict[str, float]:
    """Many studies wait; then they are drained, and a STAT study arrives on top."""
    maker = StudyMaker(SMALL_SLICES, SMALL_SIDE)
    task = progress.add_task("queue", total=waiting)
    with MllpReceiver() as receiver, site(folder / "queue", receiver) as (settings, database, made):
        with Supervisor(settings, [listener_service(settings)], log_folder=settings.home / "logs") as supervisor:
            supervisor.wait_ready(READY_SECONDS)
            maker.write(folder / "first")
            send(folder / "first", settings)
        stored = sorted((settings.store_root).rglob("*.dcm"))
        for _ in range(waiting):
            record(database, _arrivals(settings, stored))
            progress.advance(task)
        with database.write() as session:
            studies.complete_quiet(session, 0)
        with Supervisor(settings, made, log_folder=settings.home / "logs") as supervisor:
            supervisor.wait_ready(READY_SECONDS)
            wait_for(database, waiting // 2)
            (stat,) = {r.study_id for r in record(database, _arrivals(settings, stored, Priority.STAT))}
            with database.write() as session:
                studies.complete(session, studies.get(session, stat))
            wait_for(database, waiting + 2)
        ends = sorted(acknowledged for _, _, acknowledged, _ in journeys(database))
        (stat_seconds,) = [end - begin for _, begin, end, rank in journeys(database) if rank == Priority.STAT]
    part = min(100, waiting // 3)
    return {
        "waiting": waiting,
        "first_per_hour": (part - 1) / (ends[part - 1] - ends[0]) * 3600,
        "last_per_hour": (part - 1) / (ends[-1] - ends[-part]) * 3600,
        "stat_s": stat_seconds,
    }


def _arrivals(settings: Settings, stored: list[Path], priority: Priority = Priority.ROUTINE) -> list[Arrival]:
    """A study of links to the stored slices under UIDs of its own: the queue is measured, not the disk."""
    number = str(10**29 + time.time_ns())
    made = []
    for index, path in enumerate(stored):
        link = path.with_name(f"{number}-{index}.dcm")
        data = path.read_bytes()
        link.write_bytes(data)
        made.append(
            Arrival(
                path=str(link.relative_to(settings.store_root)),
                size_bytes=len(data),
                sha256=f"{number}{index:04}".zfill(64),
                sop_class_uid=str(CTImageStorage),
                sop_instance_uid=f"2.25.{number}.1.{index + 1}",
                transfer_syntax_uid=str(ExplicitVRLittleEndian),
                study_instance_uid=f"2.25.{number}",
                series_instance_uid=f"2.25.{number}.1",
                received_at=studies.now(),
                priority=priority,
                patient_identifier="BENCH",
                accession=number[-16:],
                modality="CT",
            )
        )
    return made


def main() -> None:
    """Runs the three measurements and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=20)
    parser.add_argument("--slices", type=int, default=100)
    parser.add_argument("--waiting", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logs.configure("benchmark", "error")
    folder = Path(tempfile.mkdtemp(prefix="mu2-bench-", dir=arguments.folder))
    try:
        with Progress(transient=True) as progress:
            results = {
                "latency": latency(folder, arguments.studies, arguments.slices, progress),
                "throughput": throughput(folder, arguments.studies, arguments.slices, progress),
                "queue": queue(folder, arguments.waiting, progress),
            }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    told, many = results["latency"], results["throughput"]
    print("| what | figure |\n|---|---|")
    print(
        f"| complete → acknowledged, median (range) | {told['median_s']:.2f} s ({told['min_s']:.2f}–{told['max_s']:.2f}) |"
    )
    print(
        f"| {arguments.studies} studies of {arguments.slices} slices at once | {many['studies_per_hour']:.0f} studies/h |"
    )
    long = results["queue"]
    print(
        f"| {long['waiting']} waiting: first and last hundred drained at | "
        f"{long['first_per_hour']:.0f} and {long['last_per_hour']:.0f} studies/h |"
    )
    print(f"| a STAT study with half of them still waiting | {long['stat_s']:.2f} s |")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
