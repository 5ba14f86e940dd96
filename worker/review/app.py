"""The web application: routes, security headers, and the one door where an error becomes a page without its text."""

import importlib.util
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from worker.core.database import Database
from worker.core.errors import (
    AccessError,
    Mu2Error,
    NotFoundError,
    ReportError,
    RetryableError,
    SettingsError,
    SignatureError,
    StateError,
)
from worker.core.settings import ReviewSettings, Settings
from worker.review import acts, admin, events, login, oidc, pixels, quality, sentences, study, worklist
from worker.review.access import ForbiddenError, LoginRequiredError, SessionLockedError
from worker.review.desk import Office, Ring
from worker.review.live import Hub
from worker.review.metrics import Metrics
from worker.review.pages import error_page, make_templates
from worker.review.slices import Looks, SliceCache

log = structlog.get_logger(__name__)

STATIC = Path(__file__).parent / "static"
THREADS = 40
LARGEST_BODY_BYTES = 256 * 1024

_STATUS: tuple[tuple[type[Mu2Error], int], ...] = (
    (NotFoundError, 404),
    (AccessError, 403),
    (SignatureError, 403),
    (StateError, 409),
    (ReportError, 422),
    (RetryableError, 503),
)


def create_app(settings: Settings, database: Database, ring: Ring) -> FastAPI:
    """The application over a migrated database; `ring` is the doorbell of the queues."""
    hub = Hub(database)
    found = Office(
        settings=settings,
        database=database,
        templates=make_templates(settings),
        slices=SliceCache(settings.review.slice_cache_mib),
        hub=hub,
        metrics=Metrics(lambda: hub.listeners),
        looks=Looks(),
        ring_queue=ring,
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hub.run)
            yield
            hub.close()

    app = FastAPI(title="mu2 review", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.office = found
    app.router.routes.append(pixels.SLICE_ROUTE)
    for part in (login, oidc, worklist, study, sentences, acts, pixels, events, admin, quality):
        app.include_router(part.router)
    app.add_api_route("/livez", alive, methods=["GET"])
    app.add_api_route("/static/htmx.js", htmx, methods=["GET"])
    files = StaticFiles(directory=STATIC)
    app.mount("/static", files, name="static")
    _add_error_pages(app)
    plain: dict[object, str] = {pixels.SLICE_ROUTE.endpoint: pixels.SLICE_ROUTE.path, files: "/static"}
    app.add_middleware(Door, headers=security_headers(settings.review), metrics=found.metrics, plain_routes=plain)
    return app


async def alive() -> dict[str, bool]:
    """Says that the process answers; needs no session."""
    return {"alive": True}


def htmx() -> FileResponse:
    """Htmx as the PyPI package `django-htmx` ships it; Django itself is never imported."""
    return FileResponse(vendored("htmx-2.min.js"), media_type="text/javascript")


def vendored(name: str) -> Path:
    """A script of the package `django-htmx`; raises `SettingsError` when the package is not there."""
    spec = importlib.util.find_spec("django_htmx")
    if spec is None or spec.origin is None:
        raise SettingsError("the package django-htmx is not installed; install mu2 with its extra `review`")
    return Path(spec.origin).parent / "static" / "django_htmx" / name


def security_headers(settings: ReviewSettings) -> list[tuple[bytes, bytes]]:
    """The headers of every answer: only our own scripts and styles run, no other page frames or embeds us."""
    issuer = ""
    if settings.oidc_issuer:  # Chromium checks redirects after a form against form-action, too
        parts = urlsplit(settings.oidc_issuer)
        issuer = f" {parts.scheme}://{parts.netloc}"
    policy = (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        f"form-action 'self'{issuer}; frame-ancestors 'none'; base-uri 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "same-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=()",
    }
    if settings.encrypted:
        headers["Strict-Transport-Security"] = "max-age=31536000"
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]


Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Door:
    """The outermost layer: adds the headers, counts, refuses endless bodies, turns a surprise into a page that says nothing.

    `plain_routes` are the templates of the endpoints that FastAPI does not route and leaves unnamed in the scope.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        headers: list[tuple[bytes, bytes]],
        metrics: Metrics,
        plain_routes: Mapping[object, str],
    ) -> None:
        self._app = app
        self._headers = headers
        self._metrics = metrics
        self._plain_routes = plain_routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, began = False, time.perf_counter()

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                seconds = time.perf_counter() - began
                self._metrics.answered(scope["method"], self._template(scope), message["status"], seconds)
                names = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *self._headers]
                if b"cache-control" not in names:
                    message["headers"].append((b"cache-control", b"no-store"))
            await send(message)

        if _too_long(scope):
            await error_page(413, "The request is too large.")(scope, receive, send_with_headers)
            return
        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:  # the web's door: whatever it was, the reader learns only that it happened
            log.error("request_failed", exc_info=error)
            if started:
                raise
            await error_page(500, "Something went wrong here. It is in the log.")(scope, receive, send_with_headers)

    def _template(self, scope: Scope) -> str:
        if "route" in scope:
            return str(scope["route"].path)
        return self._plain_routes.get(scope.get("endpoint"), "none")


def _too_long(scope: Scope) -> bool:
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    chunked = any(name == b"transfer-encoding" for name, _ in scope["headers"])
    return chunked or any(not value.isdigit() or int(value) > LARGEST_BODY_BYTES for value in lengths)


def _add_error_pages(app: FastAPI) -> None:
    async def login_required(request: Request, _error: Exception) -> Response:
        return login.login_page(request, status=401)

    async def locked(request: Request, error: Exception) -> Response:
        assert isinstance(error, SessionLockedError)
        return login.locked_page(request, error.login)

    async def forbidden(_request: Request, _error: Exception) -> Response:
        return error_page(403, "Your role does not allow this, or the page is too old. Load it again.")

    async def ours(_request: Request, error: Exception) -> Response:
        assert isinstance(error, Mu2Error)
        status = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
        if status == 500:
            log.error("request_failed", exc_info=error)
        return error_page(status, f"{str(error)[:1].upper()}{str(error)[1:]}.")

    async def http(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        told = {404: "There is no such page.", 405: "This page does not take that."}
        return error_page(error.status_code, told.get(error.status_code, "The request was not understood."))

    async def invalid(_request: Request, _error: Exception) -> Response:
        return error_page(422, "The request was not understood.")

    app.add_exception_handler(LoginRequiredError, login_required)
    app.add_exception_handler(SessionLockedError, locked)
    app.add_exception_handler(ForbiddenError, forbidden)
    app.add_exception_handler(Mu2Error, ours)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
