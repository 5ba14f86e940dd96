"""Pages for those who run the system: queue and failures, outbox, users, audit. Nobody signs from here."""

from collections.abc import Callable
from datetime import timedelta
from typing import Annotated

import sqlalchemy as sa
from fastapi import APIRouter, BackgroundTasks, Form, Query
from fastapi.responses import RedirectResponse, Response
from sqlalchemy.orm import Session

from worker import queues
from worker.core import accounts, audit, outbox, outbox_view, renewal, studies, worklist
from worker.core.errors import AccessError, AuditError, NotFoundError, ReportError, StateError
from worker.core.records import AuditEvent, Heartbeat, MessageState, Role, Stage, Study, StudyStatus, User
from worker.results import hl7
from worker.review.access import AdminLogin, AuditorLogin, Login, OfficeOf
from worker.review.desk import Office
from worker.review.pages import render
from worker.review.study import find

router = APIRouter(prefix="/admin")
MOST_LINES = 200
DEAF_SECONDS = 60.0


@router.get("/queue")
def show_queue(found: OfficeOf, login: AdminLogin) -> Response:
    """What waits, what is under way, what failed and why, and which workers are alive."""
    return _queue_page(found, login)


def _queue_page(found: Office, login: Login, problem: str = "", status: int = 200) -> Response:
    with found.database.read() as session:
        counts = dict(session.execute(sa.select(Study.status, sa.func.count()).group_by(Study.status)).all())
        due = {stage.value: studies.due_count(session, stage) for stage in Stage}
        refused = worklist.many(session, statuses=[StudyStatus.FAILED, StudyStatus.SKIPPED], limit=MOST_LINES)
        beats = session.scalars(sa.select(Heartbeat).order_by(Heartbeat.beat_at.desc()).limit(50)).all()
    return render(
        found,
        login,
        "admin_queue.html",
        status=status,
        counts={s.value: counts.get(s, 0) for s in StudyStatus},
        due=due,
        refused=refused,
        beats=beats,
        alive_since=studies.now() - timedelta(seconds=DEAF_SECONDS),
        problem=problem,
    )


@router.post("/queue/{study_id}/requeue")
def requeue(study_id: str, found: OfficeOf, login: AdminLogin, after: BackgroundTasks) -> Response:
    """Puts a study back to work in a new revision."""

    def work(session: Session) -> None:
        study = find(session, study_id)
        if worklist.pixels_removed(session, study.id):
            raise StateError("retention removed the images of this study; have the PACS send it again")
        studies.requeue(session, study.id)
        audit.append(session, "requeue", actor=login.username, study_id=study.id, origin=login.origin, force=False)

    try:
        found.database.run(work)
    except StateError as error:
        return _queue_page(found, login, str(error), 409)
    after.add_task(found.ring, queues.PREPARE, study_id)
    return RedirectResponse("/admin/queue", status_code=303, background=after)


@router.get("/messages")
def show_messages(
    found: OfficeOf, login: AdminLogin, state: Annotated[MessageState | None, Query()] = None
) -> Response:
    """The outbox without contents."""
    with found.database.read() as session:
        rows = outbox_view.many(session, states=[state] if state else [], limit=MOST_LINES)
        counts = outbox_view.counts(session)
    return render(
        found,
        login,
        "admin_messages.html",
        rows=rows,
        counts=counts,
        states=[s.value for s in MessageState],
        chosen=state.value if state else "",
    )


@router.get("/messages/{number}")
def show_message(number: int, found: OfficeOf, login: AdminLogin) -> Response:
    """One message as sent and as people read it; audited, because it holds a patient's data."""

    def look(session: Session) -> Response:
        row = outbox_view.get(session, number)
        facts = outbox_view.facts(session, row)
        audit.append(
            session,
            "view_message",
            actor=login.username,
            study_id=facts["study_id"],
            origin=login.origin,
            message=number,
        )
        raw = row.payload.decode("utf-8", errors="replace").replace("\r", "\n")
        return render(
            found,
            login,
            "admin_message.html",
            facts=facts,
            raw=raw,
            readable=hl7.readable(row.payload),
            answer_text=row.answer_text,
            stopped=row.state in {MessageState.PARKED, MessageState.REFUSED},
        )

    return found.database.run(look)


@router.post("/messages/{number}/resend")
def resend(number: int, found: OfficeOf, login: AdminLogin, after: BackgroundTasks) -> Response:
    """Sends a parked or refused message again, the very same bytes."""

    def work(session: Session) -> str:
        row = outbox.resend(session, number)
        facts = outbox_view.facts(session, row)
        audit.append(
            session, "resend", actor=login.username, study_id=facts["study_id"], origin=login.origin, message=number
        )
        return row.destination

    destination = found.database.run(work)
    after.add_task(found.ring, queues.DELIVER, destination)
    return RedirectResponse(f"/admin/messages/{number}", status_code=303, background=after)


@router.post("/messages/{number}/renew")
def renew(number: int, found: OfficeOf, login: AdminLogin, after: BackgroundTasks) -> Response:
    """Writes a parked or refused message again by the present settings; one in doubt is left to the terminal."""
    row = renewal.run(found.database, number, found.desk, actor=login.username, origin=login.origin)
    after.add_task(found.ring, queues.DELIVER, row.destination)
    return RedirectResponse(f"/admin/messages/{row.id}", status_code=303, background=after)


@router.get("/users")
def show_users(found: OfficeOf, login: AdminLogin) -> Response:
    """The accounts."""
    return _users_page(found, login)


def _users_page(found: Office, login: Login, problem: str = "", status: int = 200) -> Response:
    with found.database.read() as session:
        users = session.scalars(sa.select(User).order_by(User.username)).all()
    return render(
        found,
        login,
        "admin_users.html",
        status=status,
        users=users,
        roles=[r.value for r in Role],
        now=studies.now(),
        problem=problem,
    )


@router.post("/users")
def add_user(
    found: OfficeOf,
    login: AdminLogin,
    username: Annotated[str, Form(max_length=100)],
    role: Annotated[Role, Form()],
    family_name: Annotated[str, Form(max_length=100)] = "",
    given_name: Annotated[str, Form(max_length=100)] = "",
    password: Annotated[str, Form(max_length=accounts.LONGEST_PASSWORD)] = "",
) -> Response:
    """Adds an account; without a password it belongs to the identity provider."""

    def work(session: Session) -> None:
        user = accounts.add(
            session,
            username=username.strip(),
            role=role,
            password=password or None,
            family_name=family_name.strip(),
            given_name=given_name.strip(),
        )
        audit.append(
            session, "user_add", actor=login.username, origin=login.origin, user=user.username, role=role.value
        )

    return _change_users(found, login, work)


@router.post("/users/{user_id}/{change}")
def change_user(
    user_id: str,
    change: str,
    found: OfficeOf,
    login: AdminLogin,
    password: Annotated[str, Form(max_length=accounts.LONGEST_PASSWORD)] = "",
) -> Response:
    """Closes or opens an account, or gives it a new password. Roles change at the terminal: `mu2 user role`."""

    def work(session: Session) -> None:
        user = session.get(User, user_id)
        if user is None or change not in {"disable", "enable", "password"}:
            raise NotFoundError("there is no such user")
        if change == "password":
            if user.password_hash is None:
                raise StateError("this account belongs to the identity provider and has no password here")
            accounts.set_password(session, user, password)
        elif user.id == login.user_id:
            raise StateError("nobody closes their own account; ask another administrator")
        else:
            accounts.set_disabled(session, user, change == "disable")
        audit.append(session, f"user_{change}", actor=login.username, origin=login.origin, user=user.username)

    return _change_users(found, login, work)


def _change_users(found: Office, login: Login, work: Callable[[Session], None]) -> Response:
    try:
        found.database.run(work)
    except (StateError, ReportError, AccessError) as error:
        return _users_page(found, login, str(error), 409)
    found.looks.forget()
    return RedirectResponse("/admin/users", status_code=303)


@router.get("/audit")
def show_audit(
    found: OfficeOf,
    login: AuditorLogin,
    action: Annotated[str, Query(pattern=r"^[a-z_]{0,50}$")] = "",
    actor: Annotated[str, Query(max_length=100)] = "",
    study: Annotated[str, Query(max_length=36)] = "",
    before: Annotated[int | None, Query(ge=1)] = None,
) -> Response:
    """Who did what, the newest first; looking is audited, too."""

    def look(session: Session) -> Response:
        query = sa.select(AuditEvent).order_by(AuditEvent.id.desc()).limit(MOST_LINES)
        if action:
            query = query.where(AuditEvent.action == action)
        if actor:
            query = query.where(AuditEvent.actor == actor)
        if study:
            query = query.where(AuditEvent.study_id == find(session, study).id)
        if before:
            query = query.where(AuditEvent.id < before)
        rows = session.scalars(query).all()
        actions = session.scalars(sa.select(AuditEvent.action).distinct().order_by(AuditEvent.action)).all()
        audit.append(session, "view_audit", actor=login.username, origin=login.origin, shown=len(rows))
        chosen = {"action": action, "actor": actor, "study": study}
        more = len(rows) == MOST_LINES
        return render(
            found,
            login,
            "admin_audit.html",
            rows=rows,
            more=more,
            actions=actions,
            chosen=chosen,
            verified=None,
            broken="",
        )

    return found.database.run(look)


@router.post("/audit/verify")
def verify_audit(found: OfficeOf, login: AuditorLogin) -> Response:
    """Walks the whole chain."""
    verified, broken = None, ""
    with found.database.read() as session:
        try:
            verified = audit.verify(session)
        except AuditError as error:
            broken = str(error)
    chosen = {"action": "", "actor": "", "study": ""}
    return render(
        found, login, "admin_audit.html", rows=[], actions=[], chosen=chosen, verified=verified, broken=broken
    )
