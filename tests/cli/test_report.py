"""`mu2 report retract`: a radiologist withdraws a signed report at the terminal, and nobody else does."""

import json

import pytest
import sqlalchemy as sa

from tests.cli.conftest import Terminal
from tests.core import builders
from worker.core import accounts, outbox
from worker.core.errors import AccessError, NotFoundError, ReportError, StateError
from worker.core.records import AuditEvent, Message, Report, ReportVersion, Role
from worker.core.report import ReportState
from worker.results import hl7

PASSWORD = "correct horse battery"
DESTINATION = {"name": "ris", "host": "127.0.0.1", "port": 1, "drafts": "none"}


@pytest.fixture
def signed(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> str:
    """The id of a study with a signed report that went to the RIS; ada is a radiologist, boss an administrator."""
    monkeypatch.setenv("MU2_HL7__DESTINATIONS", json.dumps([DESTINATION]))
    version_id = builders.drafted(terminal.database, patient_name="CANARY^ADA", patient_identifier="MRN-77")
    with terminal.database.write() as session:
        version = builders.sign(session, version_id)
        version.report.state = ReportState.FINAL
        outbox.enqueue(session, version, [builders.destination(drafts="none")], hl7.write)
        for name, role in (("ada", Role.RADIOLOGIST), ("boss", Role.ADMIN)):
            accounts.add(session, username=name, role=role, password=PASSWORD)
        accounts.add(session, username="provided", role=Role.RADIOLOGIST, password=None)
        return version.report.study_id


def retract(
    terminal: Terminal, study_id: str, *, reader: str = "ada", password: str = PASSWORD, reason: str = "Wrong side"
):
    words = [
        "report",
        "retract",
        study_id,
        "--reader",
        reader,
        "--reason",
        reason,
        "--password-stdin",
        "--yes",
        "--json",
    ]
    return terminal.run(*words, answer=f"{password}\n")


def state(terminal: Terminal) -> ReportState:
    with terminal.database.read() as session:
        return session.scalars(sa.select(Report.state)).one()


def events(terminal: Terminal) -> list[AuditEvent]:
    with terminal.database.read() as session:
        return list(session.scalars(sa.select(AuditEvent).order_by(AuditEvent.id)))


def test_radiologist_withdraws_a_signed_report_with_a_reason_and_its_receiver_is_told(
    terminal: Terminal, signed: str
) -> None:
    told = json.loads(retract(terminal, signed).stdout)
    assert told["messages_to"] == ["ris"]
    with terminal.database.read() as session:
        version = session.scalars(sa.select(ReportVersion).where(ReportVersion.state == ReportState.RETRACTED)).one()
        message = session.scalars(sa.select(Message).where(Message.version_id == version.id)).one()
    assert state(terminal) is ReportState.RETRACTED
    assert version.reason == "Wrong side"
    segments = message.payload.decode().split("\r")
    assert {s.split("|")[11] for s in segments if s.startswith("OBX") and "113014" not in s} == {"W"}
    assert [s.split("|")[25] for s in segments if s.startswith("OBR")] == ["C"]


def test_audit_says_who_withdrew_it_from_where_and_does_not_hold_the_reason(terminal: Terminal, signed: str) -> None:
    retract(terminal, signed, reason="Report of CANARY ADA")
    (event,) = events(terminal)
    assert (event.action, event.actor, event.study_id) == ("retract", "ada", signed)
    assert event.origin.startswith("cli:")
    assert "CANARY" not in str(event.detail)


@pytest.mark.parametrize(
    ("reader", "password", "error"),
    [("ada", "a wrong password", AccessError), ("boss", PASSWORD, AccessError), ("provided", PASSWORD, StateError),
     ("nobody", PASSWORD, NotFoundError)],
)  # fmt: skip
def test_nobody_but_a_proven_radiologist_withdraws_it(
    terminal: Terminal, signed: str, reader: str, password: str, error: type[Exception]
) -> None:
    assert isinstance(retract(terminal, signed, reader=reader, password=password).exception, error)
    assert state(terminal) is ReportState.FINAL


def test_wrong_password_is_audited(terminal: Terminal, signed: str) -> None:
    retract(terminal, signed, password="a wrong password")
    (event,) = events(terminal)
    assert (event.action, event.actor, event.outcome, event.study_id) == ("prove", "ada", "refused", signed)


def test_a_reason_is_needed_and_asked_for(terminal: Terminal, signed: str) -> None:
    assert isinstance(retract(terminal, signed, reason=" ").exception, ReportError)
    words = ["report", "retract", signed, "--reader", "ada"]
    result = terminal.run(*words, answer=f"Wrong side\ny\n{PASSWORD}\n")
    assert result.exit_code == 0, result.output
    assert state(terminal) is ReportState.RETRACTED


def test_saying_no_changes_nothing(terminal: Terminal, signed: str) -> None:
    result = terminal.run("report", "retract", signed, "--reader", "ada", "--reason", "Wrong side", answer="n\n")
    assert result.exit_code == 1
    assert state(terminal) is ReportState.FINAL and events(terminal) == []


def test_report_that_is_not_signed_cannot_be_withdrawn(terminal: Terminal, signed: str) -> None:
    with terminal.database.write() as session:
        other = session.get_one(ReportVersion, builders.drafted(terminal.database)).report.study_id
    assert isinstance(retract(terminal, other).exception, StateError)
    assert isinstance(retract(terminal, builders.received(terminal.database)).exception, NotFoundError)


def test_retract_twice_is_refused(terminal: Terminal, signed: str) -> None:
    retract(terminal, signed)
    assert isinstance(retract(terminal, signed).exception, StateError)
