"""Discarding a study: all that is here of it goes, so that the PACS can send it again as if for the first time.

For a study whose objects carry two patients' ids, or hold a damaged object: what is sent again under the same UIDs would
else be taken for a duplicate or a conflict. Never discarded: a signed report, an instance under a storage commitment (the
sender may have erased its copy), what arrives or is being worked on now.

The study is locked while its files go, and its rows are committed after the last one went: a listener that starts between
would else find files without rows and record them again. A discard that died half way is finished by the next.
"""

from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.orm import Session

from worker.core import audit, reports, retention
from worker.core.consents import TrainingConsent
from worker.core.database import Database
from worker.core.errors import NotFoundError, StateError
from worker.core.records import (
    Attempt,
    Instance,
    Message,
    MessageState,
    Report,
    ReportVersion,
    Series,
    Study,
    StudyStatus,
)
from worker.core.review_records import Authentication, Presence

_UNDER_WAY = {
    StudyStatus.RECEIVING: "it still arrives; wait until it is complete",
    StudyStatus.PREPARING: "a worker has it; wait, or take it away with `mu2 study requeue --force`",
    StudyStatus.DRAFTING: "a worker has it; wait, or take it away with `mu2 study requeue --force`",
}


@dataclass(frozen=True)
class Discarded:
    """What goes, or went, with a study."""

    status: str  # where the study stood
    instances: int
    instance_bytes: int
    versions: int  # of its unsigned report
    messages: int
    messages_sent: int  # of these, the ones whose bytes had left: their receivers keep what they have


def look(session: Session, study_id: str) -> Discarded:
    """What a discard of this study would take.

    Raises `NotFoundError`, or `StateError` when the study must stay: signed, committed, arriving or under way.
    """
    study = session.get(Study, study_id, with_for_update=True, populate_existing=True)
    if study is None:
        raise NotFoundError(f"no study has the id {study_id}")
    if study.status in _UNDER_WAY:
        raise StateError(f"study {study_id} is {study.status}: {_UNDER_WAY[study.status]}")
    if study.report is not None and reports.is_signed(session, study.report.id):
        raise StateError(
            f"the report of study {study_id} is signed; a signed report is never removed, retract it instead"
        )
    rows = _instances(session, study_id)
    committed = sum(row.committed_at is not None for row in rows)
    if committed:
        raise StateError(
            f"{committed} instances of study {study_id} are under a storage commitment: "
            "the sender may have erased its copy, so they are never removed"
        )
    messages = session.execute(_messages(study_id)).all()
    if any(state is MessageState.SENT for state, _ in messages):
        raise StateError(f"a message about study {study_id} is on its way; try again when it was answered")
    return Discarded(
        status=study.status.value,
        instances=len(rows),
        instance_bytes=sum(row.size_bytes for row in rows if row.removed_at is None),
        versions=len(study.report.versions) if study.report else 0,
        messages=len(messages),
        messages_sent=sum(sent_at is not None for _, sent_at in messages),
    )


def run(database: Database, store_root: Path, study_id: str, *, actor: str) -> Discarded:
    """Removes files, rows and unsigned report of a study in one transaction, and writes it into the audit.

    Raises as `look`, and `StoreUnavailableError` when a file cannot be removed; then no row is gone.
    """
    tried: list[Discarded] = []

    def remove(session: Session) -> Discarded:
        if tried and session.get(Study, study_id) is None:
            return tried[-1]  # a commit whose answer was lost
        discarded = look(session, study_id)
        tried.append(discarded)
        retention.remove_files(store_root, study_id, _instances(session, study_id))
        for statement in deletions(session, study_id):
            session.execute(statement.execution_options(synchronize_session=False))
        session.expunge_all()
        audit.append(session, "discard", actor=actor, study_id=study_id, **asdict(discarded))
        return discarded

    return database.run(remove)


def deletions(session: Session, study_id: str) -> list[sa.Delete]:
    """Every row that hangs on a study, what points at something before what it points at."""
    report_id = session.scalar(sa.select(Report.id).where(Report.study_id == study_id))
    return [
        *(retention.report_deletions(report_id) if report_id is not None else []),
        sa.delete(Authentication).where(Authentication.study_id == study_id),  # used ones have a signed report
        sa.delete(Presence).where(Presence.study_id == study_id),
        sa.delete(TrainingConsent).where(TrainingConsent.study_id == study_id),
        sa.delete(Attempt).where(Attempt.study_id == study_id),
        sa.delete(Instance).where(Instance.study_id == study_id),
        sa.delete(Series).where(Series.study_id == study_id),
        sa.delete(Study).where(Study.id == study_id),
    ]


def _instances(session: Session, study_id: str) -> list[Instance]:
    return list(session.scalars(sa.select(Instance).where(Instance.study_id == study_id)))


def _messages(study_id: str) -> sa.Select[MessageState, datetime | None]:
    return (
        sa.select(Message.state, Message.sent_at)
        .join(ReportVersion, Message.version_id == ReportVersion.id)
        .join(Report, ReportVersion.report_id == Report.id)
        .where(Report.study_id == study_id)
    )
