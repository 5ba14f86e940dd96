"""Queue and task names, and the doorbell: `submit_study` is the public door.

Redis is only a doorbell. A message says "something is due" and carries an opaque study id or a destination's name for the
logs; the rows say what is due. Losing every message loses nothing, because the sweeper of every worker rings again.
Nothing here imports the worker, so the listener and the review page stay light.
"""

from functools import lru_cache
from typing import Any

import structlog
from celery import Celery
from kombu.entity import Exchange, Queue
from kombu.exceptions import OperationalError as BrokerError
from redis.exceptions import RedisError

from worker.core import settings as settings_module
from worker.core.errors import BrokerUnavailableError
from worker.core.settings import Settings

log = structlog.get_logger(__name__)

PREPARE = "prepare"
DRAFT = "draft"
DELIVER = "deliver"
QUEUES = (PREPARE, DRAFT, DELIVER)
TASKS = {PREPARE: "worker.prepare", DRAFT: "worker.draft", DELIVER: "worker.deliver"}
"""The one task of each queue."""

ENOUGH_RINGS = 16
"""Messages that may lie in one queue: whoever is rung works until nothing is due, so more would say nothing new."""

SOCKET_SECONDS = 10.0  # no command of ours takes long; a silent broker is given up after this
CONNECT_SECONDS = 3.0
HEALTH_SECONDS = 10  # an idle connection that died without a word is noticed after about twice this


def new_app(settings: Settings) -> Celery:
    """A Celery app that knows the broker and how to give up on it quickly; it serves nothing yet."""
    app = Celery("mu2", set_as_current=False)
    app.conf.update(
        broker_url=settings.broker_url,
        broker_transport_options={
            "socket_timeout": SOCKET_SECONDS,
            "socket_connect_timeout": CONNECT_SECONDS,
            "socket_keepalive": True,
            "health_check_interval": HEALTH_SECONDS,
            "max_retries": 1,  # of one publish; the default of kombu waits for minutes
            "interval_start": 0,
            "interval_step": 0.1,
            "interval_max": 0.1,
        },
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_queues=[Queue(name, Exchange(name), routing_key=name) for name in QUEUES],
        task_create_missing_queues=False,
    )
    return app


class Doorbell:
    """Rings queues. Safe for threads; raises `BrokerUnavailableError` within seconds when the broker is away."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    def ring(self, queue: str, subject: str) -> bool:
        """Puts one message into a queue unless enough lie there; says whether it did."""
        if self.waiting(queue) >= ENOUGH_RINGS:
            return False
        try:
            self._app.send_task(
                TASKS[queue],
                args=[subject],
                queue=queue,
                routing_key=queue,
                serializer="json",
                retry=True,
                retry_policy={"max_retries": 1, "interval_start": 0, "interval_step": 0.1, "interval_max": 0.1},
            )
        except (BrokerError, RedisError, OSError) as error:
            raise _unavailable(error) from error
        return True

    def waiting(self, queue: str) -> int:
        """How many messages lie in a queue."""
        try:
            with self._app.pool.acquire(block=True, timeout=CONNECT_SECONDS) as connection:
                return int(connection.default_channel.client.llen(queue))
        except (BrokerError, RedisError, OSError) as error:
            raise _unavailable(error) from error

    def close(self) -> None:
        """Closes the connections."""
        self._app.close()


def submit_study(study_id: str) -> None:
    """Says that a study is complete and due for `prepare`; call it after the row is committed.

    Raises `BrokerUnavailableError` when the broker is away: log it and go on, the sweeper rings later.
    """
    _doorbell().ring(PREPARE, study_id)


@lru_cache(maxsize=1)
def _doorbell() -> Doorbell:
    return Doorbell(new_app(settings_module.current()))


def _unavailable(error: Any) -> BrokerUnavailableError:
    return BrokerUnavailableError(f"the broker cannot be reached ({type(error).__name__}); the sweeper rings later")
