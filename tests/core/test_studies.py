"""State changes and claims."""

from dataclasses import replace
from datetime import timedelta

import pytest
import sqlalchemy as sa

from tests.core.builders import (
    LIMITS,
    arrival,
    claimed,
    completed,
    draft,
    drafted,
    drafting,
    received,
    study_of,
    uid,
)
from worker.core import arrivals, reports, studies
from worker.core.database import Database
from worker.core.errors import LeaseLostError, ModelBusyError, NotFoundError, PixelDataError, StateError
from worker.core.records import Attempt, AttemptOutcome, Priority, ReportVersion, Stage, Study, StudyStatus


def expire(database: Database, claim: studies.Claim) -> None:
    """Plays a worker that died: its lease is over."""
    with database.write() as session:
        studies.get(session, claim.study_id).lease_until = studies.now() - timedelta(seconds=1)


def test_study_completes_only_after_the_quiet_period(database: Database) -> None:
    study_id = received(database)
    with database.write() as session:
        assert studies.complete_quiet(session, quiet_seconds=60) == []
        assert studies.complete_quiet(session, quiet_seconds=0) == [study_id]
    assert study_of(database, study_id).status is StudyStatus.COMPLETE


def test_study_held_by_an_open_association_does_not_complete(database: Database) -> None:
    study_id = received(database)
    with database.write() as session:
        uid = studies.get(session, study_id).study_instance_uid
        assert studies.complete_quiet(session, quiet_seconds=0, held={uid}) == []


def test_study_with_two_patients_fails_with_that_reason_and_never_drafts(database: Database) -> None:
    study_uid = uid()
    arrivals.record(database, [arrival(study_uid), arrival(study_uid, patient_identifier="MRN-2")])
    with database.write() as session:
        assert studies.complete_quiet(session, quiet_seconds=0) == []
    with database.write() as session:
        assert studies.claim(session, Stage.PREPARE, "test", LIMITS) is None
        study = session.scalars(sa.select(Study)).one()
        assert study.status is StudyStatus.FAILED
        assert "2 patients" in study.reason
        assert "MRN" not in study.reason


@pytest.mark.parametrize(("issuers", "patients"), [(("A", "B"), 2), (("A", ""), 1), (("A", "A"), 1)])
def test_one_number_of_two_issuers_is_two_patients(database: Database, issuers: tuple[str, str], patients: int) -> None:
    study_uid = uid()
    arrivals.record(database, [arrival(study_uid, patient_authority=issuer) for issuer in issuers])
    with database.write() as session:
        assert len(studies.complete_quiet(session, quiet_seconds=0)) == (1 if patients == 1 else 0)


def test_stat_is_claimed_before_routine_whatever_came_first(database: Database) -> None:
    completed(database)
    stat = completed(database, priority=Priority.STAT)
    assert claimed(database, Stage.PREPARE).study_id == stat


def test_a_claimed_study_is_not_claimed_again_while_its_lease_lives(database: Database) -> None:
    completed(database)
    claimed(database, Stage.PREPARE)
    with database.write() as session:
        assert studies.claim(session, Stage.PREPARE, "other", LIMITS) is None


def test_lost_lease_is_claimed_again_and_the_first_worker_is_refused(database: Database) -> None:
    completed(database)
    first = claimed(database, Stage.PREPARE)
    expire(database, first)
    second = claimed(database, Stage.PREPARE)
    assert second.study_id == first.study_id
    with pytest.raises(LeaseLostError), database.write() as session:
        studies.store_prepared(session, first, {}, "a")
    with database.write() as session:
        studies.store_prepared(session, second, {}, "b")
    with database.read() as session:
        assert session.get_one(Attempt, first.token).outcome is AttemptOutcome.LOST
    assert study_of(database, first.study_id).model_input == "b"


def test_study_that_kills_its_workers_is_quarantined(database: Database) -> None:
    study_id = completed(database)
    for _ in range(LIMITS.max_crashes):
        expire(database, claimed(database, Stage.PREPARE))
    with database.write() as session:
        assert studies.claim(session, Stage.PREPARE, "test", LIMITS) is None
    study = study_of(database, study_id)
    assert study.status is StudyStatus.FAILED
    assert study.reason.startswith("quarantined: 2 workers died")


def test_finish_whose_answer_was_lost_is_recognised_when_it_runs_again(database: Database) -> None:
    completed(database)
    claim = claimed(database, Stage.PREPARE)
    for _ in range(2):
        with database.write() as session:
            studies.store_prepared(session, claim, {}, "a")
    assert study_of(database, claim.study_id).status is StudyStatus.PREPARED


def test_renew_keeps_held_leases_and_reports_lost_ones(database: Database) -> None:
    completed(database)
    claim = claimed(database, Stage.PREPARE)
    before = study_of(database, claim.study_id).lease_until
    with database.write() as session:
        assert studies.renew(session, [claim.token, uid_token()], 120) == {claim.token}
    after = study_of(database, claim.study_id).lease_until
    assert before is not None and after is not None and after > before


def uid_token() -> str:
    """A token that nobody holds."""
    return "00000000-0000-4000-8000-000000000000"


def test_retryable_error_waits_longer_each_time_and_then_fails(database: Database) -> None:
    completed(database)
    waits = []
    for attempt in range(LIMITS.max_attempts):
        claim = claimed(database, Stage.PREPARE)
        assert claim.attempts == attempt
        with database.write() as session:
            waiting = studies.postpone(session, claim, ModelBusyError("out of memory"), LIMITS)
        study = study_of(database, claim.study_id)
        if waiting:
            assert study.due_at is not None
            waits.append((study.due_at - study.status_at).total_seconds())
            with database.write() as session:
                studies.get(session, claim.study_id).due_at = None
    assert waits == [5, 10]
    assert study.status is StudyStatus.FAILED
    assert study.failed_stage == "prepare"
    assert study.reason == "ModelBusyError: out of memory"


def test_postponed_study_is_not_due_before_its_time(database: Database) -> None:
    completed(database)
    with database.write() as session:
        claim = studies.claim(session, Stage.PREPARE, "test", LIMITS)
        assert claim is not None
        studies.postpone(session, claim, ModelBusyError("busy"), LIMITS)
        assert studies.due_count(session, Stage.PREPARE) == 0


def test_final_error_fails_the_study_with_stage_and_reason(database: Database) -> None:
    claim = drafting(database)
    with database.write() as session:
        studies.fail(session, claim, PixelDataError("slice 3 cannot be decoded"))
    study = study_of(database, claim.study_id)
    assert (study.status, study.failed_stage) == (StudyStatus.FAILED, "draft")
    assert study.reason == "PixelDataError: slice 3 cannot be decoded"


def test_foreign_exception_text_is_never_stored(database: Database) -> None:
    claim = drafting(database)
    with database.write() as session:
        studies.fail(session, claim, ValueError("DOE^JANE is not a number"))
    assert study_of(database, claim.study_id).reason == "ValueError"


def test_late_instance_opens_a_new_revision_and_takes_the_work_away(database: Database) -> None:
    study_uid = uid()
    study_id = arrivals.record(database, [arrival(study_uid)])[0].study_id
    with database.write() as session:
        studies.complete_quiet(session, 0)
    claim = claimed(database, Stage.PREPARE)
    late = arrivals.record(database, [arrival(study_uid)])[0]
    assert (late.study_id, late.revision, late.new_revision) == (study_id, 2, True)
    with pytest.raises(LeaseLostError), database.write() as session:
        studies.store_prepared(session, claim, {}, "a")
    with database.read() as session:
        assert session.get_one(Attempt, claim.token).outcome is AttemptOutcome.SUPERSEDED


def test_requeue_of_a_drafted_study_makes_a_second_version_beside_the_first(database: Database) -> None:
    version_id = drafted(database)
    with database.write() as session:
        study_id = session.get_one(ReportVersion, version_id).report.study_id
        studies.requeue(session, study_id)
    prepare = claimed(database, Stage.PREPARE)
    with database.write() as session:
        studies.store_prepared(session, prepare, {}, "b")
    claim = claimed(database, Stage.DRAFT)
    with database.write() as session:
        study = studies.held(session, claim)
        assert study is not None
        reports.add_draft(session, study, draft("Nodule."))
        studies.mark_drafted(session, study, claim)
    with database.read() as session:
        versions = session.scalars(sa.select(ReportVersion).order_by(ReportVersion.number)).all()
        assert [(v.number, v.study_revision) for v in versions] == [(1, 1), (2, 2)]
        assert (versions[1].status_time - versions[0].status_time) >= timedelta(seconds=1)


def test_requeue_refuses_what_is_under_way_unless_forced(database: Database) -> None:
    claim = drafting(database)
    with pytest.raises(StateError, match="--force"), database.write() as session:
        studies.requeue(session, claim.study_id)
    with database.write() as session:
        studies.requeue(session, claim.study_id, force=True)
    assert study_of(database, claim.study_id).status is StudyStatus.COMPLETE


def test_requeue_of_an_unknown_study_says_so(database: Database) -> None:
    with pytest.raises(NotFoundError), database.write() as session:
        studies.requeue(session, uid_token())


def test_draft_is_stored_once_per_revision(database: Database) -> None:
    claim = drafting(database)
    with database.write() as session:
        study = studies.held(session, claim)
        assert study is not None
        first = reports.add_draft(session, study, draft())
        assert reports.add_draft(session, study, draft("other")).id == first.id


def test_worker_that_stops_gives_its_study_back_without_counting(database: Database) -> None:
    claim = drafting(database)
    with database.write() as session:
        studies.give_back(session, claim)
    again = claimed(database, Stage.DRAFT)
    assert (again.study_id, again.attempts) == (claim.study_id, 0)


@pytest.mark.parametrize("status", [StudyStatus.RECEIVING, StudyStatus.COMPLETE, StudyStatus.PREPARED])
def test_state_that_does_not_lead_there_is_refused(sqlite_database: Database, status: StudyStatus) -> None:
    claim = drafting(sqlite_database)
    with sqlite_database.write() as session:
        studies.get(session, claim.study_id).status = status
    with pytest.raises(StateError), sqlite_database.write() as session:
        study = studies.get(session, claim.study_id)
        studies.mark_drafted(session, study, claim)


def test_max_crashes_counts_per_stage(database: Database) -> None:
    completed(database)
    first = claimed(database, Stage.PREPARE)
    expire(database, first)
    second = claimed(database, Stage.PREPARE)
    with database.write() as session:
        studies.store_prepared(session, second, {}, "a")
    assert study_of(database, first.study_id).crashes == 0
    expire(database, claimed(database, Stage.DRAFT))
    assert claimed(database, Stage.DRAFT, replace(LIMITS, max_crashes=2)).study_id == first.study_id
