"""What a reader saw when they decided: an act names the text on its author's page, and is refused where another stands.

A count of changes alone names no text: every working copy begins at none, and judging as many sentences ends at the same.
So the name of a text under work is its copy's id with the count. A signed text is named by its version's number, and by
the copy that lies open beside it, because its reader is shown the changes of a correction that was not signed in time.
"""

from sqlalchemy.orm import Session

from worker.core import editing
from worker.core.errors import StateError
from worker.core.records import ReportVersion
from worker.core.review_records import WorkingCopy


def full_revision(copy: WorkingCopy | None) -> str:
    """The name of a text under work, as `copy id/changes so far`; empty where there is none."""
    return f"{copy.id}/{copy.revision}" if copy is not None else ""


def is_of(copy: WorkingCopy, revision: str) -> bool:
    """Whether a text was one of this copy, however many changes ago."""
    return revision.partition("/")[0] == copy.id


def text_under_work(session: Session, report_id: str, revision: str) -> WorkingCopy:
    """The open working copy, locked, where it stands as its reader saw it (`full_revision`); raises `StateError`."""
    copy = editing.current_copy(session, report_id)
    if copy is None:
        raise StateError("there is no text under work; load the page again")
    session.refresh(copy, with_for_update=True)
    if full_revision(copy) != revision:
        raise StateError("the text was changed since it was shown to you; read the change, then decide")
    return copy


def signed_text(session: Session, report_id: str, version: int, revision: str, *, correctable: bool) -> ReportVersion:
    """The version that stands, where it is the one that its reader saw with nothing but `revision` open beside it.

    A correction in work comes first while it can be signed: its words would be on no page afterwards. Raises `StateError`.
    """
    signed = editing.of_record(session, report_id)
    copy = editing.current_copy(session, report_id)
    if copy is not None and correctable:
        raise StateError("a correction of this report is in work; sign it or leave it on its page first")
    if (signed.number, full_revision(copy)) != (version, revision):
        raise StateError("the report was changed since it was shown to you; read the change, then decide")
    return signed
