"""Log in, log out, lock and unlock."""

import hmac
from typing import Annotated

from fastapi import APIRouter, Form, Request
from fastapi.responses import RedirectResponse, Response
from sqlalchemy.orm import Session

from worker.core import accounts, audit, studies
from worker.core.errors import AccessError, NotFoundError
from worker.core.records import Role, User
from worker.core.review_records import WebSession
from worker.review import access
from worker.review.access import ForbiddenError, Login, LoginRequiredError, OfficeOf, QuietLogin
from worker.review.desk import Office, office
from worker.review.pages import is_fragment, render

router = APIRouter()
FORM_COOKIE = "mu2_form"  # proves that the form came from our page, before there is a session
FORM_SECONDS = 3600


def login_page(request: Request, *, status: int = 200, problem: str = "") -> Response:
    """The login form; a piece of a page asks the whole page to show it instead."""
    found = office(request)
    if is_fragment(request):
        return Response(status_code=401, headers={"HX-Redirect": "/login", "X-Session": "none"})
    token = access.new_token()
    response = render(found, None, "login.html", status=status, token=token, problem=problem, next=_next(request))
    response.headers["X-Session"] = "none"
    response.set_cookie(
        FORM_COOKIE,
        token,
        httponly=True,
        secure=found.settings.review.encrypted,
        samesite="strict",
        max_age=FORM_SECONDS,
        path="/login",
    )
    return response


def locked_page(request: Request, login: Login, *, problem: str = "") -> Response:
    """The page of a locked session; a script gets the status alone and shows its own cover over what was being typed."""
    found = office(request)
    headers = {"X-Session": "locked"}
    if is_fragment(request) or request.headers.get("X-Requested-By") == "script":
        return Response(problem, status_code=401, headers=headers)
    response = render(found, login, "locked.html", status=401, problem=problem, next=_next(request))
    response.headers.update(headers)
    return response


@router.get("/login")
def show_login(request: Request) -> Response:
    """The login form."""
    return login_page(request)


@router.post("/login")
def log_in(
    request: Request,
    found: OfficeOf,
    username: Annotated[str, Form(max_length=100)] = "",
    password: Annotated[str, Form(max_length=accounts.LONGEST_PASSWORD)] = "",
    token: Annotated[str, Form(max_length=100)] = "",
    next: Annotated[str, Form(max_length=200)] = "/",
) -> Response:
    """Begins a session for a local account; the audit notes failures, too."""
    cookie = request.cookies.get(FORM_COOKIE, "")
    if not cookie or not hmac.compare_digest(cookie.encode(), token.encode()):
        raise ForbiddenError
    origin = access.origin_of(request)
    try:
        user = accounts.check_password(found.database, username, password, found.lockout)
    except AccessError as error:
        found.database.run(
            lambda session: audit.append(
                session, "login", actor=_known(session, username), origin=origin, outcome="refused"
            )
        )
        return login_page(request, status=401, problem=f"{str(error).capitalize()}.")
    return enter(found, user, origin, "password", next)


def enter(found: Office, user: User, origin: str, method: str, next_path: str) -> Response:
    """Begins a session and goes where its person wanted to go."""

    def begin(session: Session) -> str:
        audit.append(session, "login", actor=user.username, origin=origin, method=method)
        return access.begin_session(session, session.get_one(User, user.id))

    token = found.database.run(begin)
    response = RedirectResponse(safe_path(next_path, user.role), status_code=303)
    access.set_cookie(response, found.settings.review, token)
    return response


@router.post("/logout")
def log_out(found: OfficeOf, login: QuietLogin) -> Response:
    """Ends the session."""

    def end(session: Session) -> None:
        row = session.get(WebSession, login.session_id)
        if row is not None:
            session.delete(row)
        audit.append(session, "logout", actor=login.username, origin=login.origin)

    found.database.run(end)
    found.looks.forget()
    response = RedirectResponse("/login", status_code=303)
    response.delete_cookie(access.cookie_name(found.settings.review), path="/", secure=found.settings.review.encrypted)
    response.headers["Clear-Site-Data"] = '"cache"'
    return response


@router.post("/lock", status_code=204)
def lock(found: OfficeOf, login: QuietLogin) -> None:
    """Locks the session at once: its person leaves the desk, or was idle."""

    def mark(session: Session) -> None:
        session.get_one(WebSession, login.session_id).locked_at = studies.now()
        audit.append(session, "lock", actor=login.username, origin=login.origin)

    found.database.run(mark)
    found.looks.forget()


@router.post("/unlock")
def unlock(
    request: Request,
    found: OfficeOf,
    password: Annotated[str, Form(max_length=accounts.LONGEST_PASSWORD)] = "",
    csrf: Annotated[str, Form(max_length=100)] = "",
    next: Annotated[str, Form(max_length=200)] = "/",
) -> Response:
    """Opens a locked session for the person who locked it."""
    known = access.find_login(request, found)
    if known is None:
        raise LoginRequiredError
    login, _ = known
    access.check_csrf(request, login.csrf_token, csrf)
    try:
        accounts.check_password(found.database, login.username, password, found.lockout)
    except AccessError:
        found.database.run(
            lambda session: audit.append(
                session, "unlock", actor=login.username, origin=login.origin, outcome="refused"
            )
        )
        return locked_page(request, login, problem="The password is wrong, or the account is locked.")
    reopen(found, login)
    if request.headers.get("X-Requested-By") == "script":
        return Response(status_code=204)
    return RedirectResponse(safe_path(next, login.role), status_code=303)


def reopen(found: Office, login: Login) -> None:
    """Opens a locked session again."""

    def mark(session: Session) -> None:
        row = session.get_one(WebSession, login.session_id)
        row.locked_at = None
        row.active_at = studies.now()
        audit.append(session, "unlock", actor=login.username, origin=login.origin)

    found.database.run(mark)


@router.post("/active", status_code=204)
def active(found: OfficeOf, login: QuietLogin) -> None:
    """Notes that the person is there, though the page had nothing to ask."""
    found.database.run(lambda session: access.touch_session(session, login.session_id))


def safe_path(path: str, role: Role) -> str:
    """A path of this page, never another site's address; each role has a page of its own to begin with."""
    home = {Role.ADMIN: "/admin/queue", Role.AUDITOR: "/admin/audit"}.get(role, "/")
    ours = path.startswith("/") and not path.startswith(("//", "/\\")) and "\\" not in path and "\n" not in path
    return path if ours and path not in {"/", "/login", "/unlock"} else home


def _next(request: Request) -> str:
    return request.url.path if request.method == "GET" and request.url.path != "/login" else "/"


def _known(session: Session, username: str) -> str:
    """The name of the account that was tried; what was typed may be a password in the wrong field."""
    try:
        return accounts.by_name(session, username).username
    except NotFoundError:
        return "unknown"
