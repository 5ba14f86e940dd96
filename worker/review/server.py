"""The review page as a service: one process, TLS when it has a certificate, a quiet log, its health on another port."""

import os
import socket
import time

import structlog
import uvicorn

from worker.core import logs, schema
from worker.core.database import Database
from worker.core.errors import DatabaseUnavailableError, SettingsError
from worker.core.health import HealthServer
from worker.core.settings import Settings
from worker.queues import Doorbell, new_app
from worker.review.app import create_app

log = structlog.get_logger(__name__)

STOP_SECONDS = 3  # for pages that listen; their live streams end at once
IDLE_CONNECTION_SECONDS = 30
STALLED_SECONDS = 10.0  # an event loop that did not turn for this long serves nobody


def serve(settings: Settings) -> None:
    """Serves until Ctrl-C or SIGTERM; raises `SettingsError` when the database or a port is not there."""
    logs.configure("review", settings.log.level)
    database = Database.from_settings(settings)
    bell = Doorbell(new_app(settings))
    try:
        schema.require_head(database)
        listener = _listen(settings)
        host, port = listener.getsockname()[:2]
        server = PageServer(_config(settings, database, bell))
        health = serve_health(settings, database, server)
        log.info("review_listening", host=host, port=port, tls=settings.review.tls_certificate is not None)
        try:
            server.run(sockets=[listener])
        finally:
            health.close()
    finally:
        bell.close()
        database.close()


class PageServer(uvicorn.Server):
    """uvicorn, which ends the pages' live streams before it waits for open connections, and tells whether it turns."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._turned_at = time.monotonic()

    @property
    def turns(self) -> bool:
        """Whether the event loop, which every request passes, turned a moment ago."""
        return time.monotonic() - self._turned_at < STALLED_SECONDS

    async def on_tick(self, counter: int) -> bool:
        """Notes the time of each turn; uvicorn calls it ten times a second."""
        self._turned_at = time.monotonic()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops serving."""
        self.config.app.state.office.hub.close()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def serve_health(settings: Settings, database: Database, server: PageServer) -> HealthServer:
    """/livez, /readyz and /metrics on a port of their own, apart from the page that readers reach."""
    needed = schema.head()

    def has_database() -> bool:
        try:
            return schema.current(database) == needed
        except DatabaseUnavailableError:
            return False

    def has_store() -> bool:
        return os.access(settings.store_root, os.R_OK | os.X_OK)

    checks = {"database": has_database, "store": has_store, "page": lambda: server.started and server.turns}
    registry = server.config.app.state.office.metrics.registry  # type: ignore[union-attr]
    where = settings.review
    return HealthServer(where.metrics_host, where.metrics_port, registry, checks, lambda: server.turns, group="REVIEW")


def _config(settings: Settings, database: Database, bell: Doorbell) -> uvicorn.Config:
    review = settings.review
    return uvicorn.Config(
        create_app(settings, database, bell.ring),
        log_config=None,
        access_log=False,  # addresses of studies are opaque, yet who read what belongs to the audit
        server_header=False,
        proxy_headers=review.behind_tls_proxy,
        forwarded_allow_ips=review.trusted_proxies,
        timeout_graceful_shutdown=STOP_SECONDS,
        timeout_keep_alive=IDLE_CONNECTION_SECONDS,
        ssl_certfile=review.tls_certificate,
        ssl_keyfile=review.tls_key,
    )


def _listen(settings: Settings) -> socket.socket:
    host, port = settings.review.host, settings.review.port
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=256
        )
    except OSError as error:
        raise SettingsError(
            f"the review page cannot listen on {host}:{port} ({error.strerror}); choose another MU2_REVIEW__PORT"
        ) from error
