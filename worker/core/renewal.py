"""Renewing a message: what a receiver refused for its content is written again after the settings were mended."""

import sqlalchemy as sa
from sqlalchemy.orm import Session

from worker.core import audit, outbox, outbox_view
from worker.core.database import Database
from worker.core.records import Message
from worker.core.signing import Desk


def run(database: Database, number: int, desk: Desk, *, actor: str, origin: str = "", force: bool = False) -> Message:
    """Renews one message in one audited transaction and returns the new one; raises as `outbox.renew`."""
    made: list[str] = []

    def change(session: Session) -> Message:
        there = sa.select(Message).where(Message.control_id.in_(made))
        row = session.scalars(there).one_or_none()
        if row is not None:
            return row  # a commit whose answer was lost
        row = outbox.renew(
            session,
            number,
            desk.destinations,
            desk.render,
            default_authority=desk.default_authority,
            procedure_codes=desk.procedure_codes,
            force=force,
        )
        made[:] = [row.control_id]
        audit.append(
            session,
            "renew",
            actor=actor,
            study_id=outbox_view.facts(session, row)["study_id"],
            origin=origin,
            message=number,
            renewed=row.id,
            force=force,
        )
        return row

    return database.run(change)
