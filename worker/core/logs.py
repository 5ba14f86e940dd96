"""Structured logs: one JSON object a line, with study and task ids bound, and no way for patient data to get in.

A line is an event name and fields. Only fields named in `FIELDS` are written, and only as numbers, booleans, or short
strings of a harmless alphabet; anything else becomes its type's name. So a forgotten `log.info("stored", name=...)`, an
exception that quotes a data set, or a library's own message cannot leak: libraries' messages are reduced to logger, level
and exception class. What a person needs to read about a study is in the database, found by the id in the log.
"""

import logging
import re
import sys
import traceback
from collections.abc import Mapping, MutableMapping
from typing import Any, TextIO

import structlog

from worker.core.errors import Mu2Error

FIELDS = frozenset(
    {
        "event", "level", "timestamp", "logger", "service", "pid",
        "study_id", "task_id", "report_id", "version_id", "message_id", "association_id", "commitment_id", "token",
        "stage", "status", "state", "outcome", "revision", "priority", "attempt", "attempts", "error", "reason", "where",
        "queue", "queues", "worker", "destination", "code", "count", "instances", "series", "slices", "bytes", "seconds",
        "retry_seconds", "free_bytes", "floor_bytes", "host", "port", "address", "ae_known", "tls", "process", "exit_code",
        "model", "model_version", "device", "batch", "tokens", "sop_class", "transfer_syntax", "disposition", "action",
        "rung", "due", "held", "setting", "path_kind", "version", "rss_bytes", "signal",
    }
)  # fmt: skip
"""The names a line may carry. None of them is ever filled from a data set, a report or a sender's free text."""

_EVENT = re.compile(r"[a-z][a-z0-9_]{0,60}")
_UID = re.compile(
    r"(?<![\d.])(?!1\.2\.840\.10008\.)\d+(?:\.\d+){4,}\b"
)  # an instance's UID; the standard's own may stand
_HARMLESS = re.compile(r"[\w.:/@+ ,;()'`\-\[\]<>=%*]{0,300}", re.ASCII)


def configure(service: str, level: str = "info", stream: TextIO | None = None) -> None:
    """Sends every log line of this process, libraries' included, to one stream (stderr) as JSON."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[_reduce_foreign, *shared],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _name_exception,
                lambda _logger, _method, fields: {**fields, "service": service},
                keep_harmless,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("pynetdicom", "pydicom", "celery.bootsteps", "kombu", "amqp", "httpx", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught


def bind(**fields: str | int) -> None:
    """Adds fields (study_id, task_id, ...) to every further line of this thread or task."""
    structlog.contextvars.bind_contextvars(**fields)


def unbind() -> None:
    """Forgets what `bind` added."""
    structlog.contextvars.clear_contextvars()


def keep_harmless(_logger: Any, _method: str, fields: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """Keeps the fields that `FIELDS` names and shows values only where they cannot hold free text."""
    kept = {name: _harmless(value) for name, value in fields.items() if name in FIELDS}
    if not _EVENT.fullmatch(str(kept.get("event"))):
        kept["event"] = "unnamed_event"  # somebody formatted a sentence; it may hold anything
    return kept


def _harmless(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return _UID.sub("<uid>", str(value)) if _HARMLESS.fullmatch(value) else f"<{len(value)} characters left out>"
    if isinstance(value, list | tuple | set | frozenset):
        return [_harmless(v) for v in value]
    return f"<{type(value).__name__}>"


def _name_exception(_logger: Any, _method: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Writes an exception as its class and the place it came from; its text only when it is one of ours."""
    info = fields.pop("exc_info", None)
    if info is True:
        info = sys.exc_info()
    error = info[1] if isinstance(info, tuple) else info
    if isinstance(error, BaseException):
        fields["error"] = type(error).__name__
        if isinstance(error, Mu2Error):
            fields["reason"] = str(error)
        frames = traceback.extract_tb(error.__traceback__)[-6:]
        fields["where"] = [f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in frames]
    return fields


def _reduce_foreign(_logger: Any, _method: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A library's message may quote anything, so only who spoke and how loud is kept."""
    record: logging.LogRecord = fields["_record"]
    reduced = {"event": "library_message", "logger": record.name, "_record": record, "_from_structlog": False}
    if record.exc_info:
        reduced["exc_info"] = record.exc_info
    return reduced


def _log_uncaught(_kind: type[BaseException], error: BaseException, _trace: Any) -> None:
    if isinstance(error, KeyboardInterrupt):
        return
    structlog.get_logger(__name__).critical("uncaught_error", exc_info=error)
