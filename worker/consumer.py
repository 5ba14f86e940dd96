"""Celery's consumer without what this system does not use, and one that looks for a lost broker often."""

from typing import Any

import structlog
from celery.worker.consumer import Consumer
from celery.worker.state import maybe_shutdown

log = structlog.get_logger(__name__)

RECONNECT_FIRST_SECONDS = 0.5
RECONNECT_STEP_SECONDS = 0.5
RECONNECT_LONGEST_SECONDS = 3.0  # Celery's own default grows to 30 s: a worker deaf for half a minute

_OFF = {"without_gossip": True, "without_mingle": True, "without_heartbeat": True}


class DoorbellConsumer(Consumer):
    """Receives doorbells only: no gossip, mingle or event heartbeats, which cost a second at start and traffic for ever."""

    def __init__(self, *args: Any, worker_options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, worker_options={**(worker_options or {}), **_OFF}, **kwargs)

    def ensure_connected(self, conn: Any) -> Any:
        """Connects, however long the broker is away; a worker that is told to stop meanwhile stops."""
        conn.ensure_connection(
            self._on_broker_away,
            max_retries=None,
            interval_start=RECONNECT_FIRST_SECONDS,
            interval_step=RECONNECT_STEP_SECONDS,
            interval_max=RECONNECT_LONGEST_SECONDS,
            callback=maybe_shutdown,
        )
        self.first_connection_attempt = False
        return conn

    def _on_broker_away(self, error: Exception, seconds: float) -> None:
        log.warning("broker_away", error=type(error).__name__, retry_seconds=seconds)
