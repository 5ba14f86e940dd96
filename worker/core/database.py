"""One engine per process, transactions that wait out a database that is locked or away.

SQLite runs in WAL mode with `synchronous=FULL`: a commit that returned survives a power cut. Writing transactions take
the write lock at their start (`BEGIN IMMEDIATE`), so two writers queue instead of failing half way.
"""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import sqlalchemy as sa
import structlog
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from worker.core.errors import DatabaseFullError, DatabaseUnavailableError
from worker.core.settings import Settings

log = structlog.get_logger(__name__)

T = TypeVar("T")

FIRST_WAIT_SECONDS = 0.05
LONGEST_WAIT_SECONDS = 1.0
SQLITE_LOCK_SECONDS = 5.0  # per try; `busy_seconds` bounds the whole
POSTGRESQL_DISK_FULL = "53100"  # SQLSTATE disk_full

_TRANSIENT = (OperationalError, InterfaceError, PoolTimeoutError)


class Database:
    """The engine and the two ways to use it: `read()` for a look, `run()` for a change."""

    def __init__(self, url: str, busy_seconds: float = 30.0) -> None:
        self.url = sa.make_url(url)
        self.busy_seconds = busy_seconds
        self.engine = _engine(self.url)
        self._writing = self.engine.execution_options(mu2_immediate=True)

    @classmethod
    def from_settings(cls, settings: Settings) -> "Database":
        """The database that the settings name; creates MU2_HOME for the default SQLite file."""
        url = sa.make_url(settings.database_url)
        if url.get_backend_name() == "sqlite" and url.database and url.database != ":memory:":
            settings.make_home()
        return cls(settings.database_url, settings.database.busy_seconds)

    @property
    def is_sqlite(self) -> bool:
        """Whether the database is one SQLite file."""
        return self.url.get_backend_name() == "sqlite"

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session for reading; its changes are never committed. Raises `DatabaseUnavailableError`."""
        try:
            with Session(self.engine, expire_on_commit=False) as session:
                yield session
        except _TRANSIENT as error:
            if _is_lasting(error):
                raise
            raise _unavailable(error) from error

    @contextmanager
    def write(self) -> Iterator[Session]:
        """One transaction, committed when the block ends without an error. Tried once; raises `DatabaseUnavailableError`."""
        try:
            with Session(self._writing, expire_on_commit=False) as session, session.begin():
                yield session
        except _TRANSIENT as error:
            if _is_lasting(error):
                raise
            raise _unavailable(error) from error
        except DBAPIError as error:
            if error.connection_invalidated:
                raise _unavailable(error) from error
            raise

    def run(self, change: Callable[[Session], T], *, busy_seconds: float | None = None) -> T:
        """Runs `change` in a transaction and again while the database is locked or away, up to `busy_seconds`.

        A commit whose answer was lost runs `change` a second time: `change` must recognise its own work.
        Raises `DatabaseUnavailableError` when the time is over.
        """
        limit = time.monotonic() + (self.busy_seconds if busy_seconds is None else busy_seconds)
        wait = FIRST_WAIT_SECONDS
        while True:
            try:
                with self.write() as session:
                    return change(session)
            except DatabaseUnavailableError as error:
                if time.monotonic() + wait > limit:
                    raise
                log.warning("database_unavailable", retry_seconds=wait, error=type(error).__name__)
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)

    def rehearse(self, change: Callable[[Session], T]) -> T:
        """Runs `change` as `run` does and takes it back: what it returns or raises is what `run` would, and nothing stays.

        What it returns must hold no rows: they are forgotten with the transaction.
        """

        def change_and_take_back(session: Session) -> T:
            result = change(session)
            session.flush()
            session.rollback()
            return result

        return self.run(change_and_take_back)

    def close(self) -> None:
        """Closes every connection of the pool."""
        self.engine.dispose()


def _is_lasting(error: Exception) -> bool:
    """SQLite calls a missing table or column an operational error too; waiting does not mend it."""
    code = getattr(getattr(error, "orig", None), "sqlite_errorcode", None)
    return code == sqlite3.SQLITE_ERROR


def _unavailable(error: Exception) -> DatabaseUnavailableError:
    cause = getattr(error, "orig", None) or error
    if (
        getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        or getattr(cause, "sqlstate", None) == POSTGRESQL_DISK_FULL
    ):
        return DatabaseFullError("the disk of the database is full; make room there, nothing is lost meanwhile")
    kind = type(cause).__name__
    return DatabaseUnavailableError(f"the database is locked or away ({kind}); it is tried again")


def _engine(url: sa.URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        from worker.core import postgresql  # the driver loads only where it is used

        engine = sa.create_engine(
            url,
            pool_pre_ping=True,
            pool_size=10,
            max_overflow=20,
            pool_timeout=10,
            hide_parameters=True,
            connect_args=postgresql.CONNECT_ARGUMENTS,
        )
        event.listen(engine, "do_connect", lambda _dialect, _record, given, named: postgresql.connect(*given, **named))
        return engine
    engine = sa.create_engine(
        url, hide_parameters=True, connect_args={"timeout": SQLITE_LOCK_SECONDS, "check_same_thread": False}
    )
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy's own BEGIN below, not the driver's late one
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "recursive_triggers=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    immediate = connection.get_execution_options().get("mu2_immediate", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")
