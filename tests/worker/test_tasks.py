"""What becomes of a study by the class of its error, and how doorbells share the work; in one process, on a real database."""

import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from pydicom.uid import generate_uid

from tests.worker.hospital_site import Site, slice_dataset, wait_for
from worker import tasks
from worker.core import studies
from worker.core.errors import ModelBusyError, ModelError
from worker.core.records import (
    Attempt,
    AttemptOutcome,
    AuditEvent,
    Message,
    Priority,
    ReportVersion,
    Stage,
    StudyStatus,
)
from worker.core.report import Provenance, Section, Sentence
from worker.inference.reporter import CtVolume, Deadline, Drafted, Explained
from worker.process import WorkerProcess


@dataclass
class ScriptedReporter:
    """Does in turn what the script says: raises it, or waits for it; then drafts."""

    script: list[Exception | threading.Event] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    entered: threading.Event = field(default_factory=threading.Event)
    name: str = "scripted"
    version: str = "1"
    weights_sha256: str = ""
    is_broken: bool = False
    trained_on: str = "patients"

    def draft(self, volumes: Sequence[CtVolume], deadline: Deadline) -> Drafted:
        self.entered.set()
        step = self.script.pop(0) if self.script else None
        if isinstance(step, Exception):
            raise step
        if step is not None:
            while not step.wait(0.01):
                deadline.check()
        self.drafted.append(volumes[0].hu.shape[0])
        decoding: dict[str, str | int | float | bool] = {"trained_on": self.trained_on}
        return Drafted((Sentence(Section.FINDINGS, "Nothing."),), Provenance("scripted", "1", "", "", decoding))

    def explain(self, volumes: Sequence[CtVolume], deadline: Deadline) -> list[Explained]:
        raise ModelError("nothing to explain")

    def close(self) -> None:
        self.script.clear()


@pytest.fixture
def reporter(worker_process: WorkerProcess) -> ScriptedReporter:
    made = ScriptedReporter()
    worker_process._reporter = made
    return made


@pytest.fixture
def patient_process(worker_process: WorkerProcess) -> WorkerProcess:
    """A process that waits a minute before it tries again."""
    worker_process.limits = replace(worker_process.limits, backoff_seconds=60)
    return worker_process


def prepare(worker: WorkerProcess) -> None:
    tasks.answer(worker, Stage.PREPARE, str(uuid.uuid4()))


def draft(worker: WorkerProcess) -> None:
    tasks.answer(worker, Stage.DRAFT, str(uuid.uuid4()))


def begin_draft(worker: WorkerProcess, reporter: ScriptedReporter, go_on: threading.Event) -> threading.Thread:
    """A draft that the reporter has begun and ends when `go_on` is set, in the thread that is returned."""
    reporter.script = [go_on]
    reporter.entered.clear()
    drafting = threading.Thread(target=draft, args=(worker,))
    drafting.start()
    assert reporter.entered.wait(10), "not claimed"
    return drafting


def outcomes(site: Site, stage: Stage) -> list[AttemptOutcome]:
    rows = sorted(site.rows(Attempt, Attempt.stage == stage), key=lambda a: a.started_at)
    return [row.outcome for row in rows]


def test_doorbell_works_until_nothing_is_due(site: Site, worker_process: WorkerProcess) -> None:
    studies_added = [site.add_study() for _ in range(3)]
    prepare(worker_process)
    draft(worker_process)
    assert {site.status(study) for study in studies_added} == {StudyStatus.DRAFTED}


def test_draft_is_stored_with_its_provenance_and_audited(site: Site, worker_process: WorkerProcess) -> None:
    study_id = site.add_study()
    prepare(worker_process)
    draft(worker_process)
    (version,) = site.rows(ReportVersion)
    assert version.provenance is not None
    assert version.provenance["model_name"] == "fake"
    assert set(version.provenance["stage_seconds"]) == {"load", "draft"}
    assert [e.study_id for e in site.rows(AuditEvent, AuditEvent.action == "draft")] == [study_id]


def test_stat_study_overtakes_what_waits(site: Site, worker_process: WorkerProcess, reporter: ScriptedReporter) -> None:
    for slices in (12, 13, 14):
        site.add_study(slices=slices)
    site.add_study(slices=20, priority=Priority.STAT)
    prepare(worker_process)
    draft(worker_process)
    assert reporter.drafted == [20, 12, 13, 14]


def test_retryable_error_is_tried_again_after_a_growing_wait(
    site: Site, patient_process: WorkerProcess, reporter: ScriptedReporter
) -> None:
    study_id = site.add_study()
    reporter.script = [ModelBusyError("busy"), ModelBusyError("busy")]
    prepare(patient_process)
    waits = []
    for _ in range(2):
        draft(patient_process)
        study = site.study(study_id)
        assert study.status is StudyStatus.PREPARED
        assert study.due_at is not None
        waits.append((study.due_at - study.status_at).total_seconds())
        site.let_wait_pass(study_id)
    draft(patient_process)
    assert waits == [60, 120]
    assert outcomes(site, Stage.DRAFT) == [AttemptOutcome.RETRY, AttemptOutcome.RETRY, AttemptOutcome.DONE]


def test_study_fails_after_the_last_attempt_with_stage_and_reason(
    site: Site, patient_process: WorkerProcess, reporter: ScriptedReporter
) -> None:
    study_id = site.add_study()
    reporter.script = [ModelBusyError("the model is busy") for _ in range(patient_process.limits.max_attempts)]
    prepare(patient_process)
    while reporter.script:
        draft(patient_process)
        site.let_wait_pass(study_id)
    study = site.study(study_id)
    assert study.status is StudyStatus.FAILED
    assert (study.failed_stage, study.reason) == ("draft", "ModelBusyError: the model is busy")


def test_final_error_fails_the_study_at_once(
    site: Site, worker_process: WorkerProcess, reporter: ScriptedReporter
) -> None:
    study_id = site.add_study()
    reporter.script = [ModelError("the model refuses the study")]
    prepare(worker_process)
    draft(worker_process)
    assert site.status(study_id) is StudyStatus.FAILED
    assert outcomes(site, Stage.DRAFT) == [AttemptOutcome.FAILED]


def test_unexpected_error_fails_its_study_by_class_name_alone_and_no_other(
    site: Site, worker_process: WorkerProcess, reporter: ScriptedReporter
) -> None:
    first, second = site.add_study(), site.add_study()
    reporter.script = [ZeroDivisionError("Canarynova^Ada")]
    prepare(worker_process)
    draft(worker_process)
    assert site.study(first).reason == "ZeroDivisionError"
    assert site.status(second) is StudyStatus.DRAFTED


def test_late_instance_while_drafting_refuses_the_result_and_opens_a_revision(
    site: Site, worker_process: WorkerProcess, reporter: ScriptedReporter
) -> None:
    uid, series = str(generate_uid()), str(generate_uid())
    study_id = site.receive(uid, [slice_dataset(uid, series, i) for i in range(12)])
    site.complete(study_id)
    prepare(worker_process)
    go_on = threading.Event()
    drafting = begin_draft(worker_process, reporter, go_on)
    site.receive(uid, [slice_dataset(uid, series, 12)])
    go_on.set()
    drafting.join(timeout=10)
    assert site.status(study_id) is StudyStatus.RECEIVING
    assert not site.rows(ReportVersion)

    site.complete(study_id)
    prepare(worker_process)
    draft(worker_process)
    assert [version.study_revision for version in site.rows(ReportVersion)] == [2]
    assert reporter.drafted == [12, 13]


def test_requeued_study_gets_a_second_version_beside_the_first(site: Site, worker_process: WorkerProcess) -> None:
    study_id = site.add_study()
    for _ in range(2):
        prepare(worker_process)
        draft(worker_process)
        if len(site.rows(ReportVersion)) == 1:
            site.database.run(lambda session: studies.requeue(session, study_id))
    versions = sorted(site.rows(ReportVersion), key=lambda version: version.number)
    assert [(version.number, version.study_revision) for version in versions] == [(1, 1), (2, 2)]
    assert versions[1].status_time > versions[0].status_time


def test_process_is_deaf_only_when_work_is_due_and_a_slot_is_free(
    site: Site, worker_process: WorkerProcess, reporter: ScriptedReporter
) -> None:
    worker_process._sweeper.close()
    site.add_study()
    prepare(worker_process)
    draft_slots = worker_process.slots[Stage.DRAFT]
    while draft_slots.take():
        pass
    worker_process._sweeper.sweep()
    assert worker_process._sweeper.longest_wait_seconds == 0
    draft_slots.give()
    worker_process._sweeper.sweep()
    time.sleep(0.05)
    assert worker_process._sweeper.longest_wait_seconds >= 0.05
    assert worker_process.hears()


def test_heart_stops_a_draft_whose_lease_was_lost(
    site: Site, worker_process: WorkerProcess, reporter: ScriptedReporter
) -> None:
    study_id = site.add_study()
    prepare(worker_process)
    drafting = begin_draft(worker_process, reporter, threading.Event())  # never set: only the deadline ends the wait
    site.database.run(lambda session: studies.requeue(session, study_id, force=True))
    drafting.join(timeout=worker_process.limits.lease_seconds + 5)
    assert not drafting.is_alive()
    assert site.status(study_id) is StudyStatus.COMPLETE


def test_heart_keeps_the_lease_of_a_draft_that_takes_longer(
    site: Site, worker_process: WorkerProcess, reporter: ScriptedReporter
) -> None:
    study_id = site.add_study()
    prepare(worker_process)
    go_on = threading.Event()
    drafting = begin_draft(worker_process, reporter, go_on)
    first_lease = site.study(study_id).lease_until
    wait_for(lambda: site.study(study_id).lease_until > first_lease)  # type: ignore[operator]
    go_on.set()
    drafting.join(timeout=10)
    assert outcomes(site, Stage.DRAFT) == [AttemptOutcome.DONE]


def test_study_is_given_back_without_an_attempt_when_the_worker_halts(
    site: Site, worker_process: WorkerProcess, reporter: ScriptedReporter
) -> None:
    study_id = site.add_study()
    prepare(worker_process)
    drafting = begin_draft(worker_process, reporter, threading.Event())
    worker_process.stopping.set()
    worker_process.halting.set()
    drafting.join(timeout=10)
    study = site.study(study_id)
    assert (study.status, study.attempts, study.due_at) == (StudyStatus.PREPARED, 0, None)


def test_study_whose_model_broke_its_process_is_quarantined_after_three_processes(
    site: Site, worker_process: WorkerProcess, reporter: ScriptedReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setattr("worker.process.os.kill", lambda process, number: told.append(number))
    worker_process.limits = replace(worker_process.limits, lease_seconds=0.3, max_crashes=3)
    study_id = site.add_study()
    prepare(worker_process)
    for _ in range(3):
        reporter.is_broken = True
        drafting = begin_draft(worker_process, reporter, threading.Event())
        worker_process.leave_if_broken()
        worker_process.stopping.set()
        worker_process.halting.set()
        drafting.join(timeout=10)
        assert site.status(study_id) is StudyStatus.DRAFTING
        wait_for(lambda: (site.study(study_id).lease_until or studies.now()) < studies.now())
        for flag in (worker_process.stopping, worker_process.halting):  # as in the next process
            flag.clear()
    draft(worker_process)
    assert len(told) == 3
    assert site.status(study_id) is StudyStatus.FAILED
    assert outcomes(site, Stage.DRAFT) == [AttemptOutcome.LOST] * 3


def test_doorbell_goes_home_when_every_slot_is_busy_and_its_study_is_drafted_all_the_same(
    site: Site, worker_process: WorkerProcess, reporter: ScriptedReporter
) -> None:
    slots = worker_process.slots[Stage.DRAFT].count
    first = [site.add_study() for _ in range(slots)]
    prepare(worker_process)
    go_on = threading.Event()
    reporter.script = [go_on] * slots
    busy = [threading.Thread(target=draft, args=(worker_process,)) for _ in range(slots)]
    for thread in busy:
        thread.start()
    wait_for(lambda: {site.status(study) for study in first} == {StudyStatus.DRAFTING})
    late = site.add_study()
    prepare(worker_process)
    draft(worker_process)  # returns although nothing is free
    assert site.status(late) is StudyStatus.PREPARED
    go_on.set()
    for thread in busy:
        thread.join(timeout=10)
    assert site.status(late) is StudyStatus.DRAFTED


def send_drafts(worker: WorkerProcess, *, allow_not_clinical: bool = False) -> None:
    """Gives the worker a receiver of drafts."""
    settings = worker.settings
    hl7 = settings.hl7.model_validate(
        {"destinations": [{"name": "ris", "host": "127.0.0.1", "port": 9, "drafts": "R"}]}
    )
    model = settings.model.model_copy(update={"allow_not_clinical": allow_not_clinical})
    worker.means = replace(worker.means, settings=settings.model_copy(update={"hl7": hl7, "model": model}))


@pytest.mark.parametrize(
    ("trained_on", "allowed", "messages"),
    [
        ("nothing", False, 0),
        ("nothing", True, 1),
        ("phantoms", False, 0),
        ("phantoms", True, 1),
        ("patients", False, 1),
    ],
)
def test_draft_of_a_model_that_saw_no_patient_is_stored_and_leaves_only_where_that_is_allowed(
    site: Site,
    worker_process: WorkerProcess,
    reporter: ScriptedReporter,
    trained_on: str,
    allowed: bool,
    messages: int,
) -> None:
    send_drafts(worker_process, allow_not_clinical=allowed)
    reporter.trained_on = trained_on
    study_id = site.add_study()
    prepare(worker_process)
    draft(worker_process)
    assert site.status(study_id) is StudyStatus.DRAFTED
    assert len(site.rows(ReportVersion)) == 1
    assert len(site.rows(Message)) == messages
    event = site.rows(AuditEvent, AuditEvent.action == "draft")[0]
    assert event.detail["withheld"] == ("" if messages else "model trained on no patient")


def test_study_without_patient_id_is_drafted_though_no_message_can_be_written(
    site: Site, worker_process: WorkerProcess
) -> None:
    send_drafts(worker_process)
    study_id = site.add_study(patient_identifier="")
    prepare(worker_process)
    draft(worker_process)
    assert site.status(study_id) is StudyStatus.DRAFTED
    assert not site.messages()
    (event,) = site.rows(AuditEvent, AuditEvent.action == "draft")
    assert "PID-3" in event.detail["unwritable"]["ris"]


def any_of(**elements: Any) -> list[Any]:
    uid, series = str(generate_uid()), str(generate_uid())
    return [slice_dataset(uid, series, i, **elements) for i in range(12)]


def test_study_with_nothing_to_report_is_skipped_with_the_reason_of_every_series(
    site: Site, worker_process: WorkerProcess
) -> None:
    datasets = any_of(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    study_id = site.receive(datasets[0].StudyInstanceUID, datasets)
    site.complete(study_id)
    prepare(worker_process)
    study = site.study(study_id)
    assert study.status is StudyStatus.SKIPPED
    assert study.choice is not None
    assert [series["cause"] for series in study.choice["series"]] == ["kind"]


def test_study_that_makes_no_volume_fails_with_reason_and_choice(site: Site, worker_process: WorkerProcess) -> None:
    datasets = any_of()
    for dataset in datasets:
        del dataset.RescaleSlope
        dataset.PixelData = dataset.PixelData[:100]
    study_id = site.receive(datasets[0].StudyInstanceUID, datasets)
    site.complete(study_id)
    prepare(worker_process)
    study = site.study(study_id)
    assert (study.status, study.failed_stage) == (StudyStatus.FAILED, "prepare")
    assert study.choice is not None


def test_missing_file_is_retried_not_failed(site: Site, patient_process: WorkerProcess) -> None:
    study_id = site.add_study()
    next(site.store.rglob("*.dcm")).unlink()
    prepare(patient_process)
    study = site.study(study_id)
    assert (study.status, study.attempts) == (StudyStatus.COMPLETE, 1)
