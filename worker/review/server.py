"""The review page as a service: one process, TLS when it has a certificate, a quiet log."""

import socket

import structlog
import uvicorn

from worker.core import logs, schema
from worker.core.database import Database
from worker.core.errors import SettingsError
from worker.core.settings import Settings
from worker.queues import Doorbell, new_app
from worker.review.app import create_app

log = structlog.get_logger(__name__)

STOP_SECONDS = 3  # for pages that listen; their live streams end at once
IDLE_CONNECTION_SECONDS = 30


def serve(settings: Settings) -> None:
    """Serves until Ctrl-C or SIGTERM; raises `SettingsError` when the database or the port is not there."""
    logs.configure("review", settings.log.level)
    database = Database.from_settings(settings)
    bell = Doorbell(new_app(settings))
    try:
        schema.require_head(database)
        listener = _listen(settings)
        host, port = listener.getsockname()[:2]
        server = PageServer(_config(settings, database, bell))
        log.info("review_listening", host=host, port=port, tls=settings.review.tls_certificate is not None)
        server.run(sockets=[listener])
    finally:
        bell.close()
        database.close()


class PageServer(uvicorn.Server):
    """uvicorn, which ends the pages' live streams before it waits for open connections."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops serving."""
        self.config.app.state.office.hub.close()  # type: ignore[union-attr]
        await super().shutdown(sockets)


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
