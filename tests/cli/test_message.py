"""`mu2 message` on a real outbox."""

import json
from datetime import timedelta

import pytest
import sqlalchemy as sa

from tests.cli.conftest import Terminal
from tests.core import builders
from worker.core import outbox, renewal, studies
from worker.core.errors import DeliveryRefusedError, NotFoundError, StateError
from worker.core.records import AuditEvent, Message, MessageState, ReportVersion
from worker.core.signing import Desk
from worker.results import hl7


def message(terminal: Terminal, *, refused: bool = False) -> int:
    """The number of a draft's message, refused by its receiver if wanted."""
    version_id = builders.drafted(terminal.database, patient_name="CANARY^ADA", patient_identifier="MRN-77")
    with terminal.database.write() as session:
        row = outbox.enqueue(session, session.get_one(ReportVersion, version_id), [builders.destination()], hl7.write)[
            0
        ]
        if refused:
            claimed = outbox.claim(session, "ris", 60)
            assert claimed is not None
            error = DeliveryRefusedError("the receiver rejected the message (AR)", "AR")
            outbox.refuse(session, claimed, error, "AR", "no such patient CANARY")
        return row.id


def audited(terminal: Terminal) -> list[str]:
    with terminal.database.read() as session:
        return list(session.scalars(sa.select(AuditEvent.action)))


def test_list_shows_no_content(terminal: Terminal) -> None:
    number = message(terminal, refused=True)
    line = terminal.data("message", "list")[0]
    assert (line["number"], line["state"], line["acknowledgement"]) == (number, "refused", "AR")
    assert "CANARY" not in terminal.run("message", "list", "--json").output + terminal.run("message", "list").output
    assert audited(terminal) == []


def test_list_by_state_and_destination(terminal: Terminal) -> None:
    message(terminal)
    assert len(terminal.data("message", "list", "--state", "pending", "--destination", "ris")) == 1
    assert terminal.data("message", "list", "--destination", "ehr") == []
    assert terminal.run("message", "list", "--state", "lost").exit_code == 2


def test_show_is_readable_and_audited(terminal: Terminal) -> None:
    number = message(terminal, refused=True)
    shown = terminal.run("message", "show", str(number)).stdout
    assert "Patient name" in shown and "CANARY^ADA" in shown and "no such patient CANARY" in shown
    assert audited(terminal) == ["message_shown"]


def test_show_raw_is_the_very_bytes(terminal: Terminal) -> None:
    number = message(terminal)
    with terminal.database.read() as session:
        payload = session.get_one(Message, number).payload
    assert terminal.run("message", "show", str(number), "--raw").stdout_bytes == payload


def test_resend_makes_a_refused_message_due_again_under_its_control_id(terminal: Terminal) -> None:
    number = message(terminal, refused=True)
    before = terminal.data("message", "list")[0]["control_id"]
    assert terminal.data("message", "resend", str(number))["control_id"] == before
    assert terminal.data("message", "list")[0]["state"] == MessageState.PENDING
    assert audited(terminal) == ["resend"]


def test_resend_of_a_message_on_its_way_is_refused(terminal: Terminal) -> None:
    error = terminal.run("message", "resend", str(message(terminal))).exception
    assert isinstance(error, StateError) and "only parked and refused" in str(error)


def test_an_unknown_message_is_one_sentence(terminal: Terminal) -> None:
    assert isinstance(terminal.run("message", "show", "99").exception, NotFoundError)


def parked_and_refused(terminal: Terminal) -> dict[str, int]:
    """Three messages that need a person, by what they are."""
    numbers = {}
    for name, receiver, state in (
        ("parked", "ris", MessageState.PARKED),
        ("refused", "ris", MessageState.REFUSED),
        ("elsewhere", "ehr", MessageState.PARKED),
    ):
        version_id = builders.drafted(terminal.database)
        with terminal.database.write() as session:
            version = session.get_one(ReportVersion, version_id)
            row = outbox.enqueue(session, version, [builders.destination(receiver)], hl7.write)[0]
            row.state = state
            numbers[name] = row.id
    return numbers


def states(terminal: Terminal) -> dict[int, str]:
    return {line["number"]: line["state"] for line in terminal.data("message", "list")}


def test_resend_of_many_takes_the_chosen_ones_and_no_other(terminal: Terminal) -> None:
    numbers = parked_and_refused(terminal)
    resent = terminal.data("message", "resend", "--parked", "--destination", "ris", "--yes")
    assert [line["number"] for line in resent] == [numbers["parked"]]
    assert states(terminal) == {
        numbers["parked"]: "pending",
        numbers["refused"]: "refused",
        numbers["elsewhere"]: "parked",
    }
    assert audited(terminal) == ["resend"]


def test_resend_of_many_asks_and_by_dry_run_does_nothing(terminal: Terminal) -> None:
    numbers = parked_and_refused(terminal)
    before = states(terminal)
    shown = terminal.data("message", "resend", "--parked", "--refused", "--dry-run")
    assert {line["number"] for line in shown} == set(numbers.values())
    assert terminal.run("message", "resend", "--parked", "--refused", answer="n\n").exit_code == 1
    assert states(terminal) == before and audited(terminal) == []


def test_resend_dry_run_refuses_what_the_real_run_refuses(terminal: Terminal) -> None:
    under_way = message(terminal)
    for number, kind in ((under_way, StateError), (99_999, NotFoundError)):
        rehearsed = terminal.run("message", "resend", str(number), "--dry-run").exception
        real = terminal.run("message", "resend", str(number)).exception
        assert isinstance(rehearsed, kind) and str(rehearsed) == str(real)


def test_resend_dry_run_of_many_says_no_with_the_reason(terminal: Terminal) -> None:
    numbers = parked_and_refused(terminal)
    with terminal.database.write() as session:
        row = session.get_one(Message, numbers["parked"])
        later = builders.sign(session, row.version_id)
        outbox.enqueue(session, later, [builders.destination()], builders.render)
        row.state = MessageState.PARKED  # a try that was under way meanwhile ended so
    result = terminal.run("message", "resend", "--parked", "--destination", "ris", "--dry-run", "--json")
    assert result.exit_code == 1
    (line,) = json.loads(result.stdout)
    assert not line["would_be_resent"] and "was superseded" in line["reason"]
    assert states(terminal)[numbers["parked"]] == "parked" and audited(terminal) == []


def test_resend_by_age_leaves_what_is_older(terminal: Terminal) -> None:
    parked_and_refused(terminal)
    with terminal.database.write() as session:
        session.execute(sa.update(Message).values(created_at=studies.now() - timedelta(days=2)))
    assert terminal.data("message", "resend", "--parked", "--since", "1d") == []
    assert len(terminal.data("message", "resend", "--parked", "--since", "3d", "--yes")) == 2


def test_resend_of_nothing_and_of_one_with_many_is_wrong_usage(terminal: Terminal) -> None:
    assert terminal.run("message", "resend").exit_code == 2
    assert terminal.run("message", "resend", "1", "--parked").exit_code == 2


def test_renewed_message_says_what_the_settings_say_now(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    number = message(terminal, refused=True)
    receiver = {"name": "ris", "host": "127.0.0.1", "port": 1, "drafts": "R", "sending_facility": "NEW SITE"}
    monkeypatch.setenv("MU2_HL7__DESTINATIONS", json.dumps([receiver]))
    renewed = terminal.data("message", "renew", str(number), "--yes")
    assert renewed["renews"] == number
    assert states(terminal) == {number: "superseded", renewed["number"]: "pending"}
    raw = terminal.run("message", "show", str(renewed["number"]), "--raw").stdout_bytes
    assert b"|NEW SITE|" in raw and renewed["control_id"].encode() in raw
    assert audited(terminal) == ["renew", "message_shown"]


def test_renewing_asks_first_and_says_why_not(terminal: Terminal) -> None:
    number = message(terminal, refused=True)
    assert terminal.run("message", "renew", str(number), answer="n\n").exit_code == 1
    error = terminal.run("message", "renew", str(number), "--yes").exception
    assert isinstance(error, StateError) and "no destination has the name ris" in str(error)
    assert states(terminal) == {number: "refused"} and audited(terminal) == []


def test_renewal_whose_commit_was_not_answered_is_done_once(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = message(terminal, refused=True)
    run = terminal.database.run
    monkeypatch.setattr(terminal.database, "run", lambda change: [run(change), run(change)][1])
    desk = Desk(destinations=(builders.destination(),), render=hl7.write)
    renewed = renewal.run(terminal.database, number, desk, actor="test")
    assert states(terminal) == {number: "superseded", renewed.id: "pending"}
    assert audited(terminal) == ["renew"]


def signed_without_a_message(terminal: Terminal) -> str:
    """A study whose report was signed when nothing could be written to anybody."""
    version_id = builders.drafted(terminal.database, patient_identifier="MRN-77")
    with terminal.database.write() as session:
        return builders.sign(session, version_id).report.study_id


def test_message_that_could_not_be_written_at_the_signature_is_written_once(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    study_id = signed_without_a_message(terminal)
    receiver = {"name": "ris", "host": "127.0.0.1", "port": 1, "drafts": "none"}
    monkeypatch.setenv("MU2_HL7__DESTINATIONS", json.dumps([receiver]))
    assert terminal.data("message", "write", study_id) == {"written_for": ["ris"]}
    assert terminal.data("message", "write", study_id) == {"written_for": []}
    (line,) = terminal.data("message", "list")
    assert (line["result_status"], line["state"]) == ("F", "pending")
    assert audited(terminal) == ["write_messages"]


def test_draft_is_not_written_to_anybody_by_hand(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver = {"name": "ris", "host": "127.0.0.1", "port": 1, "drafts": "R"}
    monkeypatch.setenv("MU2_HL7__DESTINATIONS", json.dumps([receiver]))
    version_id = builders.drafted(terminal.database)
    with terminal.database.read() as session:
        study_id = session.get_one(ReportVersion, version_id).report.study_id
    error = terminal.run("message", "write", study_id).exception
    assert isinstance(error, StateError) and "requeue" in str(error)
    assert terminal.data("message", "list") == []
