"""The audit chain shows every change."""

import threading

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from worker.core import audit
from worker.core.database import Database
from worker.core.errors import AuditError


def filled(database: Database, events: int = 5) -> None:
    """A chain of some events."""
    for number in range(events):
        with database.write() as session:
            audit.append(session, "study_viewed", actor="reader", detail_number=number)


def test_chain_of_events_verifies_and_counts_them(database: Database) -> None:
    filled(database)
    with database.read() as session:
        assert audit.verify(session).events == 5


@pytest.mark.parametrize("statement", ["UPDATE audit_events SET actor = 'x'", "DELETE FROM audit_events"])
def test_database_refuses_to_change_or_remove_events(database: Database, statement: str) -> None:
    filled(database, 1)
    with pytest.raises(DBAPIError), database.write() as session:
        session.execute(sa.text(statement))


@pytest.mark.parametrize(
    "forgery",
    [
        "UPDATE audit_events SET actor = 'x' WHERE id = 3",
        "UPDATE audit_events SET detail = '{}' WHERE id = 3",
        "DELETE FROM audit_events WHERE id = 3",
        "UPDATE audit_events SET id = 99 WHERE id = 3",
    ],
)
def test_forgery_around_the_triggers_breaks_the_chain(sqlite_database: Database, forgery: str) -> None:
    filled(sqlite_database)
    with sqlite_database.engine.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER audit_update")
        connection.exec_driver_sql("DROP TRIGGER audit_delete")
        connection.exec_driver_sql(forgery)
    with sqlite_database.read() as session, pytest.raises(AuditError, match="breaks at event"):
        audit.verify(session)


def test_writers_at_once_make_one_chain(database: Database) -> None:
    threads = [threading.Thread(target=filled, args=(database, 5)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as session:
        assert audit.verify(session).events == 20


def test_event_of_a_transaction_that_failed_is_not_in_the_chain(database: Database) -> None:
    with pytest.raises(ZeroDivisionError), database.write() as session:
        audit.append(session, "study_viewed", actor="reader")
        _ = 1 / 0
    with database.read() as session:
        assert audit.verify(session).events == 0
