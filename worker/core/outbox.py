"""The outbox: messages are written in their report's transaction and sent later, in order, until a destination took them.

Order is kept for one accession and destination: a message waits while an earlier one of the same key is pending or sent.
A later version supersedes earlier ones that are not delivered, so a stuck draft never blocks a final; and what a person
has decided about leaves no more, whether or not a message tells of the decision. The bytes and the control id are fixed
when the row is written: every retry sends the same message, which a receiver can recognise. What a receiver refused for
its content is renewed: another message of the same version takes its place, and at most one of them can ever be
acknowledged.
"""

import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.orm import Session, aliased

from worker.core import outgoing, reports, studies
from worker.core.errors import (
    DeliveryUnavailableError,
    DeliveryUnreachableError,
    LeaseLostError,
    Mu2Error,
    NotFoundError,
    ReportError,
    StateError,
)
from worker.core.records import REASON_LENGTH, Message, MessageState, ReportVersion, Study, new_id
from worker.core.report import Report, ReportState, canonical_text, text_sha256
from worker.core.settings import Destination

Render = Callable[[Report, Destination, str, datetime], bytes]
"""A writer of `worker.results`: report, destination, control id, time of the message → its bytes."""

LONGEST_BACKOFF_SECONDS = 600.0
LONGEST_UNREACHABLE_SECONDS = 60.0  # a connection that is refused costs nothing; reports flow a minute after it is back
UNREACHABLE_SHARE_OF_AGE = 0.1
_OPEN = (MessageState.PENDING, MessageState.SENT)
_REPLACEABLE = (MessageState.PENDING, MessageState.PARKED, MessageState.REFUSED)
_CONTROL_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # Crockford's: nothing to misread on the telephone


@dataclass(frozen=True)
class Claimed:
    """A message that this process may send until its lease runs out."""

    message_id: int
    study_id: str
    token: str
    control_id: str
    payload: bytes
    attempts: int  # tries before this one


def enqueue(
    session: Session,
    version: ReportVersion,
    destinations: Iterable[Destination],
    render: Render,
    *,
    default_authority: str = "",
    procedure_codes: Mapping[str, str] | None = None,
) -> list[Message]:
    """Writes one row per destination that may have this version, and supersedes what is older and undelivered.

    A destination that gets no row loses what the version withdraws all the same: drafts that a person has read now, and
    with a rejection or retraction every older text.
    Raises `SignatureError` for signed states without a signature whose hash matches the text.
    """
    study = version.report.study
    value = reports.to_value(session, version.id, default_authority=default_authority, procedure_codes=procedure_codes)
    rows = []
    withdrawn = outgoing.withdrawn_states(version)
    for destination in destinations:
        # Before the question whether anything was sent: on PostgreSQL this waits for a sender that claims at this moment.
        _supersede_older(session, version, destination.name, withdrawn)
        if not outgoing.may_leave(session, version, destination):
            continue
        status = outgoing.result_status(value.state, destination)
        control_id = new_control_id()
        row = Message(
            version_id=version.id,
            destination=destination.name,
            order_key=study.accession or study.id,
            priority=study.priority,
            control_id=control_id,
            result_status=status,
            text_sha256=value.text_sha256,
            signature_version_id=outgoing.signature_for(session, version, value)
            if status in outgoing.SIGNED_STATUSES
            else None,
            payload=render(value, destination, control_id, studies.now()),
            created_at=studies.now(),
        )
        _supersede_older(session, version, destination.name, frozenset(ReportState))
        session.add(row)
        rows.append(row)
    session.flush()
    return rows


def enqueue_each(
    session: Session,
    version: ReportVersion,
    destinations: Iterable[Destination],
    render: Render,
    *,
    default_authority: str = "",
    procedure_codes: Mapping[str, str] | None = None,
) -> tuple[list[str], dict[str, ReportError]]:
    """As `enqueue`, but a message that cannot be written (no patient id, say) stops no other; returns both by destination."""
    written: list[str] = []
    unwritable: dict[str, ReportError] = {}
    for destination in destinations:
        try:
            with session.begin_nested():
                rows = enqueue(
                    session,
                    version,
                    [destination],
                    render,
                    default_authority=default_authority,
                    procedure_codes=procedure_codes,
                )
        except ReportError as error:
            unwritable[destination.name] = error
        else:
            written.extend(row.destination for row in rows)
    return written, unwritable


def new_control_id() -> str:
    """MSH-10: 20 random characters, never derived from a patient or a study."""
    return "".join(secrets.choice(_CONTROL_ALPHABET) for _ in range(20))


def due_destinations(session: Session) -> list[str]:
    """The destinations that have a message to send now."""
    return list(session.scalars(sa.select(Message.destination).where(_due()).distinct()))


def claim(session: Session, destination: str, lease_seconds: float) -> Claimed | None:
    """Claims the next message of a destination; a STAT report goes before a routine one. None when nothing is due.

    Raises `SignatureError` when a final text no longer has its signed hash; the message is then refused for good.
    """
    row = session.scalars(
        sa.select(Message)
        .where(Message.destination == destination, _due())
        .order_by(Message.priority, Message.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    ).one_or_none()
    if row is None:
        return None
    row.in_doubt = row.in_doubt or row.state is MessageState.SENT  # its sender died before it recorded an answer
    if outgoing.is_overtaken(session, row):
        row.state = MessageState.SUPERSEDED
        row.due_at = row.lease_token = row.lease_until = None
        return claim(session, destination, lease_seconds)
    if not _text_is_signed(session, row):
        row.state = MessageState.REFUSED
        row.error = "SignatureError: the text differs from the signed one; it is not sent"
        row.lease_token = row.lease_until = None
        return claim(session, destination, lease_seconds)
    row.state = MessageState.SENT
    row.sent_at = studies.now()
    row.lease_token = new_id()
    row.lease_until = row.sent_at + timedelta(seconds=lease_seconds)
    row.due_at = None
    study_id = session.scalars(
        sa.select(Study.id).join_from(Study, Study.report).join(ReportVersion).where(ReportVersion.id == row.version_id)
    ).one()
    return Claimed(row.id, study_id, row.lease_token, row.control_id, row.payload, row.attempts)


def acknowledge(session: Session, claimed: Claimed, code: str, answer_text: str = "") -> None:
    """Sent → acknowledged."""
    row = _held(session, claimed)
    if row is None:
        return
    row.state = MessageState.ACKNOWLEDGED
    row.acknowledged_at = studies.now()
    row.attempts += 1
    row.error = ""
    _close(row, code, answer_text)


def refuse(session: Session, claimed: Claimed, error: Mu2Error, code: str = "", answer_text: str = "") -> None:
    """Sent → refused: sending it again would be refused again; `resend` after the cause is mended."""
    row = _held(session, claimed)
    if row is None:
        return
    row.state = MessageState.REFUSED
    row.attempts += 1
    row.error = studies.describe(error)
    _close(row, code, answer_text)
    _yield_to_newer(session, row)


def retry_later(
    session: Session,
    claimed: Claimed,
    error: Mu2Error,
    *,
    max_attempts: int,
    backoff_seconds: float,
    code: str = "",
    answer_text: str = "",
) -> None:
    """Sent → pending until a back-off is over, or parked when it was the last try.

    A destination that cannot be reached costs no try: nothing was sent, and an afternoon's maintenance must not leave
    every report to be resent by hand. Its wait grows with the age of the message.
    """
    row = _held(session, claimed)
    if row is None:
        return
    row.error = studies.describe(error)
    _close(row, code, answer_text)
    if isinstance(error, DeliveryUnreachableError):
        row.state = MessageState.PENDING
        age_seconds = (studies.now() - row.created_at).total_seconds()
        wait = min(max(backoff_seconds, age_seconds * UNREACHABLE_SHARE_OF_AGE), LONGEST_UNREACHABLE_SECONDS)
        row.due_at = studies.now() + timedelta(seconds=wait)
        _yield_to_newer(session, row)
        return
    row.in_doubt = row.in_doubt or (isinstance(error, DeliveryUnavailableError) and not code)
    row.attempts += 1
    if row.attempts >= max_attempts:
        row.state = MessageState.PARKED
    else:
        row.state = MessageState.PENDING
        wait = min(backoff_seconds * 2 ** (row.attempts - 1), LONGEST_BACKOFF_SECONDS)
        row.due_at = studies.now() + timedelta(seconds=wait)
    _yield_to_newer(session, row)


def release(session: Session, claimed: Claimed) -> None:
    """Sent → pending without counting a try: nothing was sent, the sender stops."""
    row = _held(session, claimed)
    if row is None:
        return
    row.state = MessageState.PENDING
    row.lease_token = row.lease_until = None


def resend(session: Session, message_id: int) -> Message:
    """Parked or refused → pending, with all its tries again; raises `NotFoundError` or `StateError`."""
    row = _stopped(session, message_id, "sent again")
    row.state = MessageState.PENDING
    row.attempts = 0
    row.due_at = None
    row.error = ""
    _yield_to_newer(session, row)
    if row.state is MessageState.SUPERSEDED:
        raise StateError(
            f"message {message_id} was superseded: a person has read its draft, or its report has a later version; "
            "resend the message of that one, if there is any"
        )
    return row


def renew(
    session: Session,
    message_id: int,
    destinations: Iterable[Destination],
    render: Render,
    *,
    default_authority: str = "",
    procedure_codes: Mapping[str, str] | None = None,
    force: bool = False,
) -> Message:
    """Writes a parked or refused message again, by the settings as they are now, under a new control id.

    The old row stays as it was sent and is superseded. A message whose receiver did not answer some try may have been
    taken after all, and a receiver takes another control id for another message: that needs `force`, from someone who
    asked there. Raises `NotFoundError`, `StateError`, `ReportError` when it still cannot be written, `SignatureError`.
    """
    row = _stopped(session, message_id, "renewed")
    if row.in_doubt and not force:
        raise StateError(
            f"message {message_id} had a try without an answer, so its receiver may have taken it; "
            "ask there, then use --force, or resend it under its old control id"
        )
    destination = next((one for one in destinations if one.name == row.destination), None)
    if destination is None:
        raise StateError(f"no destination has the name {row.destination} any more")
    version = session.get_one(ReportVersion, row.version_id)
    later = sa.select(ReportVersion).where(
        ReportVersion.report_id == version.report_id, ReportVersion.number > version.number
    )
    if any(outgoing.may_leave(session, one, destination) for one in session.scalars(later)):
        raise StateError(f"the report of message {message_id} has a later version; that one is sent")
    row.state = MessageState.SUPERSEDED
    row.due_at = None
    session.flush()
    written = enqueue(
        session,
        version,
        [destination],
        render,
        default_authority=default_authority,
        procedure_codes=procedure_codes,
    )
    if not written:
        raise StateError(f"a report that is {version.state} may not leave for {destination.name} by its settings")
    return written[0]


def _due() -> sa.ColumnElement[bool]:
    at = studies.now()
    earlier = aliased(Message)
    first_of_its_order = ~sa.exists().where(
        earlier.destination == Message.destination,
        earlier.order_key == Message.order_key,
        earlier.id < Message.id,
        earlier.state.in_(_OPEN),
    )
    waits = sa.and_(Message.state == MessageState.PENDING, sa.or_(Message.due_at.is_(None), Message.due_at <= at))
    in_doubt = sa.and_(Message.state == MessageState.SENT, Message.lease_until < at)  # its sender died
    return sa.and_(sa.or_(waits, in_doubt), first_of_its_order)


def _text_is_signed(session: Session, row: Message) -> bool:
    """Recomputes the hash of what F and C stand on, from the sentences as they are now."""
    if row.result_status not in outgoing.SIGNED_STATUSES:
        return True
    version = session.get(ReportVersion, row.version_id)
    if version is None:
        return False
    text = canonical_text(reports.to_sentence(s) for s in version.sentences)
    return text_sha256(text) == row.text_sha256


def _supersede_older(
    session: Session, version: ReportVersion, destination: str, states: frozenset[ReportState]
) -> None:
    older = sa.select(ReportVersion.id).where(
        ReportVersion.report_id == version.report_id,
        ReportVersion.number < version.number,
        ReportVersion.state.in_(states),
    )
    session.execute(
        sa.update(Message)
        .where(Message.version_id.in_(older), Message.destination == destination, Message.state.in_(_REPLACEABLE))
        .values(state=MessageState.SUPERSEDED, due_at=None)
        .execution_options(synchronize_session="fetch")
    )


def _yield_to_newer(session: Session, row: Message) -> None:
    """A message that failed while a newer version waits behind it, or a person read its draft, is superseded."""
    version = session.get_one(ReportVersion, row.version_id)
    newer = sa.exists().where(
        Message.version_id == ReportVersion.id,
        Message.destination == row.destination,
        ReportVersion.report_id == version.report_id,
        ReportVersion.number > version.number,
    )
    if session.scalar(sa.select(newer)) or outgoing.is_overtaken(session, row):
        row.state = MessageState.SUPERSEDED
        row.due_at = None


def _locked(session: Session, message_id: int) -> Message:
    row = session.get(Message, message_id, with_for_update=True, populate_existing=True)
    if row is None:
        raise NotFoundError(f"no message has the number {message_id}")
    return row


def _stopped(session: Session, message_id: int, what: str) -> Message:
    """The locked row of a message that waits for a person to have it sent again or renewed."""
    row = _locked(session, message_id)
    if row.state not in {MessageState.PARKED, MessageState.REFUSED}:
        raise StateError(f"message {message_id} is {row.state}; only parked and refused messages are {what}")
    return row


def _held(session: Session, claimed: Claimed) -> Message | None:
    """The locked row while the claim holds it; None when this claim was finished before (a lost commit answer)."""
    row = _locked(session, claimed.message_id)
    if row.lease_token == claimed.token:
        return row
    if row.lease_token is None and row.attempts > claimed.attempts:
        return None
    raise LeaseLostError(f"message {claimed.message_id} was taken over by another sender")


def _close(row: Message, code: str, answer_text: str) -> None:
    row.acknowledgement = code[:2]
    row.answer_text = answer_text[:REASON_LENGTH]
    row.lease_token = row.lease_until = None
