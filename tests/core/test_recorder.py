"""The recorder writes what `arrivals.record` would, whatever happened to its studies meanwhile."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from tests.core.builders import arrival, uid
from worker.core import arrivals, recorder, studies
from worker.core.database import Database
from worker.core.errors import DatabaseUnavailableError
from worker.core.recorder import Recorder
from worker.core.records import Disposition, Instance, Priority, Study, StudyStatus


@pytest.fixture
def recording(database: Database) -> Iterator[Recorder]:
    made = Recorder(database)
    yield made
    made.close()


def count(database: Database) -> int:
    with database.read() as session:
        return session.scalar(sa.select(sa.func.count()).select_from(Instance)) or 0


def study(database: Database) -> Study:
    with database.read() as session:
        return session.scalars(sa.select(Study)).one()


def test_second_instance_of_a_study_needs_no_look_at_the_rows(
    database: Database, recording: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    study_uid = uid()
    (first,) = recording.record([arrival(study_uid)])
    monkeypatch.setattr(arrivals, "record", None)
    later = arrival(study_uid)
    assert recording.record([later]) == [first]
    assert count(database) == 2
    assert study(database).last_arrival_at == later.received_at


def test_rows_are_equal_whichever_way_they_were_made(database: Database, recording: Recorder) -> None:
    study_uid = uid()
    recording.record([arrival(study_uid)])
    quick = arrival(study_uid)
    slow = replace(quick, sop_instance_uid=uid(), path="other/name.dcm")
    recording.record([quick])
    arrivals.record(database, [slow])
    with database.read() as session:
        one, other = (session.scalars(sa.select(Instance).where(Instance.path == a.path)).one() for a in (quick, slow))
    columns = [c.key for c in sa.inspect(Instance).column_attrs if c.key not in ("id", "path", "sop_instance_uid")]
    assert {c: getattr(one, c) for c in columns} == {c: getattr(other, c) for c in columns}


def test_late_instance_opens_a_new_revision(database: Database, recording: Recorder) -> None:
    study_uid = uid()
    (first,) = recording.record([arrival(study_uid)])
    with database.write() as session:
        studies.complete(session, studies.get(session, first.study_id))
    (late,) = recording.record([arrival(study_uid)])
    assert (late.new_revision, late.revision) == (True, 2)
    assert study(database).status is StudyStatus.RECEIVING
    assert recording.record([arrival(study_uid)])[0].revision == 2


def test_instance_that_was_there_is_not_added_again(database: Database, recording: Recorder) -> None:
    study_uid = uid()
    recording.record([arrival(study_uid)])
    sent = arrival(study_uid)
    recording.record([sent])
    (again,) = recording.record([sent])
    assert (again.repeated, again.disposition) == (True, Disposition.KEPT)
    assert count(database) == 2


def test_new_and_old_instances_in_one_group_are_told_apart(database: Database, recording: Recorder) -> None:
    study_uid = uid()
    old = arrival(study_uid)
    recording.record([old])
    other = replace(old, path="x/y.dcm", sha256="f" * 64)
    outcome = recording.record([arrival(study_uid), other, arrival(study_uid)])
    assert [r.disposition for r in outcome] == [Disposition.KEPT, Disposition.CONFLICT, Disposition.KEPT]
    assert count(database) == 4


def test_more_urgent_instance_raises_the_study(database: Database, recording: Recorder) -> None:
    study_uid = uid()
    recording.record([arrival(study_uid)])
    recording.record([arrival(study_uid, priority=Priority.STAT)])
    recording.record([arrival(study_uid)])
    assert study(database).priority == Priority.STAT


def test_patient_is_filled_in_by_the_first_instance_that_names_one(database: Database, recording: Recorder) -> None:
    study_uid = uid()
    recording.record([arrival(study_uid, patient_identifier="", patient_name="")])
    recording.record([arrival(study_uid)])
    assert study(database).patient_name == "DOE^JANE"


def test_driver_that_fails_falls_back_to_the_patient_way(
    database: Database, recording: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    study_uid = uid()
    recording.record([arrival(study_uid)])

    def fail(*_: Any) -> bool:
        raise database.engine.dialect.loaded_dbapi.OperationalError("injected")

    with monkeypatch.context() as broken:
        broken.setattr(Recorder, "_write", fail)
        assert recording.record([arrival(study_uid)])[0].disposition is Disposition.KEPT
    recording.record([arrival(study_uid)])
    assert count(database) == 3


def test_memory_is_bounded(sqlite_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "MOST_REMEMBERED", 3)
    recording = Recorder(sqlite_database)
    for _ in range(8):
        recording.record([arrival(uid())])
    assert len(recording._seen) == 3
    recording.close()


def test_locked_database_raises_when_the_time_is_over(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.core.database.SQLITE_LOCK_SECONDS", 0.1)
    impatient = Database(str(sqlite_database.url), busy_seconds=0.2)
    recording = Recorder(impatient)
    study_uid = uid()
    recording.record([arrival(study_uid)])
    with sqlite_database.write() as session:
        session.connection()
        with pytest.raises(DatabaseUnavailableError):
            recording.record([arrival(study_uid)])
    recording.record([arrival(study_uid)])
    assert count(sqlite_database) == 2
    recording.close()
    impatient.close()
