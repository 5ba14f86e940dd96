"""Structured logs: one JSON object a line, with study and task ids bound, and no way for patient data to get in.

A line is an event name and fields. Only fields named in `FIELDS` are written, each by a rule of its own: a number, an id,
a word of `WORDS`, an address, a name that the settings give. An exception is its class, the places it came through and,
when it is one of ours, what of its sentence stands in the source: whatever was filled in becomes `<...>`. So a forgotten
`log.info("stored", name=...)`, an error that quotes a data set, or a library's own message cannot leak: libraries'
messages are reduced to logger, level and exception class. What a person needs to read about a study is in the database,
found by the id in the log.
"""

import errno
import ipaddress
import json
import logging
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from enum import Enum
from functools import lru_cache
from typing import Any, TextIO

import structlog

from worker.core.errors import Mu2Error

WORDS = frozenset(
    {
        "prepare", "draft", "deliver", "evidence",  # stages, and the queues of the same names
        "done", "sent", "retry", "refused", "failed", "lost", "stopped",  # outcomes
        "AA", "AE", "AR", "CA", "CE", "CR",  # acknowledgement codes, HL7 table 0008
    }
)  # fmt: skip
"""Every plain word that a field may carry; members of an enum are words, too."""

MASK = "<...>"
SHORTEST_CONSTANT = 4  # characters: shorter pieces of a sentence could spell a name

_EVENT = re.compile(r"[a-z][a-z0-9_]{0,60}")
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|\d{1,10}")
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}", re.ASCII)
_WORKER = re.compile(r"[\w.-]{1,50}:\d{1,10}:[0-9a-f]{8}", re.ASCII)  # host, process number, start
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:\d{1,3})?")
_TIME = re.compile(r"[0-9T:.Z-]{10,40}")
_LEVELS = frozenset(name.lower() for name in logging.getLevelNamesMapping())


def _number(value: Any) -> Any:
    return value if isinstance(value, bool | int | float) and not isinstance(value, Enum) else _left_out(value)


def _word(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_word(one) for one in value]
    if isinstance(value, Enum):
        return value.value if isinstance(value.value, str) else value.name
    return value if isinstance(value, str) and value in WORDS else _left_out(value)


def _error_name(value: Any) -> Any:
    """The name of a class of exceptions or of an error number of the system."""
    known = isinstance(value, str) and (value in errno.errorcode.values() or value == "unknown" or _is_exception(value))
    return value if known else _left_out(value)


def _reason(value: Any) -> Any:
    """A member of an enum, or what stands in the source of an error's sentence."""
    if isinstance(value, BaseException):
        return source_sentence(value) or type(value).__name__
    return _word(value)


def _address(value: Any) -> Any:
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        return "localhost" if value == "localhost" else _left_out(value)


def _matching(pattern: re.Pattern[str]) -> Callable[[Any], Any]:
    def keep(value: Any) -> Any:
        return value if pattern.fullmatch(str(value)) else _left_out(value)

    return keep


def _is_logger(value: Any) -> bool:
    return isinstance(value, str) and value in logging.root.manager.loggerDict


def _left_out(value: Any) -> str | None:
    return None if value is None else f"<{type(value).__name__} left out>"


FIELDS: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("study_id", "task_id", "message_id", "association_id", "commitment_id"), _matching(_ID)),
    **dict.fromkeys(("pid", "port", "exit_code", "revision", "attempt", "count", "instances", "batch"), _number),
    **dict.fromkeys(("tokens", "bytes", "seconds", "retry_seconds", "tls"), _number),
    **dict.fromkeys(("stage", "status", "outcome", "queue", "queues", "disposition", "code"), _word),
    **dict.fromkeys(("destination", "process", "model", "model_version"), _matching(_NAME)),  # as settings name them
    **dict.fromkeys(("host", "address"), _address),
    "worker": _matching(_WORKER),
    "device": _matching(_DEVICE),
    "error": _error_name,
    "reason": _reason,
    "level": lambda value: value if isinstance(value, str) and value in _LEVELS else _left_out(value),
    "timestamp": _matching(_TIME),
    "logger": lambda value: value if _is_logger(value) else _left_out(value),
}
"""The names a line may carry, and what of a value is written: never anything that a sender could choose."""


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
    handler = _Handler(stream or sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[_reduce_foreign, *shared],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                keep_harmless,
                lambda _logger, _method, fields: {**fields, "service": service},
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
    threading.excepthook = lambda died: log_uncaught(died.exc_value)
    sys.unraisablehook = lambda lost: log_uncaught(lost.exc_value)


class _Handler(logging.StreamHandler[TextIO]):
    """Says of a line that could not be written why; Python's own handler would print the line with all its fields."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Writes the class of the error, when the stream takes at least that."""
        error = sys.exc_info()[0]
        lost = {
            "event": "line_lost",
            "error": error.__name__ if error else "unknown",
            "level": record.levelname.lower(),
        }
        with suppress(OSError, ValueError):
            self.stream.write(json.dumps(lost) + self.terminator)


def bind(**fields: str | int) -> None:
    """Adds fields (study_id, task_id, ...) to every further line of this thread or task."""
    structlog.contextvars.bind_contextvars(**fields)


def unbind() -> None:
    """Forgets what `bind` added."""
    structlog.contextvars.clear_contextvars()


def keep_harmless(_logger: Any, _method: str, fields: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """Keeps the fields that `FIELDS` names, each by its rule, and says of an exception what is no data."""
    kept = {name: rule(fields[name]) for name, rule in FIELDS.items() if name in fields}
    event = str(fields.get("event"))
    kept["event"] = event if _EVENT.fullmatch(event) else "unnamed_event"  # a formatted sentence may hold anything
    info = fields.get("exc_info")
    if info is True:
        info = sys.exc_info()
    error = info[1] if isinstance(info, tuple) else info
    return {**kept, **_told(error)} if isinstance(error, BaseException) else kept


def source_sentence(error: BaseException) -> str:
    """What of an error's sentence stands in the source of the function that raised it; the rest becomes `<...>`.

    Empty when nothing does, or when the error was never raised.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames:
        return ""
    constants = frames[-1][0].f_code.co_consts
    fixed = {text for text in constants if isinstance(text, str) and len(text) >= SHORTEST_CONSTANT}
    pieces = re.compile("|".join(re.escape(text) for text in sorted(fixed, key=len, reverse=True)) or "(?!)")
    written, end, text = "", 0, str(error)
    for piece in pieces.finditer(text):
        written += (MASK if piece.start() > end else "") + piece.group()
        end = piece.end()
    return written + (MASK if end < len(text) else "") if end else ""


def _told(error: BaseException) -> dict[str, Any]:
    """An exception's class, the places it came through, the system's error number, and the sentence of one of ours."""
    told: dict[str, Any] = {"error": type(error).__name__}
    sentence = source_sentence(error) if isinstance(error, Mu2Error) else ""
    if sentence:
        told["reason"] = sentence
    cause = error if isinstance(error, OSError) else error.__cause__
    if isinstance(cause, OSError) and cause.errno is not None:
        told["errno"] = errno.errorcode.get(cause.errno, "unknown")
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    told["where"] = [f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in frames]
    return told


@lru_cache(maxsize=256)
def _is_exception(name: str) -> bool:
    return any(kind.__name__ == name for kind in _below(BaseException))


def _below(kind: type[BaseException]) -> Iterator[type[BaseException]]:
    yield kind
    for child in type.__subclasses__(kind):
        yield from _below(child)


def _reduce_foreign(_logger: Any, _method: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A library's message may quote anything, so only who spoke and how loud is kept."""
    record: logging.LogRecord = fields["_record"]
    reduced = {"event": "library_message", "logger": record.name, "_record": record, "_from_structlog": False}
    if record.exc_info:
        reduced["exc_info"] = record.exc_info
    return reduced


def _log_uncaught(_kind: type[BaseException], error: BaseException, _trace: Any) -> None:
    log_uncaught(error)


def log_uncaught(error: BaseException | None) -> None:
    """Logs an error that nobody caught: Python's own hooks would print its text."""
    if not isinstance(error, KeyboardInterrupt | SystemExit):
        structlog.get_logger(__name__).critical("uncaught_error", exc_info=error)
