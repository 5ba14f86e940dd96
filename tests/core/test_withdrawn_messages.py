"""What a person has decided about leaves no more, whether or not a message tells of the decision."""

import pytest
import sqlalchemy as sa

from tests.core.builders import destination, draft, drafted, enqueued, render
from worker.core import outbox, reports
from worker.core.database import Database
from worker.core.errors import DeliveryRefusedError, DeliveryUnreachableError, StateError
from worker.core.records import AuthorKind, Message, MessageState, ReportVersion
from worker.core.report import ReportState

RIS = destination()
WANTS_PRELIMINARY = destination(preliminary=True)


def decided(database: Database, draft_id: str, state: ReportState, *destinations: object) -> list[int]:
    """A person's version after a draft, with the numbers of its messages."""
    with database.write() as session:
        report = session.get_one(ReportVersion, draft_id).report
        version = reports.add_version(
            session,
            report,
            state=state,
            sentences=draft().sentences,
            study_revision=1,
            author_kind=AuthorKind.PERSON,
        )
        report.state = state
        return [row.id for row in outbox.enqueue(session, version, destinations or [RIS], render)]  # type: ignore[arg-type]


def taken(database: Database) -> outbox.Claimed | None:
    """The next claim."""
    with database.write() as session:
        return outbox.claim(session, "ris", 60)


def states(database: Database) -> list[tuple[str, MessageState]]:
    """Status and state of every message, in their order."""
    with database.read() as session:
        rows = session.execute(sa.select(Message.result_status, Message.state).order_by(Message.id))
        return [(status, state) for status, state in rows]


def test_rejected_draft_that_had_not_left_yet_never_leaves(database: Database) -> None:
    version_id = drafted(database)
    enqueued(database, version_id)
    assert decided(database, version_id, ReportState.REJECTED) == []
    assert states(database) == [("R", MessageState.SUPERSEDED)]
    assert taken(database) is None


def test_rejection_withdraws_a_preliminary_text_that_had_not_left_yet(database: Database) -> None:
    version_id = drafted(database)
    decided(database, version_id, ReportState.PRELIMINARY, WANTS_PRELIMINARY)
    assert decided(database, version_id, ReportState.REJECTED, WANTS_PRELIMINARY) == []
    assert states(database) == [("P", MessageState.SUPERSEDED)]


def test_draft_does_not_leave_once_it_was_read_though_its_destination_wants_no_preliminary(database: Database) -> None:
    version_id = drafted(database)
    enqueued(database, version_id)
    assert decided(database, version_id, ReportState.PRELIMINARY) == []
    assert states(database) == [("R", MessageState.SUPERSEDED)]


def test_word_of_a_rejection_outlives_a_preliminary_text_that_its_destination_does_not_want(database: Database) -> None:
    version_id = drafted(database)
    enqueued(database, version_id)
    claim = taken(database)
    assert claim is not None
    with database.write() as session:
        outbox.acknowledge(session, claim, "AA")
    assert len(decided(database, version_id, ReportState.REJECTED)) == 1
    decided(database, version_id, ReportState.PRELIMINARY)
    assert states(database)[1] == ("X", MessageState.PENDING)


def test_draft_under_way_is_not_tried_again_once_a_person_read_it(database: Database) -> None:
    version_id = drafted(database)
    enqueued(database, version_id)
    claim = taken(database)
    assert claim is not None
    decided(database, version_id, ReportState.PRELIMINARY)
    with database.write() as session:
        error = DeliveryUnreachableError("no connection")
        outbox.retry_later(session, claim, error, max_attempts=3, backoff_seconds=5)
    assert states(database) == [("R", MessageState.SUPERSEDED)]


def test_released_draft_is_not_claimed_again_once_a_person_read_it(database: Database) -> None:
    version_id = drafted(database)
    enqueued(database, version_id)
    claim = taken(database)
    assert claim is not None
    decided(database, version_id, ReportState.PRELIMINARY)
    with database.write() as session:
        outbox.release(session, claim)
    assert taken(database) is None
    assert states(database) == [("R", MessageState.SUPERSEDED)]


def test_refused_draft_of_a_report_that_a_person_read_is_not_resent(database: Database) -> None:
    version_id = drafted(database)
    (number,) = enqueued(database, version_id)
    claim = taken(database)
    assert claim is not None
    with database.write() as session:
        outbox.refuse(session, claim, DeliveryRefusedError("AR"), "AR")
    decided(database, version_id, ReportState.PRELIMINARY, destination("elsewhere"))  # this one left the settings
    with pytest.raises(StateError, match="a person has read its draft"), database.write() as session:
        outbox.resend(session, number)
    assert taken(database) is None
