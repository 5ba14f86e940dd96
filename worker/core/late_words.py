"""Words that reached a text after it was signed, rejected or put aside: kept for their author, in no report.

They are conflicts of a copy that is closed: `editing.settle` lets them go, and nothing can take them.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.orm import Session

from worker.core import audit, editing, studies
from worker.core.editing import Reader
from worker.core.errors import NotFoundError
from worker.core.report import Assessment, Origin
from worker.core.review_records import EditOutcome, SentenceEdit, WorkingCopy, WorkingSentence


def keep(session: Session, sentence_id: str, reader: Reader, *, revision: int, text: str) -> bool:
    """Keeps an edit that `editing.change` refused with `TextClosedError`; False where there is nothing to keep.

    A page sends what was not saved again and again: the same words are kept once, and of one page's the last written.
    Raises `AccessError`, `NotFoundError`, and `ReportError` for a text that is too long.
    """
    user = editing.radiologist(session, reader)
    row = session.get(WorkingSentence, sentence_id)
    if row is None:
        raise NotFoundError("there is no such sentence")
    copy = session.get_one(WorkingCopy, row.copy_id, with_for_update=True, populate_existing=True)
    line = editing.one_line(text)
    if not line or line == row.text:
        return False
    told = session.scalars(
        sa.select(SentenceEdit).where(SentenceEdit.sentence_id == row.id, SentenceEdit.user_id == user.id)
    ).all()
    mine = [edit for edit in told if edit.page == reader.page != ""]
    late = [edit for edit in told if edit.outcome is EditOutcome.CONFLICT and edit.text == line]
    if any(edit.settled_at is None or edit in mine for edit in late):
        return True
    overtaken = any(edit.sequence > reader.sequence for edit in mine)
    at = studies.now()
    if not overtaken:
        for edit in mine:
            if edit.outcome is EditOutcome.CONFLICT and edit.settled_at is None:
                edit.settled_at = at
    assessment = Assessment.ACCEPTED if row.origin is Origin.PERSON else Assessment.EDITED
    session.add(
        SentenceEdit(
            sentence_id=row.id,
            revision=revision,
            text=line,
            assessment=assessment,
            user_id=user.id,
            at=at,
            outcome=EditOutcome.CONFLICT,
            settled_at=at if overtaken else None,
            page=reader.page,
            sequence=reader.sequence,
        )
    )
    audit.append(
        session,
        "edit",
        actor=user.username,
        study_id=copy.report.study_id,
        origin=reader.origin,
        outcome="conflict",
        assessment=assessment.value,
        revision=copy.revision,
    )
    session.flush()
    return True


def of_reader(session: Session, report_id: str, user_id: str) -> Sequence[SentenceEdit]:
    """What this reader wrote and no text of the report took up, in copies that are closed; the oldest first."""
    return session.scalars(
        sa.select(SentenceEdit)
        .join(WorkingSentence, SentenceEdit.sentence_id == WorkingSentence.id)
        .join(WorkingCopy, WorkingSentence.copy_id == WorkingCopy.id)
        .where(
            WorkingCopy.report_id == report_id,
            WorkingCopy.closed_at.is_not(None),
            SentenceEdit.user_id == user_id,
            SentenceEdit.outcome == EditOutcome.CONFLICT,
            SentenceEdit.settled_at.is_(None),
            SentenceEdit.text != WorkingSentence.text,
        )
        .order_by(SentenceEdit.id)
    ).all()
