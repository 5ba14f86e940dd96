"""Who is at the page: sessions, roles, the lock after idle minutes, and the token against forged requests.

The browser holds a random token in a cookie that no script can read; the database holds its hash. Every request that
changes something must also carry the session's CSRF token, which only a page of ours can know.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import Depends, Request, Response
from sqlalchemy.orm import Session

from worker.core import studies
from worker.core.editing import Reader
from worker.core.records import Role, User
from worker.core.review_records import WebSession
from worker.core.settings import ReviewSettings
from worker.review.desk import Office, office, office_of

TOUCH_SECONDS = 20.0  # how exactly idleness is known
CSRF_HEADER = "X-CSRF-Token"
CSRF_FIELD = "csrf"
PAGE_HEADER = "X-Page"  # a random name that a page gives itself when it is loaded
SEQUENCE_HEADER = "X-Sequence"  # counts that page's requests
_PAGE = re.compile(r"[0-9a-f]{32}")
_SEQUENCE = re.compile(r"[0-9]{1,9}")
SAFE_METHODS = frozenset({"GET", "HEAD"})


class LoginRequiredError(Exception):
    """Nobody is logged in with this browser."""


class SessionLockedError(Exception):
    """The session is locked until its person proves who they are."""

    def __init__(self, login: "Login") -> None:
        super().__init__()
        self.login = login


class ForbiddenError(Exception):
    """The person's role, or the request's token, does not allow this."""


@dataclass(frozen=True)
class Login:
    """The person at the page and the session they are in."""

    session_id: str
    user_id: str
    username: str
    name: str
    role: Role
    local: bool  # has a password here; otherwise the identity provider proves who it is
    csrf_token: str
    origin: str
    page: str  # that sent the request; "" where it does not say
    sequence: int  # of the request among those of its page

    @property
    def reader(self) -> Reader:
        """The person as the core's functions name one."""
        return Reader(self.user_id, self.origin, self.page, self.sequence)

    @property
    def may_edit(self) -> bool:
        """Whether this is a radiologist."""
        return self.role is Role.RADIOLOGIST


def cookie_name(settings: ReviewSettings) -> str:
    """`__Host-` binds the cookie to this host and to TLS; without TLS browsers refuse that name."""
    return "__Host-mu2_session" if settings.encrypted else "mu2_session"


def new_token() -> str:
    """32 random bytes for a cookie or a form."""
    return secrets.token_urlsafe(32)


def hashed(token: str) -> str:
    """SHA-256 of a token: what the database keeps of it."""
    return hashlib.sha256(token.encode()).hexdigest()


def begin_session(session: Session, user: User) -> str:
    """A new session of this person; returns the token for the cookie. Old sessions are swept away."""
    at = studies.now()
    session.execute(sa.delete(WebSession).where(WebSession.created_at < at - timedelta(days=2)))
    token = new_token()
    session.add(WebSession(id=hashed(token), user_id=user.id, csrf_token=new_token(), created_at=at, active_at=at))
    session.flush()
    return token


def set_cookie(response: Response, settings: ReviewSettings, token: str) -> None:
    """Hands the token to the browser: no script reads it, no other site sends it with a changing request."""
    response.set_cookie(
        cookie_name(settings), token, httponly=True, secure=settings.encrypted, samesite="lax", path="/"
    )


def origin_of(request: Request) -> str:
    """The address that a request came from."""
    return request.client.host if request.client else ""


def find_login(request: Request, found: Office) -> tuple[Login, WebSession] | None:
    """The login that the request's cookie names, locked or not; None for no cookie, an old or an ended session."""
    token = request.cookies.get(cookie_name(found.settings.review))
    if not token:
        return None
    with found.database.read() as session:
        row = session.get(WebSession, hashed(token))
        if row is None or row.user.disabled_at is not None:
            return None
        if studies.now() - row.created_at > timedelta(hours=found.settings.review.session_hours):
            return None
        return _login(row, request), row


def is_locked(row: WebSession, settings: ReviewSettings) -> bool:
    """Whether the session was locked by hand or was idle for too long."""
    return row.locked_at is not None or studies.now() - row.active_at > timedelta(minutes=settings.idle_minutes)


def require(*roles: Role, touch: bool = True) -> Callable[..., Coroutine[Any, Any, Login]]:
    """A dependency that gives the login when its role is among `roles` (none: any role).

    `touch=False` is for what the page asks by itself: it does not keep a session awake.
    """

    async def dependency(request: Request) -> Login:
        form_token = ""
        if request.method not in SAFE_METHODS and CSRF_HEADER not in request.headers:
            form_token = str((await request.form()).get(CSRF_FIELD, ""))
        return await _in_thread(_admit, request, office(request), roles, touch, form_token)

    return dependency


def check_csrf(request: Request, expected: str, form_token: str) -> None:
    """Raises `ForbiddenError` unless the request carries the token and comes from a page of ours."""
    given = request.headers.get(CSRF_HEADER) or form_token
    if request.headers.get("Sec-Fetch-Site", "same-origin") not in {"same-origin", "none"}:
        raise ForbiddenError
    if not given or not hmac.compare_digest(given.encode(), expected.encode()):
        raise ForbiddenError


async def _in_thread(function: Callable[..., Login], *args: Any) -> Login:
    from starlette.concurrency import run_in_threadpool

    return await run_in_threadpool(function, *args)


def _admit(request: Request, found: Office, roles: tuple[Role, ...], touch: bool, form_token: str) -> Login:
    known = find_login(request, found)
    if known is None:
        raise LoginRequiredError
    login, row = known
    if is_locked(row, found.settings.review):
        raise SessionLockedError(login)
    if request.method not in SAFE_METHODS:
        check_csrf(request, login.csrf_token, form_token)
    if roles and login.role not in roles:
        raise ForbiddenError
    if touch and studies.now() - row.active_at > timedelta(seconds=TOUCH_SECONDS):
        found.database.run(lambda session: touch_session(session, login.session_id))
    return login


def admit_reader(request: Request, found: Office) -> Login:
    """Lets readers through and raises for everybody else; for a route that remembers the answer for a moment."""
    return _admit(request, found, READERS, touch=False, form_token="")


def touch_session(session: Session, session_id: str) -> None:
    """Notes that the person is there."""
    session.execute(sa.update(WebSession).where(WebSession.id == session_id).values(active_at=studies.now()))


def _login(row: WebSession, request: Request) -> Login:
    user = row.user
    name = f"{user.given_name} {user.family_name}".strip() or user.username
    return Login(
        session_id=row.id,
        user_id=user.id,
        username=user.username,
        name=name,
        role=user.role,
        local=user.password_hash is not None,
        csrf_token=row.csrf_token,
        origin=origin_of(request),
        page=_header(request, PAGE_HEADER, _PAGE),
        sequence=int(_header(request, SEQUENCE_HEADER, _SEQUENCE) or 0),
    )


def _header(request: Request, name: str, form: re.Pattern[str]) -> str:
    """A header of the form that our page sends; "" for any other."""
    value = request.headers.get(name, "")
    return value if form.fullmatch(value) else ""


READERS = (Role.RADIOLOGIST, Role.VIEWER)
"""Roles that see studies."""

ReaderLogin = Annotated[Login, Depends(require(*READERS))]
QuietReaderLogin = Annotated[Login, Depends(require(*READERS, touch=False))]
QuietLogin = Annotated[Login, Depends(require(touch=False))]
RadiologistLogin = Annotated[Login, Depends(require(Role.RADIOLOGIST))]
AdminLogin = Annotated[Login, Depends(require(Role.ADMIN))]
AuditorLogin = Annotated[Login, Depends(require(Role.AUDITOR, Role.ADMIN))]
OfficeOf = Annotated[Office, Depends(office_of)]
