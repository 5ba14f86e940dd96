"""A disk that is full is waited out: no study fails by it, and the administrator reads why."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core.builders import arrival, uid
from tests.small_disk import SmallDisk, mounted
from tests.worker.hospital_site import Site, wait_for
from tests.worker.test_tasks import draft, prepare
from worker.core import arrivals
from worker.core.database import Database
from worker.core.errors import DatabaseFullError
from worker.core.records import Attempt, AttemptOutcome, Instance, MessageState, ReportVersion, StudyStatus
from worker.delivery.mllp_receiver import MllpReceiver
from worker.process import WorkerProcess

BIG = {"slices": 40, "side": 256}
"""5 MB of slices, and as much again as a model input."""


@pytest.fixture
def store_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """The instance store of the test's site."""
    with mounted(tmp_path / "home" / "store", megabytes=20) as disk:
        yield disk


@pytest.fixture
def database_disk(tmp_path: Path, sqlite_template: Path) -> Iterator[SmallDisk]:
    """A disk that holds a migrated database and nothing else."""
    with mounted(tmp_path / "database", megabytes=8) as disk:
        shutil.copy(sqlite_template, disk.folder / "mu2.sqlite")
        yield disk


@pytest.fixture
def full_database(database_disk: SmallDisk) -> Iterator[Database]:
    """The database on that disk, which has no room left."""
    database = Database(f"sqlite:///{database_disk.folder}/mu2.sqlite", busy_seconds=0.0)
    arrivals.record(database, [arrival(uid())])  # its log is open
    database_disk.fill()
    yield database
    database.close()


def use_up_the_log(database: Database) -> None:
    """Writes until the room that the database already holds is used up."""
    for _ in range(2000):
        arrivals.record(database, [arrival(uid())])


def test_study_waits_for_room_in_the_store_and_loses_no_attempt(
    store_disk: SmallDisk, site: Site, worker_process: WorkerProcess
) -> None:
    study_id = site.add_study(**BIG)
    store_disk.fill(leave_bytes=1_000_000)
    for _ in range(worker_process.limits.max_attempts + 1):
        prepare(worker_process)
        assert site.status(study_id) is StudyStatus.COMPLETE
        site.let_wait_pass(study_id)
    tries = site.rows(Attempt)
    assert {(a.outcome, a.error) for a in tries} == {(AttemptOutcome.RETRY, "StoreFullError")}
    assert {a.reason for a in tries} == {
        "StoreFullError: the volume cannot be written: No space left on device; make room, the study waits"
    }
    assert list((site.store / "inputs").rglob("*.npz")) + list((site.store / "inputs").rglob(".volume-*")) == []

    store_disk.make_room()
    prepare(worker_process)
    draft(worker_process)
    assert site.status(study_id) is StudyStatus.DRAFTED
    assert len(site.rows(ReportVersion)) == 1


def test_full_disk_of_the_database_is_named(full_database: Database) -> None:
    with pytest.raises(DatabaseFullError, match="the disk of the database is full"):
        use_up_the_log(full_database)


def test_writing_goes_on_when_the_database_has_room_again(full_database: Database, database_disk: SmallDisk) -> None:
    with pytest.raises(DatabaseFullError):
        use_up_the_log(full_database)
    with full_database.read() as session:
        before = session.query(Instance).count()
    room = threading.Timer(1.0, database_disk.make_room)
    room.start()
    full_database.busy_seconds = 20.0
    arrivals.record(full_database, [arrival(uid())])
    room.join()
    with full_database.read() as session:
        assert session.query(Instance).count() == before + 1


def test_worker_whose_database_has_no_room_loses_nothing(
    tmp_path: Path, database_disk: SmallDisk, receiver: MllpReceiver
) -> None:
    database = Database(f"sqlite:///{database_disk.folder}/mu2.sqlite", busy_seconds=5)
    site = Site(tmp_path / "home", database)
    site.broker.start()
    try:
        site.deliver_to({"name": "ris", "host": "127.0.0.1", "port": receiver.port, "drafts": "R"})
        worker = site.start_worker()
        database_disk.fill()
        with pytest.raises(DatabaseFullError):
            use_up_the_log(database)
        wait_for(lambda: '"error": "DatabaseFullError"' in worker.output, what="a worker that says why")
        database_disk.make_room()
        study_id = site.add_study(**BIG)
        site.wait_for_status(study_id, StudyStatus.DRAFTED, seconds=40)
        wait_for(lambda: [m.state for m in site.messages()] == [MessageState.ACKNOWLEDGED])
        assert worker.process.poll() is None
    finally:
        site.close()
        database.close()
