"""Whether somebody was told of a text's critical findings: a record about an earlier text is none about the next."""

from collections.abc import Sequence
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from worker.core import checks, records, reports
from worker.core.records import ReportVersion, Signature
from worker.core.report import Sentence
from worker.core.review_records import Communication, WorkingCopy


def covers_copy(session: Session, copy: WorkingCopy, sentences: Sequence[Sentence]) -> bool:
    """Whether anybody was told since the copy's draft was made; since its base, where a critical finding was added to it."""
    base = copy.base
    draft = reports.draft_of(session, copy.report_id, base.study_revision)
    added = checks.critical_words(sentences) - checks.critical_words([reports.to_sentence(s) for s in base.sentences])
    return _told(session, copy.report_id, base.created_at if draft is None or added else draft.created_at)


def covers_addendum(session: Session, report: records.Report) -> bool:
    """Whether anybody was told since the report was last signed."""
    signed = sa.select(sa.func.max(Signature.signed_at)).join(ReportVersion, Signature.version_id == ReportVersion.id)
    return _told(session, report.id, session.scalars(signed.where(ReportVersion.report_id == report.id)).one())


def _told(session: Session, report_id: str, since: datetime) -> bool:
    told = sa.exists().where(Communication.report_id == report_id, Communication.recorded_at >= since)
    return bool(session.scalar(sa.select(told)))
