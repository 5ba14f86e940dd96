"""The services of one machine as commands, and the environment that gives each the very settings of its supervisor."""

import json
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr

from worker.broker import EmbeddedBroker
from worker.core.settings import DELIMITER, PREFIX, Settings
from worker.supervisor import Service, answers

LISTENER_STOP_SECONDS = 15.0  # its own limit is 10
BROKER_STOP_SECONDS = 10.0
WORKER_STOP_MARGIN_SECONDS = 5.0
REVIEW_STOP_SECONDS = 8.0  # its own limit is 3


def services(settings: Settings, *, review: bool) -> list[Service]:
    """The services that these settings call for, in the order of their start; no port may be 0."""
    settings.make_home()
    embedded = [] if settings.queue.url.get_secret_value() else [broker_service(settings)]
    page = [review_service(settings)] if review else []
    return [*embedded, worker_service(settings), listener_service(settings), *page]


def broker_service(settings: Settings) -> Service:
    """The embedded Valkey."""
    broker = EmbeddedBroker.from_settings(settings)
    # its socket lies in a folder of this MU2_HOME, so nobody else answers there
    return Service(
        "valkey", tuple(broker.command()), environment(settings), BROKER_STOP_SECONDS, lambda _pid: broker.answers()
    )


def worker_service(settings: Settings, name: str = "worker", queues: str = "") -> Service:
    """The Celery worker, of all queues or of those named with commas."""
    command = [sys.executable, "-m", "celery", "-A", "worker", "worker", "--loglevel", settings.log.level]
    command += ["-Q", queues] if queues else []
    host, port = settings.worker.metrics_host, settings.worker.metrics_port
    # its drafts may end within stop_seconds, then its messages
    patience = 2 * settings.worker.stop_seconds + WORKER_STOP_MARGIN_SECONDS
    return Service(name, tuple(command), environment(settings), patience, lambda pid: answers(host, port, pid))


def listener_service(settings: Settings) -> Service:
    """The DICOM listener."""
    host, port = settings.dicom.metrics_host, settings.dicom.metrics_port
    command = (sys.executable, "-m", "dicom_listener")
    return Service(
        "listener", command, environment(settings), LISTENER_STOP_SECONDS, lambda pid: answers(host, port, pid)
    )


def review_service(settings: Settings) -> Service:
    """The review page."""
    host, port = settings.review.metrics_host, settings.review.metrics_port
    command = (sys.executable, "-m", "worker", "review")
    return Service("review", command, environment(settings), REVIEW_STOP_SECONDS, lambda pid: answers(host, port, pid))


def with_chosen_ports(settings: Settings) -> Settings:
    """The settings with a free port in the place of every 0, so that all processes agree on it."""
    dicom = settings.dicom.model_copy(
        update={
            "port": settings.dicom.port or free_port(),
            "tls_port": free_port() if settings.dicom.tls_port == 0 else settings.dicom.tls_port,
            "metrics_port": settings.dicom.metrics_port or free_port(),
        }
    )
    worker = settings.worker.model_copy(update={"metrics_port": settings.worker.metrics_port or free_port()})
    review = settings.review.model_copy(
        update={
            "port": settings.review.port or free_port(),
            "metrics_port": settings.review.metrics_port or free_port(),
        }
    )
    return settings.model_copy(
        update={"home": settings.home.resolve(), "dicom": dicom, "worker": worker, "review": review}
    )


def free_port() -> int:
    """A TCP port that was free on the loopback a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(settings: Settings, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child process: `base` (this process's own) with exactly these settings and no file of them.

    A child that is started again later has the settings of the first, whatever became of `mu2.toml` meanwhile. Secrets
    stand in it in clear, as readable as the process's memory: to its own user and root.
    """
    source = os.environ if base is None else base
    variables = {name: value for name, value in source.items() if not name.upper().startswith(PREFIX)}
    variables["MU2_CONFIG"] = os.devnull
    for name in Settings.model_fields:
        value = getattr(settings, name)
        fields = (
            {field: getattr(value, field) for field in type(value).model_fields} if isinstance(value, BaseModel) else {}
        )
        defaults = type(value)() if fields else None
        for field, inner in fields.items():
            if inner != getattr(defaults, field):
                variables[f"{PREFIX}{name}{DELIMITER}{field}".upper()] = _text(inner)
    variables[f"{PREFIX}HOME"] = str(settings.home.resolve())
    variables["PYTHONUNBUFFERED"] = "1"
    return variables


def _text(value: Any) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, str | Path):
        return str(value)
    return json.dumps(_plain(value))


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    return value
