"""Log in by the hospital's identity provider (OpenID Connect, authorization code with PKCE), and prove oneself anew to sign.

A login asks the provider as usual. A proof for a signature asks with `prompt=login` and `max_age=0` and is believed only
when the signed ID token's `auth_time` lies after the moment the reader was sent there. Accounts are made here by an
administrator: the provider says who somebody is, never what they may do.
"""

import hmac
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx2
import sqlalchemy as sa
import structlog
from authlib.common.errors import AuthlibBaseError
from authlib.common.security import generate_token
from authlib.integrations.httpx_client import OAuth2Client
from authlib.oidc.core import CodeIDToken
from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet
from sqlalchemy.orm import Session

from worker.core import accounts, audit, studies
from worker.core.errors import AccessError, NotFoundError, RetryableError
from worker.core.records import User
from worker.core.review_records import OidcFlow
from worker.review import access
from worker.review.access import ForbiddenError, Login, OfficeOf
from worker.review.desk import Office
from worker.review.login import enter, reopen, safe_path
from worker.review.study import find_report

log = structlog.get_logger(__name__)
router = APIRouter()

COOKIE = "mu2_oidc"  # binds the way back to the browser that went
FLOW_SECONDS = 600
PROVIDER_SECONDS = 10.0
ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA"]  # signed with a key pair, never `none`
LEEWAY_SECONDS = 60


class ProviderUnavailableError(RetryableError):
    """The identity provider does not answer, or not as OpenID Connect says."""


@dataclass(frozen=True)
class Identity:
    """Who the provider says was there, from a verified ID token."""

    subject: str
    username: str
    auth_time: int | None


@router.get("/oidc/login")
def log_in(request: Request, found: OfficeOf) -> Response:
    """Sends the browser to the provider."""
    return _depart(request, found, session_id=None, fresh=False)


@router.post("/oidc/prove/{study_id}")
async def prove(study_id: str, request: Request, found: OfficeOf, login: access.RadiologistLogin) -> Response:
    """Sends a reader to the provider to log in again, for one signature on this study."""
    from starlette.concurrency import run_in_threadpool

    return await run_in_threadpool(_prove, study_id, request, found, login)


@router.post("/oidc/unlock")
async def unlock(request: Request, found: OfficeOf) -> Response:
    """Sends the person of a locked session to the provider."""
    from starlette.concurrency import run_in_threadpool

    form = await request.form()
    return await run_in_threadpool(_unlock, request, found, str(form.get(access.CSRF_FIELD, "")))


@router.get("/oidc/callback")
def come_back(request: Request, found: OfficeOf, state: str = "", code: str = "", error: str = "") -> Response:
    """The way back: checks state, browser, code, ID token; then logs in, unlocks, or keeps a proof for one signature."""
    flow = _take_flow(request, found, state)
    if error or not code:
        raise AccessError("the identity provider did not confirm who you are; try again")
    identity = _identify(request, found, flow, code)
    if flow.session_id is None:
        user = _account(found, identity)
        response = enter(found, user, access.origin_of(request), "oidc", flow.return_to)
    else:
        response = _arrive(request, found, flow, identity)
    response.delete_cookie(COOKIE, path="/oidc", secure=found.settings.review.encrypted)
    return response


def _prove(study_id: str, request: Request, found: Office, login: Login) -> Response:
    with found.database.read() as session:
        find_report(session, study_id)
    return _depart(request, found, session_id=login.session_id, fresh=True, study_id=study_id)


def _unlock(request: Request, found: Office, token: str) -> Response:
    known = access.find_login(request, found)
    if known is None:
        return RedirectResponse("/login", status_code=303)
    access.check_csrf(request, known[0].csrf_token, token)
    return _depart(request, found, session_id=known[0].session_id, fresh=True)


def _depart(
    request: Request, found: Office, *, session_id: str | None, fresh: bool, study_id: str | None = None
) -> Response:
    settings = found.settings.review
    if not settings.oidc_issuer:
        raise NotFoundError("this page has local accounts only")
    provider = _discover(settings.oidc_issuer)
    state, nonce, verifier, browser = (generate_token(48) for _ in range(4))
    extra: dict[str, Any] = {"prompt": "login", "max_age": 0} if fresh else {}
    with _client(request, found) as client:
        url, _ = client.create_authorization_url(
            provider["authorization_endpoint"], state=state, nonce=nonce, code_verifier=verifier, **extra
        )

    def keep(session: Session) -> None:
        old = studies.now() - timedelta(seconds=FLOW_SECONDS)
        session.execute(sa.delete(OidcFlow).where(OidcFlow.started_at < old))
        session.add(
            OidcFlow(
                id=access.hashed(state),
                browser_sha256=access.hashed(browser),
                nonce=nonce,
                code_verifier=verifier,
                session_id=session_id,
                study_id=study_id,
                return_to="/" if study_id is None else f"/studies/{study_id}",
                started_at=studies.now(),
            )
        )

    found.database.run(keep)
    response = RedirectResponse(url, status_code=303)
    response.set_cookie(
        COOKIE,
        browser,
        httponly=True,
        secure=settings.encrypted,
        samesite="lax",
        max_age=FLOW_SECONDS,
        path="/oidc",
    )
    return response


def _take_flow(request: Request, found: Office, state: str) -> OidcFlow:
    """The flow that this answer belongs to, removed so that it answers once; raises `ForbiddenError`."""

    def take(session: Session) -> OidcFlow | None:
        row = session.get(OidcFlow, access.hashed(state), with_for_update=True)
        if row is not None:
            session.delete(row)
        return row

    flow = found.database.run(take)
    browser = request.cookies.get(COOKIE, "")
    fresh = flow is not None and studies.now() - flow.started_at <= timedelta(seconds=FLOW_SECONDS)
    if flow is None or not fresh or not hmac.compare_digest(access.hashed(browser), flow.browser_sha256):
        raise ForbiddenError
    return flow


def _identify(request: Request, found: Office, flow: OidcFlow, code: str) -> Identity:
    settings = found.settings.review
    provider = _discover(settings.oidc_issuer)
    try:
        with _client(request, found) as client:
            token = client.fetch_token(
                provider["token_endpoint"], code=code, grant_type="authorization_code", code_verifier=flow.code_verifier
            )
        keys = KeySet.import_key_set(_get_json(provider["jwks_uri"]))  # type: ignore[arg-type]
        decoded = jwt.decode(token["id_token"], keys, algorithms=ALGORITHMS)
        claims = CodeIDToken(
            decoded.claims,
            decoded.header,
            options={
                "iss": {"essential": True, "value": settings.oidc_issuer},
                "aud": {"essential": True, "value": settings.oidc_client_id},
                "nonce": {"essential": True, "value": flow.nonce},
            },
            params={"nonce": flow.nonce, "client_id": settings.oidc_client_id},
        )
        claims.validate(leeway=LEEWAY_SECONDS)
    except (JoseError, AuthlibBaseError, KeyError, ValueError) as error:
        log.warning("oidc_refused", error=type(error).__name__)
        raise AccessError("the identity provider's answer could not be verified; tell the administrator") from error
    except httpx2.HTTPError as error:
        raise ProviderUnavailableError("the identity provider does not answer; try again in a minute") from error
    auth_time = claims.get("auth_time")
    return Identity(
        subject=str(claims["sub"]),
        username=str(claims.get(settings.oidc_username_claim, "")),
        auth_time=int(auth_time) if isinstance(auth_time, int | float) else None,
    )


def _account(found: Office, identity: Identity) -> User:
    """The account of this subject; the first login binds it by user name. Raises `AccessError`."""

    def look(session: Session) -> User | None:
        user = session.scalars(sa.select(User).where(User.oidc_subject == identity.subject)).one_or_none()
        if user is None and identity.username:
            named = session.scalars(
                sa.select(User).where(sa.func.lower(User.username) == identity.username.lower())
            ).one_or_none()
            if named is not None and named.password_hash is None and named.oidc_subject is None:
                named.oidc_subject = identity.subject
                audit.append(session, "bind_oidc", actor=named.username)
                user = named
        return user if user is not None and user.disabled_at is None else None

    user = found.database.run(look)
    if user is None:
        raise AccessError("nobody here has this account; ask the administrator to add it")
    return user


def _arrive(request: Request, found: Office, flow: OidcFlow, identity: Identity) -> Response:
    """Back in a session that was there: only for the same person, and only with a login that is new."""
    known = access.find_login(request, found)
    if known is None or known[0].session_id != flow.session_id:
        raise ForbiddenError
    login, row = known
    if identity.auth_time is None:
        raise AccessError("the identity provider does not say when you logged in (auth_time); tell the administrator")
    auth_time = identity.auth_time

    def keep(session: Session) -> None:
        user = session.get_one(User, login.user_id)
        if user.oidc_subject != identity.subject:
            raise AccessError("somebody else logged in at the identity provider; nothing was signed")
        accounts.require_fresh(flow.started_at, auth_time)
        if flow.study_id is not None:  # who opens a locked desk has not said that they want to sign
            find_report(session, flow.study_id)
            accounts.prove_by_oidc(session, user.id, flow.study_id, login.session_id, flow.started_at, auth_time)
        audit.append(session, "prove", actor=user.username, study_id=flow.study_id, origin=login.origin, method="oidc")

    found.database.run(keep)
    if access.is_locked(row, found.settings.review):
        reopen(found, login)
    return RedirectResponse(safe_path(flow.return_to, login.role), status_code=303)


def _client(request: Request, found: Office) -> OAuth2Client:
    settings = found.settings.review
    base = settings.public_url.rstrip("/") or f"{request.url.scheme}://{request.url.netloc}"
    return OAuth2Client(
        client_id=settings.oidc_client_id,
        client_secret=settings.oidc_client_secret.get_secret_value() or None,
        redirect_uri=f"{base}/oidc/callback",
        scope="openid profile",
        code_challenge_method="S256",
        timeout=PROVIDER_SECONDS,
    )


def _discover(issuer: str) -> dict[str, Any]:
    """The provider's own description (OpenID Connect Discovery 1.0, section 4); it must name the same issuer."""
    found = _get_json(f"{issuer.rstrip('/')}/.well-known/openid-configuration")
    if found.get("issuer") != issuer:
        raise ProviderUnavailableError("the identity provider names another issuer than MU2_REVIEW__OIDC_ISSUER")
    return found


def _get_json(url: str) -> dict[str, Any]:
    try:
        answer = httpx2.get(url, timeout=PROVIDER_SECONDS)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
    except (httpx2.HTTPError, ValueError) as error:
        raise ProviderUnavailableError("the identity provider does not answer; try again in a minute") from error
    return found
