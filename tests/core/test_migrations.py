"""Rows that an older revision wrote are carried over whole, and what guarded them guards them still."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from sqlalchemy.exc import DBAPIError

from worker.core import schema
from worker.core.database import Database
from worker.core.records import new_id
from worker.core.review_records import Authentication

AT = datetime(2026, 3, 31, 8, 0, tzinfo=UTC)
PLAIN: dict[type, Any] = {str: "", int: 1, datetime: AT, bytes: b"MSH|", bool: False}


@pytest.fixture(params=["sqlite", "postgresql"])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A database at revision 0003."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/old.sqlite"
    else:
        url = request.getfixturevalue("postgres").create(f"old_{new_id().replace('-', '')}")
    database = Database(url)
    config = schema._config()
    with database.write() as session:
        config.attributes["connection"] = session.connection()
        command.upgrade(config, "0003")
    yield database
    database.close()


def insert(database: Database, table_name: str, **values: Any) -> None:
    """A row as the old revision had it; what is not named is filled with something plain."""
    table = sa.Table(table_name, sa.MetaData(), autoload_with=database.engine)
    plain = {c.name: PLAIN[c.type.python_type] for c in table.columns if not c.nullable and c.name not in values}
    with database.write() as session:
        session.execute(table.insert().values({**plain, **values}))


def ids() -> Iterator[str]:
    """Ids as both databases take them in plain SQL: 32 hexadecimal digits."""
    while True:
        yield new_id().replace("-", "")


def messages_at_0003(database: Database, *states: str) -> tuple[str, str]:
    """One report version with a message for a destination of its own in each state; ids of its study and itself."""
    study, report, version = next(ids()), next(ids()), next(ids())
    insert(database, "studies", id=study, study_instance_uid="2.25.1", status="drafted")
    insert(database, "reports", id=report, study_id=study, state="ai_draft")
    insert(
        database,
        "report_versions",
        id=version,
        report_id=report,
        state="ai_draft",
        author_kind="machine",
        text_sha256="0",
    )
    for number, state in enumerate(states, start=1):
        insert(
            database,
            "messages",
            id=number,
            version_id=version,
            destination=f"to-{number}",
            control_id=f"C{number}",
            result_status="R",
            state=state,
            sent_at=None if state == "pending" else AT,
        )
    return study, version


def test_messages_survive_and_those_that_were_sent_are_in_doubt(old: Database) -> None:
    messages_at_0003(old, "pending", "refused", "acknowledged")
    schema.upgrade(old)
    with old.read() as session:
        rows = session.execute(sa.text("SELECT control_id, state, in_doubt, payload FROM messages ORDER BY id")).all()
    assert [(name, state, bool(doubt), bytes(payload)) for name, state, doubt, payload in rows] == [
        ("C1", "pending", False, b"MSH|"),
        ("C2", "refused", True, b"MSH|"),
        ("C3", "acknowledged", True, b"MSH|"),
    ]


def test_what_a_message_says_is_still_fixed(old: Database) -> None:
    messages_at_0003(old, "pending")
    schema.upgrade(old)
    with pytest.raises(DBAPIError, match="cannot be changed"), old.write() as session:
        session.execute(sa.text("UPDATE messages SET result_status = 'P'"))


def test_studies_survive_with_all_that_refers_to_them_and_say_nothing_of_their_order(old: Database) -> None:
    messages_at_0003(old, "acknowledged")
    schema.upgrade(old)
    with old.read() as session:
        rows = session.execute(
            sa.text(
                "SELECT s.study_instance_uid, s.procedure_code, s.visit, m.control_id FROM studies s "
                "JOIN reports r ON r.study_id = s.id JOIN report_versions v ON v.report_id = r.id "
                "JOIN messages m ON m.version_id = v.id"
            )
        ).all()
    assert [tuple(row) for row in rows] == [("2.25.1", "", "", "C1")]


def test_used_proof_says_which_study_it_signed_and_an_unused_one_goes(old: Database) -> None:
    study, version = messages_at_0003(old)
    user = next(ids())
    insert(old, "users", id=user, username="reader", role="radiologist")
    for used in (version, None):
        insert(
            old,
            "authentications",
            id=next(ids()),
            user_id=user,
            method="password",
            at=AT,
            version_id=used,
            used_at=None if used is None else AT,
        )
    schema.upgrade(old)
    with old.read() as session:
        (kept,) = session.scalars(sa.select(Authentication))
        assert (kept.study_id.replace("-", ""), kept.version_id is not None) == (study, True)
    for change in ("UPDATE authentications SET used_at = NULL, version_id = NULL", "DELETE FROM authentications"):
        with pytest.raises(DBAPIError, match="was used cannot be changed"), old.write() as session:
            session.execute(sa.text(change))
