"""Instances become rows."""

import threading
from dataclasses import replace

import pytest
import sqlalchemy as sa

from tests.core.builders import arrival, uid
from worker.core import arrivals
from worker.core.database import Database
from worker.core.records import Disposition, Instance, Series, Study


def count(database: Database, table: type) -> int:
    """Rows of a table."""
    with database.read() as session:
        return session.scalar(sa.select(sa.func.count()).select_from(table)) or 0


def test_many_instances_of_two_studies_are_recorded_in_one_batch(database: Database) -> None:
    one, two = uid(), uid()
    recorded = arrivals.record(database, [arrival(one), arrival(two), arrival(one)])
    assert recorded[0].study_id == recorded[2].study_id != recorded[1].study_id
    assert (count(database, Study), count(database, Series), count(database, Instance)) == (2, 2, 3)


def test_equal_bytes_again_are_a_duplicate_without_a_row(database: Database) -> None:
    first = arrival(uid())
    arrivals.record(database, [first])
    (again,) = arrivals.record(database, [replace(first, path="other/file.dcm")])
    assert again.duplicate
    assert not again.new_revision
    assert count(database, Instance) == 1


def test_equal_bytes_twice_in_one_batch_are_recorded_once(database: Database) -> None:
    first = arrival(uid())
    recorded = arrivals.record(database, [first, replace(first, path="other/file.dcm")])
    assert [r.duplicate for r in recorded] == [False, True]
    assert count(database, Instance) == 1


def test_other_encoding_of_an_instance_is_kept_aside_as_a_variant(database: Database) -> None:
    first = arrival(uid())
    other = replace(first, path="b.dcm", sha256="f" * 64, transfer_syntax_uid="1.2.840.10008.1.2.4.80")
    assert arrivals.record(database, [first, other])[1].disposition is Disposition.VARIANT


def test_other_content_under_the_same_uid_is_a_conflict(database: Database) -> None:
    first = arrival(uid())
    assert (
        arrivals.record(database, [first, replace(first, path="b.dcm", sha256="f" * 64)])[1].disposition
        is Disposition.CONFLICT
    )


def test_instance_uid_of_another_study_is_a_conflict(database: Database) -> None:
    first = arrival(uid())
    thief = replace(first, path="b.dcm", study_instance_uid=uid(), sha256="f" * 64)
    assert arrivals.record(database, [first, thief])[1].disposition is Disposition.CONFLICT


def test_batch_whose_commit_answer_was_lost_is_recognised(database: Database) -> None:
    batch = [arrival(uid()), arrival(uid())]
    arrivals.record(database, batch)
    again = arrivals.record(database, batch)
    assert [r.duplicate for r in again] == [False, False]
    assert count(database, Instance) == 2


def test_patient_comes_from_the_first_instance_that_names_one(database: Database) -> None:
    study_uid = uid()
    arrivals.record(database, [arrival(study_uid, patient_identifier="", patient_name="", accession="")])
    arrivals.record(database, [arrival(study_uid, patient_name="ROE^RICHARD")])
    with database.read() as session:
        study = session.scalars(sa.select(Study)).one()
        assert (study.patient_identifier, study.patient_name, study.accession) == ("MRN-1", "ROE^RICHARD", "A-1")


def test_associations_that_send_one_study_at_once_share_its_row(database: Database) -> None:
    study_uid = uid()
    failures: list[BaseException] = []

    def send() -> None:
        try:
            for _ in range(10):
                arrivals.record(database, [arrival(study_uid)])
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert (count(database, Study), count(database, Instance)) == (1, 40)


@pytest.mark.parametrize("name", ["study_instance_uid", "sop_instance_uid", "patient_name", "patient_identifier"])
def test_columns_with_patient_data_are_marked(name: str) -> None:
    named = [c for c in (*Study.__table__.columns, *Instance.__table__.columns) if c.name == name]
    assert named
    assert all(c.info.get("phi") for c in named)


def test_instance_that_retention_removed_and_that_is_sent_again_is_there_again(database: Database) -> None:
    sent = arrival(uid())
    arrivals.record(database, [sent])
    database.run(lambda s: s.execute(sa.update(Instance).values(removed_at=sent.received_at)))
    arrivals.record(database, [sent])
    with database.read() as session:
        assert session.scalars(sa.select(Instance.removed_at)).all() == [None]
