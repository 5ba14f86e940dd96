"""What may leave: which version of a report goes to which destination, with which status, on whose signature."""

import sqlalchemy as sa
from sqlalchemy.orm import Session

from worker.core import reports
from worker.core.errors import SignatureError
from worker.core.records import AuthorKind, Message, ReportVersion, Signature
from worker.core.report import SIGNED_STATES, STATUS, Report, ReportState
from worker.core.settings import Destination

SIGNED_STATUSES = frozenset({"F", "C"})
"""OBR-25 of a text that stands on a signature."""


def may_leave(session: Session, version: ReportVersion, destination: Destination) -> bool:
    """Whether a destination gets this version: drafts and preliminary text where it wants them and no person was faster.

    What tells that a text is gone (rejected, retracted) goes only to who got some of it.
    """
    state = version.state
    if state is ReportState.AI_DRAFT:
        return destination.drafts != "none" and not reports.has_person(session, version.report_id)
    if state is ReportState.PRELIMINARY:
        return destination.preliminary and not reports.is_signed(session, version.report_id)
    if STATUS[state].leaves == "if_sent":
        return _something_left(session, version, destination.name)
    return True


def withdrawn_states(version: ReportVersion) -> frozenset[ReportState]:
    """The states whose undelivered texts leave no more because of this version, be it told of or not."""
    if STATUS[version.state].leaves == "if_sent":
        return frozenset(ReportState)
    return frozenset() if version.author_kind is AuthorKind.MACHINE else frozenset({ReportState.AI_DRAFT})


def is_overtaken(session: Session, message: Message) -> bool:
    """Whether a message holds a machine's draft whose report a person has written since: unread words leave no more."""
    version = session.get_one(ReportVersion, message.version_id)
    return version.state is ReportState.AI_DRAFT and reports.has_person(session, version.report_id)


def result_status(state: ReportState, destination: Destination) -> str:
    """OBR-25 of a version for a destination, which says itself what a draft is called there."""
    if state is ReportState.AI_DRAFT:
        return destination.drafts
    return STATUS[state].obr_25


def signature_for(session: Session, version: ReportVersion, value: Report) -> str:
    """The version whose signature covers this text: its own, or for a retraction the one that is withdrawn.

    Raises `SignatureError` where there is none.
    """
    signed = session.scalars(
        sa.select(Signature)
        .join(ReportVersion, Signature.version_id == ReportVersion.id)
        .where(ReportVersion.report_id == version.report_id, Signature.text_sha256 == value.text_sha256)
        .order_by(ReportVersion.number.desc())
    ).all()
    own = [s for s in signed if s.version_id == version.id]
    if own or (signed and version.state not in SIGNED_STATES):
        return (own or list(signed))[0].version_id
    raise SignatureError("a final, corrected or addended text leaves only with a person's signature on this very text")


def _something_left(session: Session, version: ReportVersion, destination: str) -> bool:
    left = sa.exists().where(
        Message.version_id == ReportVersion.id,
        ReportVersion.report_id == version.report_id,
        Message.destination == destination,
        Message.sent_at.is_not(None),
    )
    return bool(session.scalar(sa.select(left)))
