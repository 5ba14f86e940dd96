"""Messages of a report that is there already, after the settings were mended.

What a receiver refused for its content is renewed; what could not be written at all when a person signed is written now.
"""

import sqlalchemy as sa
from sqlalchemy.orm import Session

from worker.core import audit, editing, outbox, outbox_view
from worker.core.database import Database
from worker.core.errors import StateError
from worker.core.records import AuthorKind, Message, MessageState, ReportVersion
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


def write_missing(database: Database, report_id: str, desk: Desk, *, actor: str) -> list[str]:
    """Writes the standing text for every destination that may have it and has no message; returns their names.

    Only a person's text: a draft is made again by `mu2 study requeue`. Raises `StateError` for a draft, `ReportError` when
    it still cannot be written for one of them; then nothing is.
    """
    made: list[str] = []

    def change(session: Session) -> list[str]:
        version = editing.of_record(session, report_id)
        if version.author_kind is not AuthorKind.PERSON:
            raise StateError("this report is a machine's draft; requeue the study instead")
        has = _has(session, version)
        written = [
            row.destination
            for row in outbox.enqueue(
                session,
                version,
                [destination for destination in desk.destinations if destination.name not in has],
                desk.render,
                default_authority=desk.default_authority,
                procedure_codes=desk.procedure_codes,
            )
        ]
        if not written:
            return made  # nothing was missing, or a commit whose answer was lost
        made[:] = written
        audit.append(session, "write_messages", actor=actor, study_id=version.report.study_id, messages=written)
        return written

    return database.run(change)


def _has(session: Session, version: ReportVersion) -> set[str]:
    """The destinations that have a message of this version which nothing took the place of."""
    live = sa.select(Message.destination).where(
        Message.version_id == version.id, Message.state != MessageState.SUPERSEDED
    )
    return set(session.scalars(live))
