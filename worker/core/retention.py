"""Retention: what is removed when its time is over, and what never is.

Removed: the instances and model inputs of studies that are drafted or skipped for `pixels_days`, and reports that nobody
signed for `drafts_days`, with their messages. Never removed here: instances under a storage commitment (the sender may
have erased its copy), failed studies (a person must look), any report with a signature, the audit.

A study is locked while its files go, and its rows are committed after the last one went: a run that dies half way is
finished by the next.
"""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from worker.core import audit, model_inputs, studies
from worker.core.database import Database
from worker.core.errors import StoreUnavailableError
from worker.core.records import (
    Instance,
    Message,
    MessageState,
    Report,
    ReportVersion,
    Sentence,
    Signature,
    Study,
    StudyStatus,
)
from worker.core.review_records import Communication, EvidenceRequest, SentenceEdit, WorkingCopy, WorkingSentence
from worker.core.settings import RetentionSettings

_DONE = (StudyStatus.DRAFTED, StudyStatus.SKIPPED)
_UNDER_WAY = (MessageState.PENDING, MessageState.SENT)


@dataclass(frozen=True)
class Removed:
    """What one run removed, or would."""

    studies: int = 0  # whose pixels went
    instances: int = 0
    instance_bytes: int = 0
    kept_committed: int = 0  # instances that stay because storage commitment was given for them
    reports: int = 0
    messages: int = 0

    def __add__(self, other: "Removed") -> "Removed":
        return Removed(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))


def run(
    database: Database,
    store_root: Path,
    settings: RetentionSettings,
    *,
    actor: str,
    dry_run: bool,
    progress: Callable[[Removed], None] = lambda removed: None,
) -> Removed:
    """Removes all that is over its time, or counts it; one transaction a study, one a report.

    Raises `StoreUnavailableError` when a file cannot be removed.
    """
    total = Removed()
    now = studies.now()
    pixels_before = now - timedelta(days=settings.pixels_days)
    drafts_before = now - timedelta(days=settings.drafts_days)
    with database.read() as session:
        study_ids = _studies_over(session, pixels_before)
        report_ids = _reports_over(session, drafts_before)
    for study_id in study_ids:
        remove_pixels = _PixelRemoval(store_root, study_id, pixels_before, actor)
        total += _apply(database, remove_pixels, dry_run)
        progress(total)
    for report_id in report_ids:
        remove_report = _ReportRemoval(report_id, drafts_before, actor)
        total += _apply(database, remove_report, dry_run)
        progress(total)
    return total


def remove_files(store_root: Path, study_id: str, instances: Iterable[Instance]) -> None:
    """Removes the files of these instances and the study's model inputs; what is gone already is no error.

    Raises `StoreUnavailableError` when a file cannot be removed.
    """
    folder = store_root / model_inputs.folder(study_id)
    try:
        for row in instances:
            (store_root / row.path).unlink(missing_ok=True)
        if folder.is_dir():
            shutil.rmtree(folder)
    except OSError as error:
        raise StoreUnavailableError(
            f"a file cannot be removed from the store ({error.strerror}); look at its rights"
        ) from error


def _apply(database: Database, removal: "_PixelRemoval | _ReportRemoval", dry_run: bool) -> Removed:
    if dry_run:
        with database.read() as session:
            return removal.count(session)
    return database.run(removal.remove)


@dataclass(frozen=True)
class _PixelRemoval:
    """The pixels of one study."""

    store_root: Path
    study_id: str
    before: datetime
    actor: str

    def count(self, session: Session) -> Removed:
        rows = self._rows(session)
        going = [row for row in rows if row.committed_at is None]
        return Removed(
            studies=1,
            instances=len(going),
            instance_bytes=sum(row.size_bytes for row in going),
            kept_committed=len(rows) - len(going),
        )

    def remove(self, session: Session) -> Removed:
        study = session.get(Study, self.study_id, with_for_update=True, populate_existing=True)
        if study is None or study.status not in _DONE or study.status_at >= self.before:
            return Removed()  # late instances or a requeue came between
        removed = self.count(session)
        if removed.instances == 0 and study.model_input is None:
            return Removed()  # done already, by a commit whose answer was lost
        going = [row for row in self._rows(session) if row.committed_at is None]
        remove_files(self.store_root, study.id, going)
        at = studies.now()
        for row in going:
            row.removed_at = at
        study.model_input = None
        audit.append(
            session,
            "retention_pixels",
            actor=self.actor,
            study_id=study.id,
            instances=removed.instances,
            bytes=removed.instance_bytes,
            kept_committed=removed.kept_committed,
        )
        return removed

    def _rows(self, session: Session) -> list[Instance]:
        query = sa.select(Instance).where(Instance.study_id == self.study_id, Instance.removed_at.is_(None))
        return list(session.scalars(query))


@dataclass(frozen=True)
class _ReportRemoval:
    """One report that nobody signed, all its versions and messages."""

    report_id: str
    before: datetime
    actor: str

    def count(self, session: Session) -> Removed:
        messages = session.scalar(
            sa.select(sa.func.count()).select_from(Message).where(Message.version_id.in_(self._versions()))
        )
        return Removed(reports=1, messages=messages or 0)

    def remove(self, session: Session) -> Removed:
        report = session.get(Report, self.report_id, with_for_update=True)
        if report is None or self.report_id not in _reports_over(session, self.before):
            return Removed()  # signed or written again between
        removed = self.count(session)
        for statement in self._deletions():
            session.execute(statement.execution_options(synchronize_session=False))
        audit.append(session, "retention_report", actor=self.actor, study_id=report.study_id, messages=removed.messages)
        return removed

    def _deletions(self) -> list[sa.Delete]:
        return report_deletions(self.report_id)

    def _versions(self) -> sa.Select[Any]:
        return _versions(self.report_id)


def report_deletions(report_id: str) -> list[sa.Delete]:
    """Everything that hangs on the report, what points at something before what it points at."""
    versions = _versions(report_id)
    copies = sa.select(WorkingCopy.id).where(WorkingCopy.report_id == report_id)
    copied = sa.select(WorkingSentence.id).where(WorkingSentence.copy_id.in_(copies))
    return [
        sa.delete(SentenceEdit).where(SentenceEdit.sentence_id.in_(copied)),
        sa.delete(WorkingSentence).where(WorkingSentence.copy_id.in_(copies)),
        sa.delete(WorkingCopy).where(WorkingCopy.report_id == report_id),
        sa.delete(Communication).where(Communication.report_id == report_id),
        sa.delete(EvidenceRequest).where(EvidenceRequest.version_id.in_(versions)),
        sa.delete(Message).where(Message.version_id.in_(versions)),
        sa.delete(Sentence).where(Sentence.version_id.in_(versions)),
        sa.delete(ReportVersion).where(ReportVersion.report_id == report_id),
        sa.delete(Report).where(Report.id == report_id),
    ]


def _versions(report_id: str) -> sa.Select[Any]:
    return sa.select(ReportVersion.id).where(ReportVersion.report_id == report_id)


def _studies_over(session: Session, before: datetime) -> list[str]:
    removable = sa.exists().where(
        Instance.study_id == Study.id, Instance.removed_at.is_(None), Instance.committed_at.is_(None)
    )
    over = sa.and_(Study.status.in_(_DONE), Study.status_at < before)
    query = sa.select(Study.id).where(over, sa.or_(removable, Study.model_input.is_not(None)))
    return list(session.scalars(query.order_by(Study.status_at)))


def _reports_over(session: Session, before: datetime) -> list[str]:
    """Reports whose every version is older, none signed or being worked on, none with a message on its way."""
    version = sa.select(ReportVersion.id).where(ReportVersion.report_id == Report.id)
    younger = version.where(ReportVersion.created_at >= before)
    signed = version.join(Signature, Signature.version_id == ReportVersion.id)
    waiting = version.join(Message, Message.version_id == ReportVersion.id).where(Message.state.in_(_UNDER_WAY))
    worked_on = sa.exists().where(WorkingCopy.report_id == Report.id, WorkingCopy.changed_at >= before)
    query = sa.select(Report.id).where(
        Report.created_at < before, ~younger.exists(), ~signed.exists(), ~waiting.exists(), ~worked_on
    )
    return list(session.scalars(query.order_by(Report.created_at)))
