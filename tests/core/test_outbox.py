"""The outbox keeps order, supersedes, and lets nothing final leave unsigned."""

from datetime import timedelta

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from tests.core.builders import destination, draft, drafted, enqueued, render, sign
from worker.core import outbox, reports, studies
from worker.core.database import Database
from worker.core.errors import (
    DeliveryRefusedError,
    DeliveryUnavailableError,
    DeliveryUnreachableError,
    LeaseLostError,
    ReportError,
    StateError,
)
from worker.core.records import (
    AuthorKind,
    Message,
    MessageState,
    ReportVersion,
)
from worker.core.report import ReportState


def taken(database: Database, name: str = "ris") -> outbox.Claimed | None:
    """The next claim of a destination."""
    with database.write() as session:
        return outbox.claim(session, name, 60)


def state_of(database: Database, message_id: int) -> MessageState:
    """The state of a message as it is now."""
    with database.read() as session:
        return session.get_one(Message, message_id).state


def failed(database: Database, claim: outbox.Claimed, max_attempts: int = 3) -> None:
    """Plays a destination that is away."""
    with database.write() as session:
        outbox.retry_later(
            session, claim, DeliveryUnavailableError("no answer"), max_attempts=max_attempts, backoff_seconds=5
        )


def test_draft_leaves_only_to_destinations_that_chose_how(database: Database) -> None:
    version_id = drafted(database)
    enqueued(
        database,
        version_id,
        destination("none", drafts="none"),
        destination("as-r", drafts="R"),
        destination("as-p", drafts="P"),
    )
    with database.read() as session:
        rows = session.execute(sa.select(Message.destination, Message.result_status).order_by(Message.id)).all()
    assert [tuple(row) for row in rows] == [("as-r", "R"), ("as-p", "P")]


def test_every_retry_sends_the_same_bytes_and_control_id(database: Database) -> None:
    (message_id,) = enqueued(database, drafted(database))
    first = taken(database)
    assert first is not None
    failed(database, first)
    assert taken(database) is None
    with database.write() as session:
        session.get_one(Message, message_id).due_at = None
    second = taken(database)
    assert second is not None
    assert (second.control_id, second.payload) == (first.control_id, first.payload)


def test_message_is_parked_after_its_last_try_and_resend_gives_it_all_again(database: Database) -> None:
    (message_id,) = enqueued(database, drafted(database))
    claim = taken(database)
    assert claim is not None
    failed(database, claim, max_attempts=1)
    assert state_of(database, message_id) is MessageState.PARKED
    with database.write() as session:
        outbox.resend(session, message_id)
    again = taken(database)
    assert again is not None and again.attempts == 0


def test_refused_message_is_not_sent_again_by_itself(database: Database) -> None:
    (message_id,) = enqueued(database, drafted(database))
    claim = taken(database)
    assert claim is not None
    with database.write() as session:
        outbox.refuse(session, claim, DeliveryRefusedError("AR"), "AR")
    assert state_of(database, message_id) is MessageState.REFUSED
    assert taken(database) is None


def test_resend_of_an_acknowledged_message_is_refused(database: Database) -> None:
    (message_id,) = enqueued(database, drafted(database))
    claim = taken(database)
    assert claim is not None
    with database.write() as session:
        outbox.acknowledge(session, claim, "AA")
    with pytest.raises(StateError), database.write() as session:
        outbox.resend(session, message_id)


def test_later_version_waits_for_the_one_under_way_and_supersedes_it_when_it_fails(database: Database) -> None:
    version_id = drafted(database)
    (early,) = enqueued(database, version_id)
    claim = taken(database)
    assert claim is not None
    with database.write() as session:
        final = sign(session, version_id)
        (late,) = (m.id for m in outbox.enqueue(session, final, [destination()], render))
    assert taken(database) is None
    failed(database, claim)
    assert state_of(database, early) is MessageState.SUPERSEDED
    final_claim = taken(database)
    assert final_claim is not None and final_claim.message_id == late


def test_final_supersedes_a_draft_that_is_parked(database: Database) -> None:
    version_id = drafted(database)
    (early,) = enqueued(database, version_id)
    claim = taken(database)
    assert claim is not None
    failed(database, claim, max_attempts=1)
    with database.write() as session:
        outbox.enqueue(session, sign(session, version_id), [destination()], render)
    assert state_of(database, early) is MessageState.SUPERSEDED


def test_dead_destination_does_not_hold_up_another(database: Database) -> None:
    enqueued(database, drafted(database), destination("dead"), destination("alive"))
    assert taken(database, "dead") is not None
    assert taken(database, "alive") is not None


def test_one_accession_waits_in_line_and_another_passes(database: Database) -> None:
    enqueued(database, drafted(database, accession="A"))
    enqueued(database, drafted(database, accession="A"))
    enqueued(database, drafted(database, accession="B"))
    keys = []
    while (claim := taken(database)) is not None:
        with database.read() as session:
            keys.append(session.get_one(Message, claim.message_id).order_key)
    assert keys == ["A", "B"]


def test_message_of_a_sender_that_died_is_sent_again_under_its_control_id(database: Database) -> None:
    enqueued(database, drafted(database))
    first = taken(database)
    assert first is not None
    with database.write() as session:
        session.get_one(Message, first.message_id).lease_until = studies.now() - timedelta(seconds=1)
    second = taken(database)
    assert second is not None and second.control_id == first.control_id
    with pytest.raises(LeaseLostError), database.write() as session:
        outbox.acknowledge(session, first, "AA")


def test_acknowledgement_whose_commit_answer_was_lost_is_recognised(database: Database) -> None:
    (message_id,) = enqueued(database, drafted(database))
    claim = taken(database)
    assert claim is not None
    for _ in range(2):
        with database.write() as session:
            outbox.acknowledge(session, claim, "AA")
    with database.read() as session:
        assert session.get_one(Message, message_id).attempts == 1


@pytest.mark.parametrize(
    "change",
    [{"payload": b"other"}, {"result_status": "P"}, {"control_id": "OTHER"}, {"text_sha256": "0" * 64}],
    ids=lambda change: next(iter(change)),
)
def test_what_a_message_says_cannot_be_changed(database: Database, change: dict[str, object]) -> None:
    (message_id,) = enqueued(database, drafted(database))
    with pytest.raises(DBAPIError, match="cannot be changed"), database.write() as session:
        session.execute(sa.update(Message).where(Message.id == message_id).values(**change))


def test_destination_that_cannot_be_reached_costs_no_try(database: Database) -> None:
    (message_id,) = enqueued(database, drafted(database))
    for _ in range(5):
        claim = taken(database)
        assert claim is not None
        with database.write() as session:
            outbox.retry_later(
                session, claim, DeliveryUnreachableError("no connection"), max_attempts=1, backoff_seconds=5
            )
        with database.write() as session:
            row = session.get_one(Message, message_id)
            assert (row.state, row.attempts) == (MessageState.PENDING, 0)
            assert row.due_at is not None and row.due_at > studies.now()
            row.due_at = None


def test_new_draft_lies_unsent_beside_what_a_person_saved(database: Database) -> None:
    version_id = drafted(database)
    with database.write() as session:
        machine = session.get_one(ReportVersion, version_id)
        reports.add_version(
            session,
            machine.report,
            state=ReportState.PRELIMINARY,
            sentences=draft().sentences,
            study_revision=1,
            author_kind=AuthorKind.PERSON,
        )
        machine.report.state = ReportState.PRELIMINARY
        study = machine.report.study
        study.revision = 2
        late = reports.add_draft(session, study, draft("Late slices."))
        assert machine.report.state is ReportState.PRELIMINARY
        assert outbox.enqueue(session, late, [destination()], render) == []


def refused(database: Database, version_id: str, **changes: object) -> int:
    """The number of a message whose receiver refused what it says."""
    (number,) = enqueued(database, version_id, **changes)
    claim = taken(database)
    assert claim is not None
    with database.write() as session:
        outbox.refuse(session, claim, DeliveryRefusedError("AR"), "AR")
    return number


def renewed(database: Database, number: int, *, force: bool = False, **changes: object) -> int:
    """The number of the message that takes its place."""
    with database.write() as session:
        return outbox.renew(session, number, [destination(**changes)], render, force=force).id


def test_refused_final_is_written_again_under_a_new_control_id_and_its_old_row_stays(database: Database) -> None:
    with database.write() as session:
        final_id = sign(session, drafted(database)).id
    old = refused(database, final_id)
    new = renewed(database, old)
    with database.read() as session:
        before, after = session.get_one(Message, old), session.get_one(Message, new)
    assert (before.state, before.acknowledgement) == (MessageState.SUPERSEDED, "AR")
    assert (after.result_status, after.version_id) == ("F", before.version_id)
    assert after.control_id != before.control_id and after.control_id.encode() in after.payload
    claim = taken(database)
    assert claim is not None and claim.message_id == new


def test_database_keeps_a_message_that_was_renewed_from_ever_being_accepted(database: Database) -> None:
    old = refused(database, drafted(database))
    new = renewed(database, old)
    with pytest.raises(DBAPIError), database.write() as session:
        session.execute(sa.update(Message).where(Message.id == old).values(state=MessageState.ACKNOWLEDGED))
    with pytest.raises(StateError), database.write() as session:
        outbox.resend(session, old)
    with pytest.raises(StateError), database.write() as session:
        outbox.renew(session, old, [destination()], render)
    assert (state_of(database, old), state_of(database, new)) == (MessageState.SUPERSEDED, MessageState.PENDING)


def test_message_that_a_receiver_may_have_taken_unheard_is_renewed_by_force_only(database: Database) -> None:
    (number,) = enqueued(database, drafted(database))
    first = taken(database)
    assert first is not None
    failed(database, first)  # no answer
    with database.write() as session:
        session.get_one(Message, number).due_at = None
    second = taken(database)
    assert second is not None
    with database.write() as session:
        outbox.refuse(session, second, DeliveryRefusedError("AR"), "AR")
    with pytest.raises(StateError, match="may have taken it"):
        renewed(database, number)
    assert state_of(database, renewed(database, number, force=True)) is MessageState.PENDING


def test_message_whose_sender_died_is_in_doubt(database: Database) -> None:
    (number,) = enqueued(database, drafted(database))
    assert taken(database) is not None
    with database.write() as session:
        session.get_one(Message, number).lease_until = studies.now() - timedelta(seconds=1)
    assert taken(database) is not None
    with database.read() as session:
        assert session.get_one(Message, number).in_doubt


def test_receiver_that_could_not_be_reached_leaves_no_doubt(database: Database) -> None:
    (number,) = enqueued(database, drafted(database))
    claim = taken(database)
    assert claim is not None
    with database.write() as session:
        error = DeliveryUnreachableError("no connection")
        outbox.retry_later(session, claim, error, max_attempts=3, backoff_seconds=5)
    with database.read() as session:
        assert not session.get_one(Message, number).in_doubt


@pytest.mark.parametrize("state", [MessageState.PENDING, MessageState.SENT, MessageState.ACKNOWLEDGED])
def test_message_that_is_on_its_way_or_accepted_is_not_renewed(database: Database, state: MessageState) -> None:
    (number,) = enqueued(database, drafted(database))
    with database.write() as session:
        session.get_one(Message, number).state = state
    with pytest.raises(StateError, match="only parked and refused"):
        renewed(database, number)


def test_draft_is_not_renewed_once_a_person_signed(database: Database) -> None:
    version_id = drafted(database)
    number = refused(database, version_id)
    with database.write() as session:
        sign(session, version_id)
    with pytest.raises(StateError, match="later version"):
        renewed(database, number)
    assert state_of(database, number) is MessageState.REFUSED


def test_message_is_not_renewed_for_a_destination_that_no_longer_takes_its_kind_or_is_gone(database: Database) -> None:
    number = refused(database, drafted(database))
    with pytest.raises(StateError, match="may not leave"):
        renewed(database, number, drafts="none")
    with pytest.raises(StateError, match="no destination"):
        renewed(database, number, name="elsewhere")
    assert state_of(database, number) is MessageState.REFUSED


def test_renewing_that_fails_leaves_the_old_message_as_it_was(database: Database) -> None:
    def unwritable(*_: object) -> bytes:
        raise ReportError("the patient has no id")

    number = refused(database, drafted(database))
    with pytest.raises(ReportError), database.write() as session:
        outbox.renew(session, number, [destination()], unwritable)
    assert state_of(database, number) is MessageState.REFUSED
