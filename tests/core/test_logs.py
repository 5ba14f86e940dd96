"""No log line can hold a patient."""

import io
import json
import logging

import pytest
import structlog

from worker.core import logs
from worker.core.errors import StateError

CANARY = "ZEBRA^CANARY"


@pytest.fixture
def lines():
    """A configured log and a function that reads what was written."""
    stream = io.StringIO()
    root = logging.getLogger()
    before = root.handlers[:], root.level
    logs.configure("test", "debug", stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.handlers[:], root.level = before[0], before[1]
    logs.unbind()
    structlog.reset_defaults()


def test_bound_ids_stand_on_every_line(lines) -> None:
    logs.bind(study_id="s-1", task_id="t-1")
    structlog.get_logger("a").info("study_claimed", stage="prepare")
    assert lines()[0]["study_id"] == "s-1"
    assert lines()[0]["task_id"] == "t-1"
    assert lines()[0]["stage"] == "prepare"


def test_field_that_is_not_on_the_list_is_dropped(lines) -> None:
    structlog.get_logger("a").info("stored", patient_name=CANARY, study_uid="1.2.3")
    assert set(lines()[0]) == {"event", "level", "timestamp", "service"}


@pytest.mark.parametrize("value", [CANARY, "Grüße", "a\nb", {"name": CANARY}, [CANARY], b"x", object()])
def test_value_that_could_be_free_text_is_left_out(lines, value: object) -> None:
    structlog.get_logger("a").info("stored", reason=value)
    assert "ZEBRA" not in json.dumps(lines())


def test_instance_uid_is_masked_and_a_standard_uid_stands(lines) -> None:
    structlog.get_logger("a").info("stored", reason="of 1.2.826.0.1.3680043.8.1", transfer_syntax="1.2.840.10008.1.2.1")
    assert lines()[0]["reason"] == "of <uid>"
    assert lines()[0]["transfer_syntax"] == "1.2.840.10008.1.2.1"


def test_event_with_a_formatted_sentence_loses_it(lines) -> None:
    structlog.get_logger("a").info(f"stored for {CANARY}")
    assert lines()[0]["event"] == "unnamed_event"


def test_library_message_is_reduced_to_who_spoke(lines) -> None:
    logging.getLogger("pynetdicom.assoc").error("Received %s", CANARY)
    assert lines()[0]["event"] == "library_message"
    assert lines()[0]["logger"] == "pynetdicom.assoc"
    assert "ZEBRA" not in json.dumps(lines())


def test_exception_of_a_library_shows_class_and_place_only(lines) -> None:
    try:
        raise ValueError(CANARY)
    except ValueError:
        structlog.get_logger("a").exception("study_failed")
    assert lines()[0]["error"] == "ValueError"
    assert "test_logs.py" in lines()[0]["where"][-1]
    assert "ZEBRA" not in json.dumps(lines())


def test_our_own_error_shows_its_sentence(lines) -> None:
    structlog.get_logger("a").error("study_failed", exc_info=StateError("study x is drafted"))
    assert lines()[0]["reason"] == "study x is drafted"
