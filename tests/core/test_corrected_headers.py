"""A corrected header takes the place of an earlier one, in the rows."""

from dataclasses import replace

from tests.core.builders import arrival, uid
from worker.core import arrivals, corrected_headers, studies
from worker.core.database import Database
from worker.core.records import AuditEvent, Disposition, Instance, StudyStatus


def test_corrected_instance_is_kept_and_its_study_arrives_anew(database: Database) -> None:
    first = arrival(uid())
    later = replace(first, path="b.dcm", sha256="f" * 64, patient_name="ROE^MARY", accession="A-2")
    study_id = arrivals.record(database, [first])[0].study_id
    database.run(lambda session: studies.complete(session, studies.get(session, study_id)))
    arrivals.record(database, [later])
    outcome = database.run(lambda session: corrected_headers.apply(session, later, first.path))
    assert outcome is not None
    assert (outcome.corrected, outcome.new_revision, outcome.revision) == (True, True, 2)
    with database.read() as session:
        study = studies.get(session, study_id)
        assert (study.status, study.patient_name, study.accession) == (StudyStatus.RECEIVING, "ROE^MARY", "A-2")
        rows = {row.path: row.disposition for row in session.query(Instance)}
        assert rows == {first.path: Disposition.VARIANT, "b.dcm": Disposition.KEPT}


def test_second_of_two_corrections_at_once_is_not_applied_over_the_first(database: Database) -> None:
    first = arrival(uid())
    one, two = (replace(first, path=f"{n}.dcm", sha256=n * 64, patient_name=n) for n in "ab")
    arrivals.record(database, [first, one, two])
    assert database.run(lambda session: corrected_headers.apply(session, one, first.path))
    assert database.run(lambda session: corrected_headers.apply(session, two, first.path)) is None


def test_correction_whose_commit_was_not_answered_is_applied_once(database: Database) -> None:
    first = arrival(uid())
    later = replace(first, path="b.dcm", sha256="f" * 64, patient_name="ROE^MARY")
    arrivals.record(database, [first, later])
    for _ in range(2):
        outcome = database.run(lambda session: corrected_headers.apply(session, later, first.path))
        assert outcome is not None and outcome.corrected
    with database.read() as session:
        assert session.query(AuditEvent).filter(AuditEvent.action == corrected_headers.ACTION).count() == 1
        rows = {row.path: row.disposition for row in session.query(Instance)}
        assert rows == {first.path: Disposition.VARIANT, "b.dcm": Disposition.KEPT}


def test_latest_corrector_of_a_study_is_known(database: Database) -> None:
    first = arrival(uid(), calling_ae="SCANNER")
    one, two = (
        replace(first, path=f"{ae}.dcm", sha256=f * 64, calling_ae=ae) for ae, f in (("PACS", "a"), ("RIS", "b"))
    )
    arrivals.record(database, [first, one, two])
    found = []
    for later, kept in ((one, first), (two, one)):
        with database.read() as session:
            found.append(corrected_headers.corrector(session, first))
        database.run(lambda session, later=later, kept=kept: corrected_headers.apply(session, later, kept.path))
    with database.read() as session:
        assert [*found, corrected_headers.corrector(session, first)] == ["", "PACS", "RIS"]


def test_instance_of_another_study_or_encoding_has_nothing_to_correct(database: Database) -> None:
    first = arrival(uid())
    others = [
        replace(first, path="b.dcm", study_instance_uid=uid()),
        replace(first, path="b.dcm", transfer_syntax_uid="1.2.840.10008.1.2.4.80"),
        replace(first, path="b.dcm", sop_class_uid="1.2.840.10008.5.1.4.1.1.4"),
    ]
    arrivals.record(database, [first])
    with database.read() as session:
        assert [corrected_headers.rival(session, other) for other in others] == [None] * 3
