"""A PostgreSQL that is alive for the kernel and says nothing is a database that is away, within a limit."""

import threading
import time
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from tests.core.builders import arrival, uid
from tests.core.silent_proxy import SilentProxy
from tests.postgres import PostgresServer
from worker.core import arrivals, postgresql
from worker.core.database import Database
from worker.core.errors import DatabaseUnavailableError
from worker.core.records import Instance

LIMIT_SECONDS = 1.0
PATIENCE_SECONDS = 15.0  # the limit, a new connection's five seconds, and a slow machine


@pytest.fixture
def proxy(postgres: PostgresServer) -> Iterator[SilentProxy]:
    """A proxy before the server that the test may silence."""
    made = SilentProxy(postgres.port)
    yield made
    made.close()


@pytest.fixture
def behind(proxy: SilentProxy, postgres_database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """The test's database, reached through the proxy, with a short limit."""
    monkeypatch.setattr(postgresql, "SILENCE_SECONDS", LIMIT_SECONDS)
    database = Database(
        postgres_database.url.set(port=proxy.port).render_as_string(hide_password=False), busy_seconds=0.0
    )
    yield database
    proxy.close()
    database.close()


def stored(database: Database) -> int:
    with database.read() as session:
        return session.scalar(sa.select(sa.func.count()).select_from(Instance)) or 0


def test_the_limit_is_longer_than_the_server_may_work_on_a_statement() -> None:
    server = int(postgresql.CONNECT_ARGUMENTS["options"].split("statement_timeout=")[1].split("s")[0])
    assert server < postgresql.SILENCE_SECONDS < 2 * server


def test_statement_that_is_never_answered_ends_and_its_connection_is_not_used_again(
    behind: Database, proxy: SilentProxy
) -> None:
    began = time.monotonic()
    with pytest.raises(DatabaseUnavailableError), behind.read() as session:
        session.execute(sa.text("SELECT 1"))
        proxy.silence()
        session.execute(sa.text("SELECT 2"))
    assert LIMIT_SECONDS <= time.monotonic() - began < PATIENCE_SECONDS
    proxy.speak()
    assert stored(behind) == 0


def test_commit_that_is_never_answered_ends(behind: Database, proxy: SilentProxy) -> None:
    began = time.monotonic()
    with pytest.raises(DatabaseUnavailableError), behind.write() as session:
        arrivals.record_many(session, [arrival(uid())])
        proxy.silence()
    assert time.monotonic() - began < PATIENCE_SECONDS


def test_idle_connection_of_the_pool_and_a_new_one_end_too(behind: Database, proxy: SilentProxy) -> None:
    assert stored(behind) == 0
    proxy.silence()
    began = time.monotonic()
    with pytest.raises(DatabaseUnavailableError):
        stored(behind)
    assert time.monotonic() - began < PATIENCE_SECONDS


def test_many_rows_at_once_end_too(behind: Database, proxy: SilentProxy) -> None:
    began = time.monotonic()
    with pytest.raises(DatabaseUnavailableError), behind.write() as session:
        session.execute(sa.text("CREATE TEMPORARY TABLE many (n integer)"))
        proxy.silence()
        session.execute(sa.text("INSERT INTO many VALUES (:n)"), [{"n": n} for n in range(5000)])
    assert time.monotonic() - began < PATIENCE_SECONDS


def test_work_goes_on_when_the_server_speaks_again(
    proxy: SilentProxy, behind: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(behind, "busy_seconds", 30.0)
    assert stored(behind) == 0
    proxy.silence()
    back = threading.Timer(2.0, proxy.speak)
    back.start()
    arrivals.record(behind, [arrival(uid())])
    back.join()
    assert stored(behind) == 1
