"""What the worker survives, with real processes that are really killed."""

import signal
import time
from collections import Counter

import pytest

from tests.worker.hospital_site import Site, wait_for
from worker import queues
from worker.core import studies
from worker.core.errors import BrokerUnavailableError
from worker.core.records import Attempt, AttemptOutcome, MessageState, ReportVersion, Stage, StudyStatus
from worker.delivery.mllp_receiver import Behaviour, MllpReceiver

BIG = {"slices": 40, "side": 256}
"""Large enough that a stage takes tenths of a second and can be caught in the middle."""


def ris(receiver: MllpReceiver, **more: object) -> dict[str, object]:
    return {"name": "ris", "host": "127.0.0.1", "port": receiver.port, "drafts": "R", **more}


def acknowledged(site: Site, count: int = 1) -> bool:
    return [m.state for m in site.messages()] == [MessageState.ACKNOWLEDGED] * count


def attempt_outcomes(site: Site, stage: Stage) -> Counter[AttemptOutcome]:
    return Counter(attempt.outcome for attempt in site.rows(Attempt, Attempt.stage == stage))


@pytest.mark.parametrize(
    ("status", "stage"), [(StudyStatus.PREPARING, Stage.PREPARE), (StudyStatus.DRAFTING, Stage.DRAFT)]
)
def test_worker_killed_in_a_stage_loses_nothing_and_drafts_once(
    site: Site, receiver: MllpReceiver, status: StudyStatus, stage: Stage
) -> None:
    site.deliver_to(ris(receiver))
    study_id = site.add_study(**BIG)
    doomed = site.start_worker(ready=False)
    site.catch(study_id, status)
    doomed.kill()
    assert site.status(study_id) is status

    site.start_worker(ready=False)
    site.wait_for_status(study_id, StudyStatus.DRAFTED)
    wait_for(lambda: acknowledged(site))
    assert attempt_outcomes(site, stage) == {AttemptOutcome.LOST: 1, AttemptOutcome.DONE: 1}
    assert len(site.rows(ReportVersion)) == 1
    assert len(receiver.received) == 1


def test_worker_killed_while_a_message_is_out_sends_it_again_under_the_same_control_id(
    site: Site, receiver: MllpReceiver
) -> None:
    site.deliver_to(ris(receiver, connect_seconds=0.5, answer_seconds=1))
    receiver.behaviour = Behaviour.HANG
    site.add_study()
    doomed = site.start_worker(ready=False)
    wait_for(lambda: receiver.received)
    doomed.kill()
    receiver.behaviour = Behaviour.AA

    site.start_worker(ready=False)
    wait_for(lambda: acknowledged(site), seconds=30)
    assert len(receiver.received) >= 2
    assert {m.control_id for m in receiver.received} == {site.messages()[0].control_id}
    assert len({m.payload for m in receiver.received}) == 1


def test_frozen_worker_that_wakes_up_late_cannot_record_its_result(site: Site) -> None:
    study_id = site.add_study(**BIG)
    frozen = site.start_worker("-Q", "prepare", ready=False)
    site.catch(study_id, StudyStatus.PREPARING)
    frozen.freeze()
    site.start_worker(ready=False)
    site.wait_for_status(study_id, StudyStatus.DRAFTED)
    frozen.thaw()
    frozen.wait_for_event("result_refused")
    assert len(site.rows(ReportVersion)) == 1


def test_study_that_kills_every_worker_is_quarantined(site: Site) -> None:
    site.environment |= {"MU2_QUEUE__LEASE_SECONDS": "1", "MU2_QUEUE__MAX_CRASHES": "2"}
    study_id = site.add_study(**BIG)
    for crashes in (1, 2):
        doomed = site.start_worker("-Q", "prepare", ready=False)
        site.wait_for_count(Attempt, crashes)
        doomed.kill()
        wait_for(lambda: site.study(study_id).lease_until < studies.now())  # type: ignore[operator]
    site.start_worker("-Q", "prepare", ready=False)
    site.wait_for_status(study_id, StudyStatus.FAILED)
    assert site.study(study_id).reason.startswith("quarantined: 2 workers died or hung in prepare")


def test_flushed_broker_delays_work_by_a_sweep_at_most(site: Site) -> None:
    waiting = [site.add_study() for _ in range(3)]
    for study_id in waiting:
        site.doorbell().ring(queues.PREPARE, study_id)
    site.flush_broker()
    site.start_worker()
    for study_id in waiting:
        site.wait_for_status(study_id, StudyStatus.DRAFTED)


def test_worker_hears_again_after_the_broker_was_killed(site: Site) -> None:
    worker = site.start_worker()
    site.broker.kill()
    study_id = site.add_study()
    with pytest.raises(BrokerUnavailableError):
        site.doorbell().ring(queues.PREPARE, study_id)
    worker.wait_for_event("broker_away")
    site.broker.start()
    site.wait_for_status(study_id, StudyStatus.DRAFTED)
    second = site.add_study()
    site.doorbell().ring(queues.PREPARE, second)
    site.wait_for_status(second, StudyStatus.DRAFTED)


def test_worker_started_before_its_broker_waits_for_it(site: Site) -> None:
    site.broker.stop()
    site.start_worker(ready=False).wait_for_event("broker_away")
    site.broker.start()
    study_id = site.add_study()
    site.wait_for_status(study_id, StudyStatus.DRAFTED)


def test_worker_without_a_broker_stops_when_told(site: Site) -> None:
    site.broker.stop()
    worker = site.start_worker(ready=False)
    worker.wait_for_event("broker_away")
    assert worker.stop() == 0


def test_database_locked_for_seconds_delays_and_loses_nothing(site: Site, receiver: MllpReceiver) -> None:
    site.deliver_to(ris(receiver))
    study_id = site.add_study(**BIG)
    site.start_worker(ready=False)
    site.catch(study_id, StudyStatus.PREPARING)
    lock = site.lock_database()
    time.sleep(7)  # longer than SQLite's own patience and than the lease
    lock.rollback()
    site.wait_for_status(study_id, StudyStatus.DRAFTED)
    wait_for(lambda: acknowledged(site))
    assert attempt_outcomes(site, Stage.PREPARE) == {AttemptOutcome.DONE: 1}


def test_stopped_worker_ends_what_it_has_in_hand_and_leaves_the_rest(site: Site) -> None:
    study_ids = [site.add_study(**BIG) for _ in range(3)]
    worker = site.start_worker(ready=False)
    site.catch(study_ids[0], StudyStatus.PREPARING)
    assert worker.stop() == 0
    assert worker.events("worker_stopped")
    held = [site.study(study_id).lease_token for study_id in study_ids]
    assert held == [None, None, None]
    assert AttemptOutcome.RUNNING not in attempt_outcomes(site, Stage.PREPARE)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGQUIT])
def test_busy_worker_obeys_every_signal_to_stop(site: Site, number: signal.Signals) -> None:
    for _ in range(40):
        site.add_study()
    worker = site.start_worker("-Q", "prepare", ready=False)
    wait_for(lambda: site.rows(Attempt))
    worker.process.send_signal(number)
    worker.process.wait(timeout=15)
    assert worker.events("worker_stopped")
    assert AttemptOutcome.RUNNING not in attempt_outcomes(site, Stage.PREPARE)
    assert len(site.rows(Attempt)) < 40


def test_worker_refuses_to_start_on_a_database_that_is_not_migrated(site: Site) -> None:
    empty = site.home / "empty.sqlite"
    worker = site.start_worker(ready=False, MU2_DATABASE__URL=f"sqlite:///{empty}")
    assert worker.process.wait(timeout=20) != 0
    assert "mu2 db upgrade" in worker.output


@pytest.mark.slow  # PostgreSQL's test of the same with three workers always runs
def test_two_workers_share_the_studies_and_draft_each_once(site: Site, receiver: MllpReceiver) -> None:
    site.deliver_to(ris(receiver))
    study_ids = [site.add_study() for _ in range(10)]
    site.start_worker(ready=False)
    site.start_worker(ready=False)
    for study_id in study_ids:
        site.wait_for_status(study_id, StudyStatus.DRAFTED, seconds=40)
    wait_for(lambda: acknowledged(site, 10), seconds=30)
    assert len(site.rows(ReportVersion)) == 10
    assert Counter(m.control_id for m in receiver.received) == {m.control_id: 1 for m in site.messages()}


def test_doorbells_never_pile_up_however_many_studies_wait(site: Site) -> None:
    doorbell = site.doorbell()
    for number in range(200):
        doorbell.ring(queues.PREPARE, str(number))
    assert doorbell.waiting(queues.PREPARE) == queues.ENOUGH_RINGS


def test_queues_can_be_served_by_machines_of_their_own(site: Site, receiver: MllpReceiver) -> None:
    site.deliver_to(ris(receiver))
    cpu = site.start_worker("-Q", "prepare,deliver", ready=False)
    gpu = site.start_worker("-Q", "draft", ready=False)
    study_id = site.add_study()
    site.wait_for_status(study_id, StudyStatus.DRAFTED)
    wait_for(lambda: acknowledged(site))
    by_stage = {attempt.stage: attempt.worker for attempt in site.rows(Attempt)}
    names = {gpu.events("worker_started")[0]["worker"], cpu.events("worker_started")[0]["worker"]}
    assert set(by_stage.values()) == names


def test_deaf_receiver_does_not_delay_another_destination(site: Site) -> None:
    with MllpReceiver(behaviour=Behaviour.HANG) as deaf, MllpReceiver() as good:
        site.deliver_to(ris(deaf, name="deaf", answer_seconds=60), ris(good, name="good"))
        site.start_worker()
        study_ids = [site.add_study() for _ in range(3)]
        for study_id in study_ids:
            site.wait_for_status(study_id, StudyStatus.DRAFTED)
        wait_for(lambda: len(good.received) == 3)
        assert len(deaf.received) == 1
