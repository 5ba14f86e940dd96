"""Judging the draft: accept, edit, reject, take back and add sentences; records of who was told."""

from datetime import datetime, timedelta
from enum import StrEnum
from typing import Annotated

from fastapi import APIRouter, Form
from fastapi.responses import Response
from sqlalchemy.orm import Session

from worker.core import audit, editing, late_words, records, redrafts, seen, studies
from worker.core.errors import NotFoundError, ReportError, StateError, TextClosedError
from worker.core.records import new_id
from worker.core.report import Assessment, Section
from worker.core.review_records import Communication, SentenceEdit, WorkingSentence
from worker.review import panel as panels
from worker.review.access import Login, OfficeOf, RadiologistLogin
from worker.review.desk import Office
from worker.review.pages import render
from worker.review.study import find_report, report_side

router = APIRouter(prefix="/studies/{study_id}")
Revision = Annotated[str, Form(max_length=64)]  # of the whole text that the page showed: `seen.full_revision`
LONGEST_FIELD = 8000  # of a form; the core says how long a sentence may be


class Act(StrEnum):
    """What a reader does with a sentence."""

    EDIT = "edit"
    ACCEPT = "accept"
    REJECT = "reject"
    UNDO = "undo"


_ASSESSMENTS = {Act.ACCEPT: Assessment.ACCEPTED, Act.REJECT: Assessment.REJECTED, Act.UNDO: Assessment.UNTOUCHED}


@router.post("/sentences/{sentence_id}")
def judge(
    study_id: str,
    sentence_id: str,
    found: OfficeOf,
    login: RadiologistLogin,
    act: Annotated[Act, Form()],
    revision: Annotated[int, Form(ge=0)],
    text: Annotated[str, Form(max_length=LONGEST_FIELD)] = "",
) -> Response:
    """One change of one sentence; an edit answers with what stands around the text field, which stays as it is."""

    def work(session: Session) -> tuple[Response, bool]:
        report = find_report(session, study_id)
        _of_this_report(session, sentence_id, report)
        if act is Act.EDIT:
            changed = editing.change(session, sentence_id, login.reader, revision=revision, text=text)
        else:
            wanted = _ASSESSMENTS[act]
            changed = editing.change(session, sentence_id, login.reader, revision=revision, assessment=wanted)
        template = "saved.html" if act is Act.EDIT else "judged.html"
        return _card(session, found, login, report, sentence_id, template), changed.applied

    def keep(session: Session) -> bool:
        return late_words.keep(session, sentence_id, login.reader, revision=revision, text=text)

    try:
        response, applied = found.database.run(work)
    except TextClosedError as closed:
        if act is Act.EDIT and found.database.run(keep):
            raise StateError(f"{closed}: the words that you wrote are kept there") from None
        raise
    if not applied:
        found.metrics.edit_conflicts.inc()
    return response


@router.post("/sentences")
def add(
    study_id: str,
    found: OfficeOf,
    login: RadiologistLogin,
    section: Annotated[Section, Form()],
    text: Annotated[str, Form(max_length=LONGEST_FIELD)] = "",
    after: Annotated[str, Form(max_length=36)] = "",
) -> Response:
    """A sentence of the reader's own."""

    def work(session: Session) -> Response:
        report = find_report(session, study_id)
        copy = editing.current_copy(session, report.id) or editing.open_copy(session, report.id, login.reader)
        if section is Section.ADDENDUM:
            raise ReportError("an addendum follows a signature; it cannot be added here")
        row = editing.add(session, copy.id, login.reader, section=section, text=text, after=after or None)
        return report_side(session, found, login, study_id, focus=row.id)

    return found.database.run(work)


@router.post("/accept-all")
def accept_section(
    study_id: str, found: OfficeOf, login: RadiologistLogin, section: Annotated[Section, Form()], revision: Revision
) -> Response:
    """Accepts every sentence of one section of the shown text that is untouched and not marked as doubtful or weak."""

    def work(session: Session) -> Response:
        report = find_report(session, study_id)
        copy = editing.open_copy(session, report.id, login.reader)
        if not seen.is_of(copy, revision):
            raise StateError("another text took the place of the one that was shown to you; load the page again")
        settings = found.settings.review
        for row in editing.in_order(copy.sentences):
            plain = not panels.is_doubtful(row.confidence, settings) and not panels.is_weak(row.support, settings)
            if row.section is section and row.assessment is Assessment.UNTOUCHED and plain:
                editing.change(session, row.id, login.reader, revision=row.revision, assessment=Assessment.ACCEPTED)
        return report_side(session, found, login, study_id)

    return found.database.run(work)


@router.post("/conflicts/{edit_id}")
def settle(
    study_id: str,
    edit_id: int,
    found: OfficeOf,
    login: RadiologistLogin,
    take: Annotated[bool, Form()],
) -> Response:
    """Ends a conflict: takes the reader's text, or leaves the one that stands."""

    def work(session: Session) -> Response:
        report = find_report(session, study_id)
        edit = session.get(SentenceEdit, edit_id)
        if edit is None:
            raise NotFoundError("there is no such conflict")
        _of_this_report(session, edit.sentence_id, report)
        editing.settle(session, edit_id, login.reader, take=take)
        return report_side(session, found, login, study_id)

    return found.database.run(work)


@router.post("/start-over")
def start_over(study_id: str, found: OfficeOf, login: RadiologistLogin, revision: Revision = "") -> Response:
    """Puts the working copy aside and begins one from the newest draft."""

    def work(session: Session) -> Response:
        report = find_report(session, study_id)
        redrafts.start_over(session, report.id, login.reader, revision=revision)
        return report_side(
            session, found, login, study_id, notice="The newest draft is shown; the text before stays on record."
        )

    return found.database.run(work)


@router.post("/communications")
def record_communication(
    study_id: str,
    found: OfficeOf,
    login: RadiologistLogin,
    told: Annotated[str, Form(max_length=200)] = "",
    means: Annotated[str, Form(pattern=r"^(telephone|in person|secure message)$")] = "telephone",
    minutes_ago: Annotated[int, Form(ge=0, le=1440)] = 0,
) -> Response:
    """Records who was told of a critical finding, how and when."""
    person = " ".join(told.split())
    if not person:
        raise ReportError("write who was told")

    def work(session: Session) -> Response:
        report = find_report(session, study_id)
        user = editing.radiologist(session, login.reader)
        at: datetime = studies.now()
        session.add(
            Communication(
                id=new_id(),
                report_id=report.id,
                told=person,
                means=means,
                told_at=at - timedelta(minutes=minutes_ago),
                recorded_by=user.id,
                recorded_at=at,
            )
        )
        session.flush()
        audit.append(
            session, "communication", actor=login.username, study_id=study_id, origin=login.origin, means=means
        )
        return report_side(session, found, login, study_id)

    return found.database.run(work)


def _of_this_report(session: Session, sentence_id: str, report: records.Report) -> None:
    """Raises `NotFoundError` for a sentence of another study: ids in one address must belong together."""
    row = session.get(WorkingSentence, sentence_id)
    if row is None or row.copy.report_id != report.id:
        raise NotFoundError("there is no such sentence")


def _card(
    session: Session, found: Office, login: Login, report: records.Report, sentence_id: str, template: str
) -> Response:
    panel = panels.build(session, report, login, found.desk, found.settings)
    card = next((c for c in panel.cards if c.id == sentence_id), None)
    return render(found, login, template, study=report.study, panel=panel, card=card, notice="", problem="")
