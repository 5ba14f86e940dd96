"""The Celery app, where `celery -A worker worker` looks for it.

Plain `celery -A worker worker` serves every queue; `-Q draft` or `-Q prepare,deliver` restrict a machine to its part.
The threads pool lets one model per process serve all drafts. Celery carries doorbells only: messages are acknowledged
early, there is no result backend, and retries, priorities and back-off live in the database (see `queues.py`).
"""

import logging
from typing import Any

from celery import Celery, signals

from worker import queues
from worker.core import logs, settings

SETTINGS = settings.current()  # Celery's command gives no other entry


def _configure_logs(**_: Any) -> None:
    logs.configure("worker", SETTINGS.log.level)
    logging.getLogger("celery").setLevel(logging.WARNING)  # two lines a doorbell that say nothing
    logging.getLogger("alembic").setLevel(logging.WARNING)


def _make_app() -> Celery:
    made = queues.new_app(SETTINGS)
    made.set_default()
    made.conf.update(
        imports=("worker.tasks",),
        task_acks_late=False,
        worker_pool="threads",
        worker_concurrency=SETTINGS.worker.concurrency,
        worker_prefetch_multiplier=1,
        worker_consumer="worker.consumer:DoorbellConsumer",
        worker_enable_remote_control=False,  # health is asked over HTTP; broadcasts would be one more thing to go deaf
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_enable_prefetch_count_reduction=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
    )
    made.steps["worker"].add("worker.process:Lifecycle")
    return made


app = _make_app()
signals.setup_logging.connect(_configure_logs, weak=False)
