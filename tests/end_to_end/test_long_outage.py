"""A database that is gone for half a minute in the middle of work: nothing is lost, nothing fails, nothing is parked.

Takes minutes, so `make chaos` runs it and `make test` leaves it out.
"""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from dicom_listener.server import quieten_libraries
from tests.end_to_end import chaos_ledger
from tests.end_to_end.chaos_ledger import Verdict
from tests.end_to_end.chaos_load import Pacs
from tests.end_to_end.running_services import Services, drop_environment, settings
from tests.postgres import PostgresServer
from tests.worker.hospital_site import wait_for
from worker.core.database import Database
from worker.core.records import Message, MessageState, Study, StudyStatus
from worker.core.settings import Settings
from worker.delivery.mllp_receiver import MllpReceiver
from worker.services import services, with_chosen_ports

pytestmark = [pytest.mark.outage, pytest.mark.timeout(600)]

OUTAGE_SECONDS = 30.0
BEFORE_SECONDS = 6.0
PATIENCE_SECONDS = 90.0  # for each thing that must happen


@dataclass(frozen=True)
class Place:
    """Where the rows are kept, and how to take that away."""

    url: str
    away: Callable[[Settings], AbstractContextManager[None]]


@contextmanager
def locked(config: Settings) -> Iterator[None]:
    """Another process holds SQLite's write lock."""
    lock = sqlite3.connect(config.home / "mu2.sqlite", isolation_level=None, timeout=20)
    lock.execute("BEGIN IMMEDIATE")
    yield
    lock.rollback()
    lock.close()


@pytest.fixture(params=["sqlite is locked", "postgresql is dead"])
def place(request: pytest.FixtureRequest) -> Place:
    """One of the two databases."""
    if request.param.startswith("sqlite"):
        return Place("", locked)
    database: Database = request.getfixturevalue("postgres_database")
    server: PostgresServer = request.getfixturevalue("postgres")

    @contextmanager
    def dead(_: Settings) -> Iterator[None]:
        server.kill()
        yield
        server.start()

    return Place(database.url.render_as_string(hide_password=False), dead)


@pytest.fixture
def receiver() -> Iterator[MllpReceiver]:
    """A RIS that acknowledges."""
    with MllpReceiver() as made:
        yield made


@pytest.fixture
def running(
    place: Place, receiver: MllpReceiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Services]:
    """All services but the page."""
    drop_environment(monkeypatch)
    quieten_libraries()
    destination = {"name": "ris", "host": "127.0.0.1", "port": receiver.port, "drafts": "R"}
    groups = {"hl7": {"destinations": [destination]}, **({"database": {"url": place.url}} if place.url else {})}
    config = with_chosen_ports(settings(tmp_path / "home", **groups))
    started = Services.start(config, services(config, review=False))
    yield started
    started.stop()


def test_half_a_minute_without_a_database_loses_fails_and_parks_nothing(
    running: Services, place: Place, receiver: MllpReceiver, tmp_path: Path
) -> None:
    pacs = Pacs(1, 7, running.settings.dicom.port, tmp_path / "pacs")
    pacs.start()
    wait_for(
        lambda: running.rows(Study, Study.status == StudyStatus.DRAFTED), seconds=PATIENCE_SECONDS, what="a first draft"
    )
    time.sleep(BEFORE_SECONDS)
    with place.away(running.settings):
        time.sleep(OUTAGE_SECONDS)
    before = len(pacs.studies)
    wait_for(lambda: len(pacs.studies) > before + 1, seconds=PATIENCE_SECONDS, what="a PACS that sends again")
    pacs.finish(PATIENCE_SECONDS)

    def settled() -> bool:
        with running.database.read() as session:
            return chaos_ledger.unfinished(session) == 0

    wait_for(settled, seconds=PATIENCE_SECONDS, what="an end of all work")
    verdict = Verdict()
    accepted = [message.control_id for message in receiver.received]
    with running.database.read() as session:
        chaos_ledger.examine(session, running.settings.store_root, pacs.studies, accepted, verdict)
    assert (verdict.notes, verdict.accepted_twice, verdict.out_of_order) == ([], 0, 0)
    assert all(study.whole for study in pacs.studies) and verdict.counts["studies sent whole"] > 2
    assert {study.status for study in running.rows(Study)} == {StudyStatus.DRAFTED}
    assert {message.state for message in running.rows(Message)} == {MessageState.ACKNOWLEDGED}
    assert set(running.supervisor.restarts.values()) == {0}
