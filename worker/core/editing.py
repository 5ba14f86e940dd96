"""The working copy: readers accept, edit, reject and add sentences; every change is kept and nobody's text is lost.

A copy starts from one version of a report and is open until it becomes another. A change names the revision of the
sentence that its author saw; when somebody else, or the same person in another window, was quicker, the change is kept as
a conflict and shown to its author beside the text that stands. What one page sent is never in conflict with itself: the
network may lose an answer or turn two requests around, so the page numbers them, and the last one written stands. Nothing
here signs, and nothing here makes a report preliminary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from worker.core import audit, records, studies
from worker.core.errors import AccessError, NotFoundError, ReportError, StateError, TextClosedError
from worker.core.records import AuthorKind, ReportVersion, Role, User, new_id
from worker.core.report import SIGNED_STATES, Assessment, Origin, ReportState, Section
from worker.core.review_records import EditOutcome, SentenceEdit, WorkingCopy, WorkingSentence

LONGEST_SENTENCE = 2000
EDITABLE_STATES = frozenset({ReportState.AI_DRAFT, ReportState.PRELIMINARY})


@dataclass(frozen=True)
class Reader:
    """Who acts, and from which address (the audit keeps both); from which page, and which of its requests this is."""

    user_id: str
    origin: str = ""
    page: str = ""
    sequence: int = 0


@dataclass(frozen=True)
class Changed:
    """A sentence after a change was asked for; `applied` is False when it had been changed elsewhere, or later here."""

    sentence: WorkingSentence
    applied: bool


def radiologist(session: Session, reader: Reader) -> User:
    """The reader's account; raises `AccessError` unless it is an open radiologist's."""
    user = session.get(User, reader.user_id)
    if user is None or user.disabled_at is not None or user.role is not Role.RADIOLOGIST:
        raise AccessError("only a radiologist with an open account may change or sign a report")
    return user


def of_record(session: Session, report_id: str) -> ReportVersion:
    """The version that stands; raises `NotFoundError`.

    Of a draft that nobody decided about that is the machine's newest, of a preliminary report what its reader saved last; else
    the newest that was signed, retracted or rejected. A draft that the machine wrote again afterwards never takes the place
    of what a person decided by itself.
    """
    report = session.get(records.Report, report_id)
    if report is None:
        raise NotFoundError("there is no such report")
    if report.state is ReportState.AI_DRAFT:
        return newest_draft(session, report_id)
    decided = [*SIGNED_STATES, ReportState.RETRACTED, ReportState.REJECTED]
    states = [ReportState.PRELIMINARY] if report.state is ReportState.PRELIMINARY else decided
    return _newest(session, report_id, ReportVersion.state.in_(states))


def newest_draft(session: Session, report_id: str) -> ReportVersion:
    """The machine's draft about the latest images; raises `NotFoundError`."""
    return _newest(session, report_id, ReportVersion.author_kind == AuthorKind.MACHINE)


def _newest(session: Session, report_id: str, condition: sa.ColumnElement[bool]) -> ReportVersion:
    version = session.scalars(
        sa.select(ReportVersion)
        .where(ReportVersion.report_id == report_id, condition)
        .order_by(ReportVersion.number.desc())
        .limit(1)
    ).one_or_none()
    if version is None:
        raise NotFoundError("the report has no such version yet")
    return version


def current_copy(session: Session, report_id: str) -> WorkingCopy | None:
    """The open working copy of a report."""
    return session.scalars(
        sa.select(WorkingCopy).where(WorkingCopy.report_id == report_id, WorkingCopy.closed_at.is_(None))
    ).one_or_none()


def open_copy(session: Session, report_id: str, reader: Reader) -> WorkingCopy:
    """The open working copy, begun when there is none; an untouched one follows a newer draft.

    Raises `AccessError`, or `StateError` when the report is signed, rejected or retracted.
    """
    radiologist(session, reader)
    report = locked_report(session, report_id)
    copy = current_copy(session, report_id)
    if report.state not in EDITABLE_STATES:
        if copy is not None:  # a correction that was begun
            return copy
        raise StateError(f"the report is {report.state}; it cannot be edited")
    if copy is not None and copy.revision == 0 and copy.base.author_kind is AuthorKind.MACHINE:
        newer = newer_draft(session, copy)
        if newer is not None:
            copy.closed_at = studies.now()
            session.flush()
            return begin(session, newer)
    return copy or begin(session, of_record(session, report_id))


def newer_draft(session: Session, copy: WorkingCopy) -> ReportVersion | None:
    """The machine's draft about later images than this copy was begun on, if there is one."""
    return draft_after(session, copy.base)


def draft_after(session: Session, version: ReportVersion) -> ReportVersion | None:
    """The machine's newest draft about later images than this version's, if there is one.

    By the images, not by the number: a person's version is numbered behind a draft that lay unread beside it.
    """
    return session.scalars(
        sa.select(ReportVersion)
        .where(
            ReportVersion.report_id == version.report_id,
            ReportVersion.author_kind == AuthorKind.MACHINE,
            ReportVersion.study_revision > version.study_revision,
        )
        .order_by(ReportVersion.number.desc())
        .limit(1)
    ).one_or_none()


def begin(session: Session, base: ReportVersion) -> WorkingCopy:
    """A working copy of a version; the caller has seen to it that none is open."""
    at = studies.now()
    copy = WorkingCopy(id=new_id(), report_id=base.report_id, base_id=base.id, revision=0, opened_at=at, changed_at=at)
    copy.sentences = [
        WorkingSentence(
            id=new_id(),
            source_id=row.id,
            position=float(row.ordinal),
            section=row.section,
            region=row.region,
            text=row.text,
            confidence=row.confidence,
            support=row.support,
            origin=row.origin,
            assessment=row.assessment,
            revision=1,
            assessed_by=row.assessed_by,
            assessed_at=row.assessed_at,
        )
        for row in base.sentences
    ]
    session.add(copy)
    session.flush()
    return copy


def change(
    session: Session,
    sentence_id: str,
    reader: Reader,
    *,
    revision: int,
    text: str | None = None,
    assessment: Assessment | None = None,
) -> Changed:
    """Edits, accepts, rejects or takes back one sentence.

    `text` alone is an edit: the machine's own words again are untouched again, no words at all are a rejection.
    `assessment` ACCEPTED, REJECTED or UNTOUCHED (take back: the machine's words return) needs no text.
    Raises `NotFoundError`, `AccessError`, `TextClosedError` when the copy is closed, `ReportError` when the text is too long.
    """
    user = radiologist(session, reader)
    row = session.get(WorkingSentence, sentence_id)
    if row is None:
        raise NotFoundError("there is no such sentence")
    copy = _locked_copy(session, row.copy_id)
    session.refresh(row)
    new_text, new_origin, new_assessment = _changed(row, text, assessment)
    same = (new_text, new_assessment) == (row.text, row.assessment)
    since = _changes_since(session, row.id, revision)
    own = bool(since) and all(edit.page == reader.page != "" for edit in since)
    overtaken = own and any(edit.sequence > reader.sequence for edit in since)
    applied = not overtaken and (own or same or row.revision == revision)
    if not overtaken:
        _settle_earlier(session, row.id, user.id)
    session.add(
        SentenceEdit(
            sentence_id=row.id,
            revision=row.revision if applied else revision,
            text=new_text,
            assessment=new_assessment,
            user_id=user.id,
            at=studies.now(),
            outcome=EditOutcome.APPLIED if applied else EditOutcome.CONFLICT,
            settled_at=studies.now() if overtaken else None,
            page=reader.page,
            sequence=reader.sequence,
        )
    )
    if applied and not same:
        row.text, row.origin, row.assessment = new_text, new_origin, new_assessment
        row.revision += 1
        _mark(copy, row, user)
    _audit_edit(session, copy, user, reader, new_assessment, applied)
    session.flush()
    return Changed(row, applied)


def add(
    session: Session, copy_id: str, reader: Reader, *, section: Section, text: str, after: str | None = None
) -> WorkingSentence:
    """Adds a person's own sentence to a section: behind the sentence `after`, or at the section's end."""
    user = radiologist(session, reader)
    copy = _locked_copy(session, copy_id)
    ordered = in_order(copy.sentences)
    before = next((s for s in ordered if s.id == after and s.section is section), None)
    position, region = _place(copy.sentences, [s for s in ordered if s.section is section], before)
    row = WorkingSentence(
        id=new_id(),
        position=position,
        section=section,
        region=region,
        text=one_line(text),
        origin=Origin.PERSON,
        assessment=Assessment.ACCEPTED,
        revision=1,
    )
    copy.sentences.append(row)
    _mark(copy, row, user)
    _audit_edit(session, copy, user, reader, Assessment.ACCEPTED, applied=True)
    session.flush()
    return row


def conflicts(session: Session, copy_id: str, user_id: str) -> Sequence[SentenceEdit]:
    """Changes of this reader that somebody else's came before and that are not settled, the oldest first."""
    return session.scalars(
        sa.select(SentenceEdit)
        .join(WorkingSentence, SentenceEdit.sentence_id == WorkingSentence.id)
        .where(
            WorkingSentence.copy_id == copy_id,
            SentenceEdit.user_id == user_id,
            SentenceEdit.outcome == EditOutcome.CONFLICT,
            SentenceEdit.settled_at.is_(None),
        )
        .order_by(SentenceEdit.id)
    ).all()


def settle(session: Session, edit_id: int, reader: Reader, *, take: bool) -> WorkingSentence:
    """Ends a conflict: the reader's text takes the place of the one that stands, or is let go (both stay on record)."""
    edit = session.get(SentenceEdit, edit_id)
    if edit is None or edit.user_id != reader.user_id or edit.outcome is not EditOutcome.CONFLICT:
        raise NotFoundError("there is no such conflict")
    row = session.get_one(WorkingSentence, edit.sentence_id)
    edit.settled_at = studies.now()
    if take:
        if edit.assessment is Assessment.REJECTED or edit.text == row.text:
            change(session, row.id, reader, revision=row.revision, assessment=edit.assessment)
        else:
            change(session, row.id, reader, revision=row.revision, text=edit.text)
    return row


def _changes_since(session: Session, sentence_id: str, revision: int) -> Sequence[SentenceEdit]:
    """What was applied to a sentence as it stood at this revision and later."""
    return session.scalars(
        sa.select(SentenceEdit).where(
            SentenceEdit.sentence_id == sentence_id,
            SentenceEdit.outcome == EditOutcome.APPLIED,
            SentenceEdit.revision >= revision,
        )
    ).all()


def _settle_earlier(session: Session, sentence_id: str, user_id: str) -> None:
    """A reader's newer text takes the place of an older one of theirs that was in conflict."""
    session.execute(
        sa.update(SentenceEdit)
        .where(
            SentenceEdit.sentence_id == sentence_id,
            SentenceEdit.user_id == user_id,
            SentenceEdit.outcome == EditOutcome.CONFLICT,
            SentenceEdit.settled_at.is_(None),
        )
        .values(settled_at=studies.now())
    )


def in_order(sentences: Sequence[WorkingSentence]) -> list[WorkingSentence]:
    """Sentences as the report has them: by section, then by position."""
    rank = {section: number for number, section in enumerate(Section)}
    return sorted(sentences, key=lambda s: (rank[s.section], s.position))


def written(copy: WorkingCopy) -> list[WorkingSentence]:
    """The sentences that go into a version: all but a person's own that were left empty or struck out."""
    return [
        s
        for s in in_order(copy.sentences)
        if s.origin is not Origin.PERSON or (s.text and s.assessment is not Assessment.REJECTED)
    ]


def one_line(text: str) -> str:
    """A sentence's text with every run of white space made one space; raises `ReportError` when it is too long."""
    line = " ".join(text.split())
    if len(line) > LONGEST_SENTENCE:
        raise ReportError(f"a sentence has at most {LONGEST_SENTENCE} characters; split it")
    return line


def _changed(row: WorkingSentence, text: str | None, assessment: Assessment | None) -> tuple[str, Origin, Assessment]:
    drafted = row.source.text if row.source is not None else None
    own = row.source is None or row.source.origin is Origin.PERSON
    if text is not None:
        line = one_line(text)
        if own:
            return line, Origin.PERSON, Assessment.ACCEPTED
        if not line:
            return row.text, row.origin, Assessment.REJECTED
        if line == drafted and row.source is not None:
            return line, row.source.origin, row.source.assessment
        return line, Origin.EDITED, Assessment.EDITED
    if assessment is Assessment.UNTOUCHED:
        if row.source is None:
            return row.text, Origin.PERSON, Assessment.ACCEPTED
        return row.source.text, row.source.origin, row.source.assessment
    if assessment is Assessment.ACCEPTED and row.origin is Origin.EDITED:
        return row.text, Origin.EDITED, Assessment.EDITED
    if assessment in {Assessment.ACCEPTED, Assessment.REJECTED}:
        return row.text, row.origin, assessment
    raise ReportError("a sentence is accepted, rejected, taken back or given another text")


def _place(
    everyone: Sequence[WorkingSentence], section: list[WorkingSentence], before: WorkingSentence | None
) -> tuple[float, str]:
    """Where an added sentence stands, and the body region that it belongs to."""
    end = max((s.position for s in everyone), default=-1.0) + 1.0
    if before is None:
        return end, section[-1].region if section else ""
    following = min((s.position for s in everyone if s.position > before.position), default=end + 1.0)
    return (before.position + following) / 2, before.region


def locked_report(session: Session, report_id: str) -> records.Report:
    """The report, locked until the transaction ends; raises `NotFoundError`."""
    report = session.get(records.Report, report_id, with_for_update=True, populate_existing=True)
    if report is None:
        raise NotFoundError("there is no such report")
    return report


def _locked_copy(session: Session, copy_id: str) -> WorkingCopy:
    copy = session.get(WorkingCopy, copy_id, with_for_update=True, populate_existing=True)
    if copy is None:
        raise NotFoundError("there is no such working copy")
    if copy.closed_at is not None:
        raise TextClosedError("this text was signed, rejected or put aside meanwhile; load the page again")
    return copy


def _mark(copy: WorkingCopy, row: WorkingSentence, user: User) -> None:
    row.assessed_by = user.id
    row.assessed_at = copy.changed_at = studies.now()
    copy.revision += 1


def _audit_edit(
    session: Session, copy: WorkingCopy, user: User, reader: Reader, assessment: Assessment, applied: bool
) -> None:
    audit.append(
        session,
        "edit",
        actor=user.username,
        study_id=copy.report.study_id,
        origin=reader.origin,
        outcome="ok" if applied else "conflict",
        assessment=assessment.value,
        revision=copy.revision,
    )
