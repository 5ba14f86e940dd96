"""The page of one study: images on the left, the report on the right; print view and PDF."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from fastapi import APIRouter
from fastapi.responses import Response
from sqlalchemy.orm import Session

from worker.core import audit, editing, records, reports, studies
from worker.core.errors import NotFoundError
from worker.core.records import Message, Report, ReportVersion, Study
from worker.core.report import Report as ReportValue
from worker.core.review_records import Presence
from worker.results import pdf
from worker.review import panel as panels
from worker.review.access import Login, OfficeOf, QuietReaderLogin, ReaderLogin
from worker.review.desk import Office
from worker.review.images import Images
from worker.review.pages import render
from worker.review.panel import Panel

router = APIRouter(prefix="/studies/{study_id}")


@dataclass(frozen=True)
class Opened:
    """A study as the page shows it."""

    study: Study
    panel: Panel | None  # None while there is no draft
    images: Images
    messages: Sequence[Message]


def find(session: Session, study_id: str) -> Study:
    """The study; raises `NotFoundError` for anything but the opaque id of one."""
    try:
        wanted = str(uuid.UUID(study_id))
    except ValueError:
        raise NotFoundError("there is no such study") from None
    study = session.get(Study, wanted) if wanted == study_id else None
    if study is None:
        raise NotFoundError("there is no such study")
    return study


def find_report(session: Session, study_id: str) -> Report:
    """The study's report; raises `NotFoundError` while there is none."""
    report = session.scalars(sa.select(Report).where(Report.study_id == find(session, study_id).id)).one_or_none()
    if report is None:
        raise NotFoundError("there is no draft of this study yet")
    return report


def opened(session: Session, found: Office, login: Login, study_id: str) -> Opened:
    """The study with its report for this reader; a working copy is begun where a radiologist needs one."""
    study = find(session, study_id)
    report = session.scalars(sa.select(Report).where(Report.study_id == study.id)).one_or_none()
    panel = None
    if report is not None:
        if login.may_edit and report.state in editing.EDITABLE_STATES:
            editing.open_copy(session, report.id, login.reader)
        panel = panels.build(session, report, login, found.desk, found.settings)
    beside = panel.images if panel is not None else Images(study.model_input, True)
    return Opened(study, panel, beside, _messages(session, study))


def see(session: Session, study_id: str, user_id: str) -> None:
    """Notes that a person has the study open."""
    row = session.get(Presence, (study_id, user_id))
    if row is None:
        session.add(Presence(study_id=study_id, user_id=user_id, seen_at=studies.now()))
    else:
        row.seen_at = studies.now()


@router.get("")
def show(study_id: str, found: OfficeOf, login: ReaderLogin) -> Response:
    """The page; each look at it is audited."""

    def look(session: Session) -> Response:
        view = opened(session, found, login, study_id)
        see(session, view.study.id, login.user_id)
        audit.append(session, "view", actor=login.username, study_id=view.study.id, origin=login.origin)
        return render(
            found,
            login,
            "study.html",
            study=view.study,
            panel=view.panel,
            images=view.images,
            messages=view.messages,
            notice="",
            problem="",
        )

    return found.database.run(look)


@router.get("/report")
def show_report(study_id: str, found: OfficeOf, login: QuietReaderLogin) -> Response:
    """The report's side alone, for a page that heard of a change."""
    return found.database.run(lambda session: report_side(session, found, login, study_id))


def report_side(session: Session, found: Office, login: Login, study_id: str, **said: Any) -> Response:
    """The report's side of the page as it stands now."""
    view = opened(session, found, login, study_id)
    values = {"images": view.images, "messages": view.messages, "notice": "", "problem": "", **said}
    return render(found, login, "report_side.html", study=view.study, panel=view.panel, **values)


@router.get("/print")
def print_view(study_id: str, found: OfficeOf, login: ReaderLogin) -> Response:
    """The version that stands, for paper; audited as an export."""

    def look(session: Session) -> Response:
        report = find_report(session, study_id)
        version = editing.of_record(session, report.id)
        value = reports.to_value(session, version.id, default_authority=found.settings.hl7.assigning_authority)
        _note_export(session, login, study_id, version, "print")
        return render(found, login, "print.html", study=report.study, report=value, version=version)

    return found.database.run(look)


@router.get("/report.pdf")
def show_pdf(study_id: str, found: OfficeOf, login: ReaderLogin) -> Response:
    """The version that stands, as PDF; audited as an export. The file's name tells nothing."""

    def look(session: Session) -> ReportValue:
        version = editing.of_record(session, find_report(session, study_id).id)
        _note_export(session, login, study_id, version, "pdf")
        return reports.to_value(session, version.id, default_authority=found.settings.hl7.assigning_authority)

    body = pdf.write(found.database.run(look))
    return Response(
        body, media_type="application/pdf", headers={"Content-Disposition": 'attachment; filename="report.pdf"'}
    )


def _note_export(session: Session, login: Login, study_id: str, version: ReportVersion, form: str) -> None:
    audit.append(
        session,
        "export",
        actor=login.username,
        study_id=study_id,
        origin=login.origin,
        format=form,
        version=version.number,
        state=version.state.value,
    )


def _messages(session: Session, study: Study) -> Sequence[Message]:
    return session.scalars(
        sa.select(Message)
        .join(ReportVersion, Message.version_id == ReportVersion.id)
        .join(records.Report, ReportVersion.report_id == records.Report.id)
        .where(records.Report.study_id == study.id)
        .order_by(Message.id.desc())
    ).all()
