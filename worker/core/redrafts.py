"""Drafts that the machine wrote after a reader had begun, or after a report was rejected: a person takes them up, or nobody.

A rejection ends the draft that was read, not the study: slices that came late, or "Draft again", bring another one. It
lies beside the rejected text until a radiologist begins to read it; what was rejected stays on record.
"""

import sqlalchemy as sa
from sqlalchemy.orm import Session, aliased

from worker.core import audit, editing, records, seen, studies
from worker.core.editing import Reader
from worker.core.errors import StateError
from worker.core.records import AuthorKind, ReportVersion
from worker.core.report import ReportState
from worker.core.review_records import WorkingCopy


def redrafted() -> sa.ColumnElement[bool]:
    """In a query over `Report`: whether the machine wrote a draft about later images than any version of a person's.

    It may well be the older text of the two: it lay beside a text in work until that one was rejected.
    """
    read = aliased(ReportVersion)
    return sa.exists().where(
        ReportVersion.report_id == records.Report.id,
        ReportVersion.author_kind == AuthorKind.MACHINE,
        ~sa.exists().where(
            read.report_id == ReportVersion.report_id,
            read.author_kind == AuthorKind.PERSON,
            read.study_revision >= ReportVersion.study_revision,
        ),
    )


def can_start_over(session: Session, report: records.Report) -> bool:
    """Whether `start_over` may begin: a draft is read, or was rejected, and the machine wrote another since."""
    if report.state is ReportState.REJECTED:
        found = sa.select(records.Report.id).where(records.Report.id == report.id, redrafted())
        return session.scalar(found) is not None
    copy = editing.current_copy(session, report.id)
    return (
        report.state in editing.EDITABLE_STATES and copy is not None and editing.newer_draft(session, copy) is not None
    )


def start_over(session: Session, report_id: str, reader: Reader, *, revision: str) -> WorkingCopy:
    """Puts the working copy aside as its reader saw it, where it stays on record, and begins one from the newest draft.

    A rejected report is a draft under work again by this act; destinations that were told of the rejection hear of it when
    the new text is saved as preliminary or signed. Raises `AccessError`, or `StateError` for any other decided report.
    """
    user = editing.radiologist(session, reader)
    report = editing.locked_report(session, report_id)
    if not can_start_over(session, report):
        raise StateError(f"the report is {report.state} and no newer draft is there to be read in its place")
    copy = editing.current_copy(session, report_id)
    if seen.full_revision(copy) != revision:
        raise StateError("the text was changed since it was shown to you; read the change, then decide")
    if copy is not None:
        copy.closed_at = studies.now()
    left = report.state
    if left is ReportState.REJECTED:
        report.state = ReportState.AI_DRAFT
    session.flush()
    audit.append(
        session, "start_over", actor=user.username, study_id=report.study_id, origin=reader.origin, left=left.value
    )
    return editing.begin(session, editing.newest_draft(session, report_id))
