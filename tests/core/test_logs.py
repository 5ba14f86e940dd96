"""No log line can hold a patient, whatever is thrown at it."""

import ast
import errno
import gc
import io
import json
import logging
import os
import sys
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from worker.core import logs
from worker.core.errors import FinalError, Mu2Error, RetryableError, StateError, StoreUnavailableError
from worker.core.records import Stage

NAME = "Canarynova"
"""A patient's name of plain letters: nothing about its look gives it away."""

SOURCES = ("worker", "dicom_listener", "mu2_model")
REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS_NAME_IT = {"destination", "process", "model", "model_version"}
"""Fields that hold a name which the administrator chose."""

Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """A configured log and a function that reads what was written."""
    stream = io.StringIO()
    root = logging.getLogger()
    before = root.handlers[:], root.level
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    logs.configure("test", "debug", stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.handlers[:], root.level = before[0], before[1]
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
    logging.captureWarnings(False)
    logs.unbind()
    structlog.reset_defaults()


def log() -> Any:
    return structlog.get_logger("a")


def raised(error: BaseException) -> BaseException:
    """The error as it is caught: with the place it came from."""
    try:
        raise error
    except BaseException as caught:  # noqa: BLE001
        return caught


def test_bound_ids_stand_on_every_line(lines: Lines) -> None:
    study, task = str(uuid.uuid4()), str(uuid.uuid4())
    logs.bind(study_id=study, task_id=task)
    log().info("study_claimed", stage=Stage.PREPARE, attempt=1)
    (line,) = lines()
    assert (line["study_id"], line["task_id"], line["stage"], line["attempt"]) == (study, task, "prepare", 1)


def test_field_that_is_not_on_the_list_is_dropped(lines: Lines) -> None:
    log().info("stored", patient_name=NAME, study_uid="1.2.3")
    assert set(lines()[0]) == {"event", "level", "timestamp", "service"}


@pytest.mark.parametrize("field", sorted(set(logs.FIELDS) - SETTINGS_NAME_IT))
def test_no_field_that_code_fills_takes_a_plain_name(
    lines: Lines, field: str, capfd: pytest.CaptureFixture[str]
) -> None:
    values = (NAME, NAME.lower(), [NAME], {"name": NAME}, {NAME}, NAME.encode(), f"the patient {NAME} is unknown")
    for value in values:
        log().info("stored", **{field: value})
    assert [line["event"] for line in lines()] == ["stored"] * len(values)
    assert NAME.lower() not in (json.dumps(lines()) + "".join(capfd.readouterr())).lower()


@pytest.mark.parametrize("field", sorted(SETTINGS_NAME_IT))
@pytest.mark.parametrize("value", ["ZEBRA^CANARY", "Grüße", "a\nb", f"the patient {NAME}", {"name": NAME}, b"x"])
def test_no_name_of_the_settings_takes_a_sentence(lines: Lines, field: str, value: object) -> None:
    log().info("stored", **{field: value})
    assert "left out" in lines()[0][field]


class Unspeakable:
    """An object that fails when it is looked at."""

    def __str__(self) -> str:
        raise LookupError(NAME)


def test_line_that_cannot_be_written_is_lost_without_its_fields(
    lines: Lines, capfd: pytest.CaptureFixture[str]
) -> None:
    log().error("stored", study_id=Unspeakable(), patient_name=NAME)
    assert lines() == [{"event": "line_lost", "error": "LookupError", "level": "error"}]
    assert capfd.readouterr() == ("", "")


def test_instance_uid_is_left_out(lines: Lines) -> None:
    log().info("stored", study_id="1.2.826.0.1.3680043.8.1", reason="of 1.2.826.0.1.3680043.8.1")
    (line,) = lines()
    assert line["event"] == "stored"
    assert "3680043" not in json.dumps(line)


def test_event_with_a_formatted_sentence_loses_it(lines: Lines) -> None:
    log().info(f"stored for {NAME}")
    assert lines()[0]["event"] == "unnamed_event"


def kinds(root: type[Mu2Error]) -> list[type[Mu2Error]]:
    return [
        root,
        *(kind for child in root.__subclasses__() for kind in kinds(child) if kind.__module__ == root.__module__),
    ]


@pytest.mark.parametrize("kind", kinds(Mu2Error), ids=lambda kind: kind.__name__)
def test_our_own_error_shows_what_stands_in_the_source_and_no_name(lines: Lines, kind: type[Mu2Error]) -> None:
    try:
        raise kind(f"the study of {NAME} cannot be stored")
    except Mu2Error as error:
        log().error("study_failed", exc_info=error)
        log().error("study_failed", reason=error)
    assert [line["reason"] for line in lines()] == ["the study of <...> cannot be stored"] * 2
    assert lines()[0]["error"] == kind.__name__


@pytest.mark.parametrize(
    "error",
    [
        ValueError(NAME),
        KeyError(NAME),
        FileNotFoundError(2, NAME, f"/store/{NAME}"),
        UnicodeDecodeError("ascii", NAME.encode(), 0, 1, NAME),
        StateError(NAME),
        ExceptionGroup(NAME, [ValueError(NAME)]),
        type("StrangeError", (Exception,), {"__str__": lambda self: NAME})(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_text_of_an_error_is_never_written(lines: Lines, error: Exception) -> None:
    caught = raised(error)
    wrapped = raised(RetryableError("tried again"))
    wrapped.__cause__ = caught
    for one in (caught, wrapped, error):
        log().error("study_failed", exc_info=one)
        log().error("study_failed", reason=one, error=str(one))
        log().error("study_failed", error=one)
    logging.getLogger("pydicom").error("cannot read %s", NAME, exc_info=caught)
    assert len(lines()) == 10
    assert NAME not in json.dumps(lines())


def test_error_that_was_never_raised_shows_its_class_only(lines: Lines) -> None:
    log().error("study_failed", reason=FinalError(f"no {NAME}"), exc_info=FinalError(f"no {NAME}"))
    (line,) = lines()
    assert line["reason"] == line["error"] == "FinalError"


def test_error_of_the_system_shows_its_number(lines: Lines) -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise StoreUnavailableError(f"the volume cannot be written: {error.strerror}") from error
    except StoreUnavailableError as error:
        log().error("stage_postponed", exc_info=error)
    assert (lines()[0]["errno"], lines()[0]["reason"]) == ("ENOSPC", "the volume cannot be written: <...>")


def test_exception_of_a_library_shows_class_and_place_only(lines: Lines) -> None:
    log().error("study_failed", exc_info=raised(ValueError(NAME)))
    assert lines()[0]["error"] == "ValueError" and "reason" not in lines()[0]
    assert "test_logs.py" in lines()[0]["where"][-1]


def test_library_message_is_reduced_to_who_spoke(lines: Lines) -> None:
    logging.getLogger("pynetdicom.assoc").error("Received %s", NAME)
    assert lines()[0]["event"] == "library_message"
    assert lines()[0]["logger"] == "pynetdicom.assoc"
    assert NAME not in json.dumps(lines())


def test_warning_is_reduced_too(lines: Lines) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn(NAME, stacklevel=1)
    assert lines()[0]["logger"] == "py.warnings" and NAME not in json.dumps(lines())


class Unclean:
    """An object that cannot be let go of quietly."""

    def __del__(self) -> None:
        raise ValueError(NAME)


def fail() -> None:
    raise ValueError(NAME)


def test_error_that_nobody_caught_is_logged_without_its_text(lines: Lines, capfd: pytest.CaptureFixture[str]) -> None:
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    Unclean()
    gc.collect()
    sys.excepthook(ValueError, ValueError(NAME), None)
    assert [line["event"] for line in lines()] == ["uncaught_error"] * 3
    assert NAME not in json.dumps(lines()) + "".join(capfd.readouterr())


def log_calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call of a logger in our packages, and where it stands."""
    for package in SOURCES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and isinstance(node.func.value, ast.Name)
                    and node.func.value.id == "log"
                ):
                    yield f"{path.relative_to(REPOSITORY)}:{node.lineno}", node


def literals(node: ast.expr) -> list[ast.expr]:
    """Both sides of `a if b else c`, or the expression itself."""
    return [*literals(node.body), *literals(node.orelse)] if isinstance(node, ast.IfExp) else [node]


def test_every_event_is_written_out_and_every_field_is_on_the_list() -> None:
    calls = list(log_calls())
    assert len(calls) > 50
    wrong = []
    for where, call in calls:
        events = literals(call.args[0])
        if len(call.args) != 1 or not all(isinstance(e, ast.Constant) for e in events):
            wrong.append(f"{where}: the event is not a constant")
        for keyword in call.keywords:
            if keyword.arg != "exc_info" and keyword.arg not in logs.FIELDS:
                wrong.append(f"{where}: {keyword.arg} is not in FIELDS")
            if any(isinstance(node, ast.JoinedStr) for node in ast.walk(keyword.value)):
                wrong.append(f"{where}: {keyword.arg} is a formatted text")
            for value in literals(keyword.value):
                if (
                    isinstance(value, ast.Constant)
                    and logs.FIELDS.get(keyword.arg or "", str)(value.value) != value.value
                ):
                    wrong.append(f"{where}: {keyword.arg} does not take {value.value!r}")
    assert wrong == []


def test_every_field_on_the_list_is_used() -> None:
    used = {keyword.arg for _, call in log_calls() for keyword in call.keywords}
    bound = {"study_id", "task_id", "stage", "revision", "destination"}
    assert set(logs.FIELDS) - used - bound - {"level", "timestamp", "logger"} == set()
