"""Nothing final leaves unsigned, and what was signed stays as it was: the database itself sees to it."""

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from tests.core.builders import destination, draft, drafted, enqueued, render, sign
from worker.core import outbox, reports, studies
from worker.core.database import Database
from worker.core.errors import (
    SignatureError,
)
from worker.core.records import (
    AuthorKind,
    Message,
    MessageState,
    ReportVersion,
    Signature,
    new_id,
)
from worker.core.records import Sentence as SentenceRow
from worker.core.report import ReportState


def test_final_text_without_a_signature_cannot_be_enqueued(database: Database) -> None:
    version_id = drafted(database)
    with pytest.raises(SignatureError), database.write() as session:
        machine = session.get_one(ReportVersion, version_id)
        version = reports.add_version(
            session,
            machine.report,
            state=ReportState.FINAL,
            sentences=draft().sentences,
            study_revision=1,
            author_kind=AuthorKind.PERSON,
        )
        outbox.enqueue(session, version, [destination()], render)


def forged(version_id: str, **changes: object) -> Message:
    """A message written around the outbox."""
    fields: dict[str, object] = {
        "version_id": version_id,
        "destination": "forged",
        "order_key": "A-1",
        "control_id": outbox.new_control_id(),
        "result_status": "F",
        "text_sha256": "0" * 64,
        "payload": b"",
        "created_at": studies.now(),
    }
    return Message(**{**fields, **changes})


@pytest.mark.parametrize("status", ["F", "C"])
def test_database_refuses_a_final_message_without_a_signature(database: Database, status: str) -> None:
    version_id = drafted(database)
    with pytest.raises(DBAPIError, match="signed"), database.write() as session:
        session.add(forged(version_id, result_status=status))


def test_database_refuses_a_final_message_whose_signature_is_on_another_text(database: Database) -> None:
    version_id = drafted(database)
    with database.write() as session:
        final_id = sign(session, version_id).id
    with pytest.raises(DBAPIError, match=r"(?i)foreign"), database.write() as session:
        session.add(forged(final_id, signature_version_id=final_id))


def test_signed_sentence_cannot_be_changed_added_or_removed(database: Database) -> None:
    version_id = drafted(database)
    with database.write() as session:
        final_id = sign(session, version_id).id
    statements = [
        sa.update(SentenceRow).where(SentenceRow.version_id == final_id).values(text="changed"),
        sa.delete(SentenceRow).where(SentenceRow.version_id == final_id),
        sa.update(SentenceRow).where(SentenceRow.version_id == version_id).values(version_id=final_id, ordinal=9),
        sa.update(ReportVersion).where(ReportVersion.id == final_id).values(state="rejected"),
        sa.update(Signature).values(text_sha256="0" * 64),
        sa.delete(Signature),
    ]
    for statement in statements:
        with pytest.raises(DBAPIError), database.write() as session:
            session.execute(statement)
    with database.write() as session:
        session.execute(sa.update(SentenceRow).where(SentenceRow.version_id == version_id).values(text="draft"))


def test_signature_on_another_text_than_the_version_is_refused(database: Database) -> None:
    version_id = drafted(database)
    with database.write() as session:
        user_id = session.get_one(ReportVersion, sign(session, version_id).id).author_id
    with pytest.raises(DBAPIError), database.write() as session:
        session.add(
            Signature(
                id=new_id(), version_id=version_id, text_sha256="0" * 64, user_id=user_id, signed_at=studies.now()
            )
        )


def test_final_whose_text_was_changed_around_the_triggers_is_not_sent(sqlite_database: Database) -> None:
    version_id = drafted(sqlite_database)
    with sqlite_database.write() as session:
        final = sign(session, version_id)
        (message_id,) = (m.id for m in outbox.enqueue(session, final, [destination()], render))
    with sqlite_database.engine.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER sentences_signed_update")
        connection.exec_driver_sql("UPDATE sentences SET text = 'forged'")
    with sqlite_database.write() as session:
        assert outbox.claim(session, "ris", 60) is None
    with sqlite_database.read() as session:
        assert session.get_one(Message, message_id).state is MessageState.REFUSED


def test_draft_of_a_signed_report_is_stored_but_never_sent(database: Database) -> None:
    version_id = drafted(database)
    with database.write() as session:
        sign(session, version_id)
    assert enqueued(database, version_id) == []
