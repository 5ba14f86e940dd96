"""`mu2 study discard`: what goes, what never does, and that the PACS can send it again."""

import sqlalchemy as sa

from tests.cli.conftest import Terminal
from tests.cli.test_retention import files, rows, with_files
from tests.core import builders
from worker.core import accounts, arrivals, discard, editing, outbox, studies
from worker.core.errors import StateError
from worker.core.records import (
    Attempt,
    AuditEvent,
    Base,
    Disposition,
    Instance,
    Message,
    Report,
    ReportVersion,
    Role,
    Series,
    Stage,
    Study,
)
from worker.core.review_records import Authentication


def mixed(terminal: Terminal, uid: str) -> list[arrivals.Arrival]:
    """A study of two patients, as the listener recorded it, and what was sent."""
    sent = [builders.arrival(uid, patient_identifier=patient) for patient in ("MRN-77", "MRN-78")]
    arrivals.record(terminal.database, sent)
    with terminal.database.write() as session:
        study = session.scalars(sa.select(Study)).one()
        assert not studies.complete(session, study)
    return sent


def test_a_study_of_two_patients_names_the_command_that_removes_it(terminal: Terminal) -> None:
    mixed(terminal, builders.uid())
    assert "mu2 study discard" in terminal.data("study", "list")[0]["reason"]


def test_a_discarded_study_is_received_again_as_a_new_one(terminal: Terminal) -> None:
    uid = builders.uid()
    sent = mixed(terminal, uid)
    with_files(terminal)
    old = terminal.data("study", "list")[0]["id"]
    assert terminal.data("study", "discard", uid, "--yes")["instances"] == 2
    assert files(terminal) == []
    assert [rows(terminal, table) for table in (Study, Series, Instance, Attempt)] == [0, 0, 0, 0]

    corrected = builders.arrival(uid, sop_instance_uid=sent[1].sop_instance_uid, patient_identifier="MRN-77")
    recorded = arrivals.record(terminal.database, [sent[0], corrected])
    assert [one.disposition for one in recorded] == [Disposition.KEPT] * 2
    assert recorded[0].study_id != old and recorded[0].revision == 1
    with terminal.database.write() as session:
        assert studies.complete(session, session.scalars(sa.select(Study)).one())


def test_report_messages_and_attempts_go_and_the_audit_says_so(terminal: Terminal) -> None:
    version_id = builders.drafted(terminal.database)
    with terminal.database.write() as session:
        version = session.get_one(ReportVersion, version_id)
        outbox.enqueue(session, version, [builders.destination()], builders.render)
        claimed = outbox.claim(session, "ris", 60)
        assert claimed is not None
        outbox.acknowledge(session, claimed, "AA")
        editing.begin(session, version)
    study_id = terminal.data("study", "list")[0]["id"]
    gone = terminal.run("study", "discard", study_id, "--yes")
    assert "1 messages about it had left" in gone.stderr
    assert [rows(terminal, table) for table in (Study, Report, ReportVersion, Message, Attempt)] == [0] * 5
    with terminal.database.read() as session:
        event = session.scalars(sa.select(AuditEvent)).one()
    assert (event.action, event.study_id, event.detail["messages_sent"]) == ("discard", study_id, 1)


def test_nothing_goes_without_an_answer(terminal: Terminal) -> None:
    builders.drafted(terminal.database)
    with_files(terminal)
    assert terminal.run("study", "discard", only(terminal), answer="n\n").exit_code == 1
    assert rows(terminal, Instance) == 1 and len(files(terminal)) == 2


def test_a_signed_report_is_never_discarded(terminal: Terminal) -> None:
    version_id = builders.drafted(terminal.database)
    with terminal.database.write() as session:
        builders.sign(session, version_id)
    refused(terminal, "signed")


def test_an_instance_under_a_storage_commitment_is_never_discarded(terminal: Terminal) -> None:
    builders.completed(terminal.database)
    with terminal.database.write() as session:
        session.execute(sa.update(Instance).values(committed_at=studies.now()))
    refused(terminal, "storage commitment")


def test_a_study_that_arrives_is_not_discarded(terminal: Terminal) -> None:
    builders.received(terminal.database)
    refused(terminal, "still arrives")


def test_a_study_that_a_worker_has_is_not_discarded(terminal: Terminal) -> None:
    builders.completed(terminal.database)
    builders.claimed(terminal.database, Stage.PREPARE)
    refused(terminal, "a worker has it")


def test_a_message_on_its_way_keeps_its_study(terminal: Terminal) -> None:
    version_id = builders.drafted(terminal.database)
    with terminal.database.write() as session:
        outbox.enqueue(session, session.get_one(ReportVersion, version_id), [builders.destination()], builders.render)
        outbox.claim(session, "ris", 60)
    refused(terminal, "on its way")


def test_password_that_was_typed_and_signed_nothing_keeps_no_study(terminal: Terminal) -> None:
    version_id = builders.drafted(terminal.database)
    with terminal.database.write() as session:
        study_id = session.get_one(ReportVersion, version_id).report.study_id
        user = accounts.add(session, username="reader", role=Role.RADIOLOGIST, password="correct horse battery")
    accounts.prove_by_password(terminal.database, user.id, "correct horse battery", accounts.Lockout(5, 15), study_id)
    with_files(terminal)
    terminal.run("study", "discard", study_id, "--yes")
    assert [rows(terminal, table) for table in (Study, Authentication)] == [0, 0]


def test_every_table_that_hangs_on_a_study_is_thought_of(terminal: Terminal) -> None:
    builders.drafted(terminal.database)
    hanging = {"studies"}
    for table in Base.metadata.sorted_tables:  # parents first
        if {key.column.table.name for key in table.foreign_keys} & hanging:
            hanging.add(table.name)
    with terminal.database.read() as session:
        removed = {statement.table.name for statement in discard.deletions(session, only(terminal))}
    assert hanging - removed == {"signatures"}  # who has those is never removed


def only(terminal: Terminal) -> str:
    with terminal.database.read() as session:
        return session.scalars(sa.select(Study.id)).one()


def refused(terminal: Terminal, why: str) -> None:
    with_files(terminal)
    error = terminal.run("study", "discard", only(terminal), "--yes").exception
    assert isinstance(error, StateError) and why in str(error)
    assert rows(terminal, Instance) == 1 and len(files(terminal)) == 2
