"""Looking at the outbox: many messages without their content, one with all that is known of it."""

from collections.abc import Collection
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from worker.core.errors import NotFoundError
from worker.core.records import Message, MessageState, Report, ReportVersion


def many(
    session: Session, *, states: Collection[MessageState] = (), destination: str | None = None, limit: int = 50
) -> list[dict[str, Any]]:
    """Messages without their content, the newest first."""
    query = _with_study().order_by(Message.id.desc()).limit(limit)
    if states:
        query = query.where(Message.state.in_(states))
    if destination is not None:
        query = query.where(Message.destination == destination)
    return [_facts(row, study_id) for row, study_id in session.execute(query)]


def to_resend(
    session: Session, *, states: Collection[MessageState], destination: str | None = None, since: datetime | None = None
) -> list[int]:
    """Numbers of the messages in these states, in the order of sending; `since` bounds when they were written."""
    query = sa.select(Message.id).where(Message.state.in_(states)).order_by(Message.id)
    if destination is not None:
        query = query.where(Message.destination == destination)
    if since is not None:
        query = query.where(Message.created_at >= since)
    return list(session.scalars(query))


def get(session: Session, number: int) -> Message:
    """One message; raises `NotFoundError`."""
    row = session.get(Message, number)
    if row is None:
        raise NotFoundError(f"no message has the number {number}; `mu2 message list` shows them")
    return row


def facts(session: Session, row: Message) -> dict[str, Any]:
    """What is known of a message, without its content and without what the receiver said."""
    return _facts(*session.execute(_with_study().where(Message.id == row.id)).one())


def counts(session: Session) -> dict[str, dict[str, int]]:
    """Messages by destination and state."""
    counted: dict[str, dict[str, int]] = {}
    query = sa.select(Message.destination, Message.state, sa.func.count()).group_by(Message.destination, Message.state)
    for destination, state, count in session.execute(query):
        counted.setdefault(destination, {})[state.value] = count
    return counted


def _with_study() -> sa.Select[Any, Any]:
    return (
        sa.select(Message, Report.study_id)
        .join(ReportVersion, Message.version_id == ReportVersion.id)
        .join(Report, ReportVersion.report_id == Report.id)
    )


def _facts(row: Message, study_id: str) -> dict[str, Any]:
    return {
        "number": row.id,
        "study_id": study_id,
        "destination": row.destination,
        "control_id": row.control_id,
        "result_status": row.result_status,
        "state": row.state.value,
        "attempts": row.attempts,
        "created_at": row.created_at,
        "due_at": row.due_at,
        "sent_at": row.sent_at,
        "acknowledged_at": row.acknowledged_at,
        "acknowledgement": row.acknowledgement,
        "in_doubt": row.in_doubt,
        "error": row.error,
    }
