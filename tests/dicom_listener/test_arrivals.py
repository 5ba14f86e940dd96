"""When a study is complete, what holds it back, and rows that were lost."""

import time
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from pydicom.uid import generate_uid
from sqlalchemy.exc import DataError, IntegrityError

from dicom_listener import arrivals
from dicom_listener.arrivals import Holds, Ranking, recover
from dicom_listener.corrected_headers import Corrections
from dicom_listener.metrics import Metrics
from dicom_listener.storage import Store
from tests.dicom_listener.conftest import Running
from tests.dicom_listener.sending import connect, ct, eventually, send
from worker.core import arrivals as core_arrivals
from worker.core.arrivals import Arrival, Recorded
from worker.core.errors import BrokerUnavailableError, DatabaseUnavailableError
from worker.core.records import Instance, Priority, Series, Study, StudyStatus
from worker.core.settings import Peer


def test_study_is_submitted_once_after_its_quiet_period(start: Callable[..., Running]) -> None:
    running = start(quiet_seconds=0.4)
    study = generate_uid()
    send(running.port, [ct(study), ct(study)])
    sent_at = time.monotonic()
    eventually(lambda: running.submitted)
    assert time.monotonic() - sent_at > 0.3
    time.sleep(0.6)
    (row,) = running.sent.studies()
    assert running.submitted == [row.id]
    assert row.status is StudyStatus.COMPLETE


def test_open_association_holds_its_study_back_until_it_ends(start: Callable[..., Running]) -> None:
    running = start(quiet_seconds=0.2)
    association = connect(running.port)
    association.send_c_store(ct())
    send(running.port, [ct()])
    eventually(lambda: len(running.submitted) == 1)
    time.sleep(0.5)
    assert len(running.submitted) == 1
    association.release()
    eventually(lambda: len(running.submitted) == 2)


def test_association_that_hangs_past_the_limit_holds_nothing(start: Callable[..., Running]) -> None:
    running = start(quiet_seconds=0.2, open_association_limit_seconds=0.5)
    association = connect(running.port)
    association.send_c_store(ct())
    eventually(lambda: running.submitted)
    assert association.is_established
    association.release()


def test_study_whose_commit_outlasts_the_quiet_period_is_held_by_its_open_association(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start(quiet_seconds=0.2)
    study, settle = generate_uid(), Corrections.settle

    def slow(self: Corrections, arrival: Arrival, recorded: Recorded) -> Recorded:
        time.sleep(0.8)  # rows are there, the association has not heard of it
        return settle(self, arrival, recorded)

    monkeypatch.setattr(Corrections, "settle", slow)
    send(running.port, [ct(study), ct(study)])
    eventually(lambda: running.submitted)
    assert running.sent.studies()[0].revision == 1


def test_holds_are_per_study_and_per_association(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    holds = Holds(limit_seconds=10)
    holds.note(1, "a")
    holds.note(2, "a")
    now[0] = 6
    holds.note(1, "b")
    now[0] = 11
    assert holds.held() == {"b"}
    holds.note(2, "c")
    holds.end(1)
    assert holds.held() == {"c"}


def test_late_instance_makes_a_new_revision_that_is_submitted_again(start: Callable[..., Running]) -> None:
    running = start(quiet_seconds=0.2)
    study = generate_uid()
    send(running.port, [ct(study)])
    eventually(lambda: len(running.submitted) == 1)
    send(running.port, [ct(study)])
    eventually(lambda: len(running.submitted) == 2)
    assert running.submitted[0] == running.submitted[1]
    assert running.sent.studies()[0].revision == 2


def test_instance_sent_again_after_completion_changes_nothing(start: Callable[..., Running]) -> None:
    running = start(quiet_seconds=0.2)
    image = ct()
    send(running.port, [image])
    eventually(lambda: running.submitted)
    send(running.port, [image])
    time.sleep(0.5)
    assert (len(running.submitted), running.sent.studies()[0].revision) == (1, 1)


def test_two_patients_in_one_study_fail_it_with_that_reason(start: Callable[..., Running]) -> None:
    running = start(quiet_seconds=0.2)
    study = generate_uid()
    send(running.port, [ct(study), ct(study, PatientID="MRN-2")])
    row = eventually(lambda: [s for s in running.sent.studies() if s.status is StudyStatus.FAILED])[0]
    assert "2 patients" in row.reason
    assert running.submitted == []


def test_broker_that_is_away_does_not_undo_completion(settings: Callable[..., Any]) -> None:
    from dicom_listener.server import Listener

    def unheard(study_id: str) -> None:
        raise BrokerUnavailableError("away")

    listener = Listener(settings(quiet_seconds=0.2), unheard)
    listener.start()
    send(listener.port, [ct()])
    eventually(lambda: listener.metrics.registry.get_sample_value("mu2_dicom_studies_completed_total") == 1)
    listener.close()


def test_study_of_a_killed_listener_is_completed_by_the_next(start: Callable[..., Running]) -> None:
    first = start(quiet_seconds=60)
    send(first.port, [ct()])
    first.stop()
    second = start(quiet_seconds=0.3)
    eventually(lambda: second.submitted)


def test_study_interrupted_by_a_restart_is_completed_once_it_is_whole(start: Callable[..., Running]) -> None:
    first = start(quiet_seconds=60)
    study = generate_uid()
    send(first.port, [ct(study)])
    first.stop()
    time.sleep(1.0)
    second = start(quiet_seconds=1.0)
    time.sleep(0.6)
    send(second.port, [ct(study)])
    eventually(lambda: second.submitted)
    (row,) = second.sent.studies()
    assert (row.revision, len(second.sent.instances())) == (1, 2)


def lose_rows(running: Running) -> None:
    with running.sent.database.write() as session:
        for table in (Instance, Series, Study):
            session.execute(sa.delete(table))


def test_rows_that_were_lost_are_made_again_at_the_next_start(start: Callable[..., Running]) -> None:
    first = start(peers=(Peer(ae_title="PACS", priority="stat"),))
    image = ct(IssuerOfPatientID="SITE")
    send(first.port, [image, ct(image.StudyInstanceUID, SOPInstanceUID=image.SOPInstanceUID)])
    before = {(i.sop_instance_uid, i.path, i.sha256, i.disposition) for i in first.sent.instances()}
    first.stop()
    lose_rows(first)
    second = start(quiet_seconds=0.3, peers=(Peer(ae_title="PACS", priority="stat"),))
    eventually(lambda: second.submitted)
    assert {(i.sop_instance_uid, i.path, i.sha256, i.disposition) for i in second.sent.instances()} == before
    (study,) = second.sent.studies()
    assert (study.patient_name, study.patient_authority) == ("DOE^JANE", "SITE")
    assert (study.calling_ae, study.priority) == ("PACS", Priority.STAT)
    assert second.sent.counted("mu2_dicom_recovered_instances_total") == 2


def test_recovery_makes_no_row_twice_and_sets_aside_what_is_torn_or_not_ours(running: Running) -> None:
    send(running.port, [ct(), ct()])
    torn, kept = running.sent.files()
    with running.sent.database.write() as session:
        session.execute(sa.delete(Instance).where(Instance.path == str(torn.relative_to(running.sent.root))))
    torn.write_bytes(torn.read_bytes()[:-10])
    (kept.parent / "foreign.dcm").write_bytes(b"not ours")
    store = Store(running.sent.root, 0)
    assert recover(store, running.sent.database, Ranking({}), Metrics()) == 0
    assert running.sent.files() == [kept]
    assert {p.name for p in (running.sent.root / "torn").iterdir()} == {torn.name, "foreign.dcm"}


def test_recovery_looks_only_through_folders_that_changed_since_the_last(running: Running) -> None:
    send(running.port, [ct()])
    store = Store(running.sent.root, 0)
    recover(store, running.sent.database, Ranking({}), Metrics())
    assert len(list(store.stored_since(store.recovered_at()))) == 1
    assert list(store.stored_since(time.time() + 10)) == []


def test_rows_are_recovered_while_the_listener_runs_once_the_database_is_back(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrivals, "RECOVERY_RETRY_SECONDS", 0.1)
    running = start()
    eventually(lambda: running.listener._recovery.done())

    def away(*_: Any) -> None:
        raise DatabaseUnavailableError("away")

    with monkeypatch.context() as outage:
        outage.setattr("worker.core.recorder.Recorder.record", away)
        assert send(running.port, [ct()]) == [0xA700]
    eventually(lambda: len(running.sent.instances()) == 1)


def test_database_error_of_one_round_does_not_end_completion(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[int] = []

    def refuse(*_: Any) -> list[str]:
        rounds.append(1)
        raise IntegrityError("injected", None, ValueError())

    running = start(quiet_seconds=0.2)
    with monkeypatch.context() as fault:
        fault.setattr("worker.core.studies.complete_quiet", refuse)
        send(running.port, [ct()])
        eventually(lambda: len(rounds) > 1)
    eventually(lambda: running.submitted)


def test_row_that_the_database_refuses_stops_no_other_recovery(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(running.port, [ct(), ct(), ct()])
    bad = running.sent.instances()[1].sop_instance_uid
    lose_rows(running)
    record = core_arrivals.record

    def picky(database: Any, group: Any) -> Any:
        if any(one.sop_instance_uid == bad for one in group):
            raise DataError("injected", None, ValueError())
        return record(database, group)

    store = Store(running.sent.root, 0)
    with monkeypatch.context() as fault:
        fault.setattr("worker.core.arrivals.record", picky)
        assert recover(store, running.sent.database, Ranking({}), Metrics()) == 2
    assert recover(store, running.sent.database, Ranking({}), Metrics()) == 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("20250304", date(2025, 3, 4)),
        ("1993.08.22", date(1993, 8, 22)),
        ("20251399", None),
        ("", None),
        ("x" * 8, None),
    ],
)
def test_dates_are_read_or_left_out(value: str, expected: date | None) -> None:
    assert arrivals._date(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("101112.123456", datetime(2025, 3, 4, 10, 11, 12)),
        ("10:11:12", datetime(2025, 3, 4, 10, 11, 12)),
        ("1011", datetime(2025, 3, 4, 10, 11)),
        ("235960", datetime(2025, 3, 4)),
        ("", datetime(2025, 3, 4)),
        ("noon", datetime(2025, 3, 4)),
    ],
)
def test_study_times_are_read_as_far_as_they_go(value: str, expected: datetime) -> None:
    assert arrivals._study_time("20250304", value) == expected


def test_values_longer_than_their_column_are_cut_and_control_characters_dropped(running: Running) -> None:
    image = ct(StudyDescription="x" * 90, PatientName="A\x00B^C\x1bD")
    send(running.port, [image])
    (study,) = running.sent.studies()
    assert (len(study.description), study.patient_name) == (64, "AB^CD")


def test_store_path_of_a_row_stays_below_the_store(running: Running) -> None:
    send(running.port, [ct()])
    (row,) = running.sent.instances()
    assert not Path(row.path).is_absolute()
    assert (running.sent.root / row.path).is_file()
