"""The worklist: studies by priority and age, filters that live in the URL, a patient search that never does."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any
from urllib.parse import urlencode

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Form, Query
from fastapi.responses import RedirectResponse, Response
from sqlalchemy.orm import Session

from worker.core import audit, redrafts, studies
from worker.core.records import Report, Series, Study, StudyStatus, User
from worker.core.report import SIGNED_STATES, ReportState
from worker.core.review_records import Presence, WorkingCopy
from worker.review.access import OfficeOf, QuietReaderLogin, ReaderLogin
from worker.review.live import PRESENT
from worker.review.pages import render

router = APIRouter()
MOST_LINES = 200


class Reading(StrEnum):
    """Where a study stands for its readers."""

    UNREAD = "unread"  # a draft that nobody touched
    READING = "reading"  # somebody began to judge the draft
    PRELIMINARY = "preliminary"
    SIGNED = "signed"
    REJECTED = "rejected"
    REDRAFTED = "redrafted"  # rejected, and drafted again since
    RETRACTED = "retracted"
    WAITING = "waiting"  # the draft is on its way
    NO_DRAFT = "no_draft"  # there will be none, with the reason


class StateFilter(StrEnum):
    """What the worklist shows."""

    OPEN = "open"  # everything that a reader still has to do something about
    UNREAD = "unread"
    READING = "reading"
    PRELIMINARY = "preliminary"
    SIGNED = "signed"
    CLOSED = "closed"  # rejected and retracted
    WAITING = "waiting"
    NO_DRAFT = "no_draft"
    ALL = "all"


class AgeFilter(StrEnum):
    """How long ago a study arrived."""

    HOURS_4 = "4h"
    HOURS_24 = "24h"
    DAYS_7 = "7d"
    ALL = "all"


AGES = {AgeFilter.HOURS_4: 4, AgeFilter.HOURS_24: 24, AgeFilter.DAYS_7: 168}
TITLES = {
    Reading.UNREAD: "unread",
    Reading.READING: "in work",
    Reading.PRELIMINARY: "preliminary",
    Reading.SIGNED: "signed",
    Reading.REJECTED: "rejected",
    Reading.REDRAFTED: "rejected, drafted again",
    Reading.RETRACTED: "retracted",
    Reading.WAITING: "draft on its way",
    Reading.NO_DRAFT: "no draft",
}


@dataclass(frozen=True)
class Line:
    """One study in the worklist."""

    study: Study
    reading: Reading
    why: str  # why there is no draft
    readers: tuple[str, ...]  # who has it open

    @property
    def title(self) -> str:
        """The state in a reader's words."""
        return TITLES[self.reading]


def reading_of(study: Study, state: ReportState | None, revision: int | None, redrafted: bool) -> Reading:
    """Where a study stands: its report's state before its own, because a signed report survives a new revision.

    But a rejected report waits for its study's next draft like a study that has none.
    """
    if state in SIGNED_STATES:
        return Reading.SIGNED
    if state is ReportState.RETRACTED:
        return Reading.RETRACTED
    if state is ReportState.REJECTED and (redrafted or study.status is StudyStatus.DRAFTED):
        return Reading.REDRAFTED if redrafted else Reading.REJECTED
    if state is ReportState.PRELIMINARY:
        return Reading.PRELIMINARY
    if state is ReportState.AI_DRAFT:
        return Reading.READING if revision else Reading.UNREAD
    if study.status in {StudyStatus.SKIPPED, StudyStatus.FAILED}:
        return Reading.NO_DRAFT
    return Reading.WAITING


_SHOWN: dict[StateFilter, frozenset[Reading]] = {
    StateFilter.OPEN: frozenset(
        {
            Reading.UNREAD,
            Reading.READING,
            Reading.PRELIMINARY,
            Reading.REDRAFTED,
            Reading.WAITING,
            Reading.NO_DRAFT,
        }
    ),
    StateFilter.CLOSED: frozenset({Reading.REJECTED, Reading.RETRACTED}),
    StateFilter.ALL: frozenset(Reading),
    **{StateFilter(r.value): frozenset({r}) for r in Reading if r.value in StateFilter._value2member_map_},
}


def lines(
    session: Session,
    *,
    shown: frozenset[Reading],
    since: datetime | None = None,
    modality: str = "",
    patient: str = "",
    skip: int = 0,
    most: int | None = None,
) -> list[Line]:
    """Studies in a reader's order: priority, then the longest waiting first; `most` of them after `skip`."""
    query = (
        sa.select(Study, Report.state, WorkingCopy.revision, redrafts.redrafted())
        .outerjoin(Report, Report.study_id == Study.id)
        .outerjoin(WorkingCopy, sa.and_(WorkingCopy.report_id == Report.id, WorkingCopy.closed_at.is_(None)))
        .where(sa.or_(*(_condition(reading) for reading in shown)))
        .order_by(Study.priority, Study.received_at, Study.id)
        .offset(skip)
        .limit(most or MOST_LINES)
    )
    if since is not None:
        query = query.where(Study.received_at >= since)
    if modality:
        query = query.where(sa.exists().where(Series.study_id == Study.id, Series.modality == modality))
    if patient:
        like = "%" + patient.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
        query = query.where(
            sa.or_(
                Study.patient_name.ilike(like.replace(", ", "^").replace(" ", "^"), escape="\\"),
                Study.patient_identifier.ilike(like, escape="\\"),
                Study.accession.ilike(like, escape="\\"),
            )
        )
    rows = session.execute(query).all()
    present = _present(session, [study.id for study, *_ in rows])
    return [
        Line(
            study,
            reading_of(study, state, revision, redrafted),
            study.reason if study.status in {StudyStatus.SKIPPED, StudyStatus.FAILED} else "",
            tuple(present.get(study.id, ())),
        )
        for study, state, revision, redrafted in rows
    ]


def _condition(reading: Reading) -> sa.ColumnElement[bool]:
    rejected = Report.state == ReportState.REJECTED
    redrafted = redrafts.redrafted()
    none = sa.or_(Report.id.is_(None), sa.and_(rejected, ~redrafted, Study.status != StudyStatus.DRAFTED))
    refused = Study.status.in_([StudyStatus.SKIPPED, StudyStatus.FAILED])
    touched = sa.func.coalesce(WorkingCopy.revision, 0) > 0
    return {
        Reading.UNREAD: sa.and_(Report.state == ReportState.AI_DRAFT, ~touched),
        Reading.READING: sa.and_(Report.state == ReportState.AI_DRAFT, touched),
        Reading.PRELIMINARY: Report.state == ReportState.PRELIMINARY,
        Reading.SIGNED: Report.state.in_(SIGNED_STATES),
        Reading.REJECTED: sa.and_(rejected, ~redrafted, Study.status == StudyStatus.DRAFTED),
        Reading.REDRAFTED: sa.and_(rejected, redrafted),
        Reading.RETRACTED: Report.state == ReportState.RETRACTED,
        Reading.WAITING: sa.and_(none, ~refused),
        Reading.NO_DRAFT: sa.and_(none, refused),
    }[reading]


def _present(session: Session, study_ids: list[str]) -> dict[str, list[str]]:
    rows = session.execute(
        sa.select(Presence.study_id, User.username)
        .join(User, Presence.user_id == User.id)
        .where(Presence.study_id.in_(study_ids), Presence.seen_at >= studies.now() - PRESENT)
        .order_by(User.username)
    )
    found: dict[str, list[str]] = {}
    for study_id, username in rows:
        found.setdefault(study_id, []).append(username)
    return found


@dataclass(frozen=True)
class Chosen:
    """What a reader chose to see; it lives in the address."""

    state: StateFilter
    age: AgeFilter
    modality: str
    page: int

    def address(self, page: int) -> str:
        """The query of one page of the list."""
        chosen = {"state": self.state.value, "age": self.age.value, "modality": self.modality}
        return urlencode(chosen | ({"page": page} if page > 1 else {}))


def chosen(
    state: Annotated[StateFilter, Query()] = StateFilter.OPEN,
    age: Annotated[AgeFilter, Query()] = AgeFilter.ALL,
    modality: Annotated[str, Query(pattern=r"^[A-Z]{0,4}$")] = "",
    page: Annotated[int, Query(ge=1, le=1000)] = 1,
) -> Chosen:
    """The filters of a request."""
    return Chosen(state, age, modality, page)


ChosenOf = Annotated[Chosen, Depends(chosen)]


def _page(session: Session, chosen: Chosen) -> dict[str, Any]:
    """The lines of one page of the list, and whether another follows."""
    since = studies.now() - timedelta(hours=AGES[chosen.age]) if chosen.age in AGES else None
    found = lines(
        session,
        shown=_SHOWN[chosen.state],
        since=since,
        modality=chosen.modality,
        skip=(chosen.page - 1) * MOST_LINES,
        most=MOST_LINES + 1,
    )
    shown = {"lines": found[:MOST_LINES], "more": len(found) > MOST_LINES, "first": (chosen.page - 1) * MOST_LINES + 1}
    return {"chosen": chosen, "searching": False, **shown}


@router.get("/")
def show(found: OfficeOf, login: ReaderLogin, chosen: ChosenOf) -> Response:
    """The worklist."""
    with found.database.read() as session:
        page = _page(session, chosen)
        modalities = session.scalars(sa.select(Series.modality).distinct().order_by(Series.modality)).all()
    return render(
        found,
        login,
        "worklist.html",
        states=[s.value for s in StateFilter],
        ages=[a.value for a in AgeFilter],
        modalities=[m for m in modalities if m],
        **page,
    )


@router.get("/worklist/rows")
def show_rows(found: OfficeOf, login: QuietReaderLogin, chosen: ChosenOf) -> Response:
    """The lines alone, for a page that heard of a change."""
    with found.database.read() as session:
        page = _page(session, chosen)
    return render(found, login, "worklist_rows.html", **page)


@router.post("/worklist/search")
def search(found: OfficeOf, login: ReaderLogin, patient: Annotated[str, Form(max_length=64)] = "") -> Response:
    """Studies of a patient: name, id or accession, sent in the request's body and never in an address."""
    wanted = " ".join(patient.split())
    with found.database.read() as session:
        rows = lines(session, shown=_SHOWN[StateFilter.ALL], patient=wanted) if wanted else []
    count = len(rows)
    found.database.run(
        lambda session: audit.append(session, "search", actor=login.username, origin=login.origin, found=count)
    )
    return render(found, login, "worklist_rows.html", lines=rows, searching=True, more=count == MOST_LINES)


@router.get("/worklist/next")
def next_unread(found: OfficeOf, login: ReaderLogin, after: Annotated[str, Query(max_length=36)] = "") -> Response:
    """Goes to the most urgent unread study that nobody else has open; back to the worklist when there is none.

    `after` is the study that the page shows: the one behind it in the list comes next, and after the last one the first.
    """
    with found.database.read() as session:
        unread = lines(session, shown=frozenset({Reading.UNREAD, Reading.REDRAFTED}))
    free = [line.study.id for line in unread if not set(line.readers) - {login.username}]
    if after in free:
        place = free.index(after)
        free = free[place + 1 :] + free[:place]
    return RedirectResponse(f"/studies/{free[0]}" if free else "/", status_code=303)
