"""Evidence on request: found by the model that drafted, stored with the sentences, or refused with a reason."""

import shutil
from datetime import timedelta

import numpy as np
import pytest
from sqlalchemy.orm import Session

from tests.worker.hospital_site import Site, wait_for
from worker import evidence, tasks
from worker.core import studies
from worker.core.notices import UNTRAINED
from worker.core.records import AuditEvent, ReportVersion, Role, Sentence, Stage, Study, User
from worker.core.review_records import EvidenceRequest
from worker.imaging import heat
from worker.inference.mu2 import untrained_checkpoint
from worker.inference.reporter import Explained
from worker.process import WorkerProcess


@pytest.fixture
def drafted(site: Site, worker_process: WorkerProcess) -> str:
    """The version of a drafted study."""
    site.add_study()
    for stage in Stage:
        tasks.answer(worker_process, stage, "task")
    return site.rows(ReportVersion)[0].id


def ask(site: Site, version_id: str, *, ago: timedelta = timedelta(0)) -> None:
    """A reader asks."""
    at = studies.now()
    reader = User(username="reader", role=Role.RADIOLOGIST, created_at=at)
    request = EvidenceRequest(version_id=version_id, requested_at=at - ago)

    def add(session: Session) -> None:
        session.add(reader)
        session.flush()
        request.requested_by = reader.id
        session.add(request)

    site.database.run(add)


def request(site: Site) -> EvidenceRequest:
    return site.rows(EvidenceRequest)[0]


class TestWithTheModel:
    @pytest.fixture
    def site(self, site: Site) -> Site:
        site.environment |= {
            "MU2_MODEL__REPORTER": "mu2",
            "MU2_MODEL__PATH": str(untrained_checkpoint(site.home)),
            "MU2_MODEL__DEVICE": "cpu",
        }
        return site

    def test_every_sentence_of_the_model_gets_a_heat_volume_in_patient_space(
        self, site: Site, worker_process: WorkerProcess, drafted: str
    ) -> None:
        ask(site, drafted)
        tasks.answer_evidence(worker_process)
        assert request(site).done_at is not None
        assert request(site).reason == ""
        written = [row for row in site.rows(Sentence) if row.text != UNTRAINED]
        assert written
        for row in written:
            assert row.evidence is not None
            assert row.support is not None
            found = heat.load(site.store / row.evidence)
            assert found.heat.min() >= 0
            assert found.heat.sum() == pytest.approx(1, abs=1e-3)
            assert found.volume == 1
        assert [e.detail["sentences"] for e in site.rows(AuditEvent, AuditEvent.action == "evidence")] == [len(written)]

    def test_draft_of_another_model_is_refused_with_advice(
        self, site: Site, worker_process: WorkerProcess, drafted: str
    ) -> None:
        ask(site, drafted)
        worker_process.reporter.weights_sha256 = "0" * 64  # type: ignore[misc]
        tasks.answer_evidence(worker_process)
        assert "another model" in request(site).reason


def test_reader_is_told_that_canned_text_has_no_evidence(
    site: Site, worker_process: WorkerProcess, drafted: str
) -> None:
    ask(site, drafted)
    tasks.answer_evidence(worker_process)
    assert request(site).reason == "ModelError: the fake reporter looks at nothing, so there is no evidence"


def test_support_is_the_drop_over_what_random_patches_give(
    site: Site, worker_process: WorkerProcess, drafted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    heat_volume = np.full((2, 2, 2), 0.125, np.float32)
    explained = [
        Explained(1, row.region, row.text, heat_volume, np.diag([20.0, 20.0, 20.0, 1.0]), support=0.5, control=0.4)
        for row in site.rows(Sentence)
    ]
    monkeypatch.setattr(worker_process.reporter, "explain", lambda volumes, deadline: explained)
    ask(site, drafted)
    tasks.answer_evidence(worker_process)
    assert [row.support for row in site.rows(Sentence)] == [pytest.approx(0.1)] * len(explained)


def test_two_workers_never_answer_one_request(site: Site, drafted: str) -> None:
    ask(site, drafted)
    first, second = (site.database.run(lambda session: evidence.claim(session, "worker", 60)) for _ in range(2))
    assert first is not None
    assert second is None


def test_evidence_is_sought_in_the_very_input_of_the_draft_when_the_study_has_a_newer_one(
    site: Site, worker_process: WorkerProcess, drafted: str
) -> None:
    (study,) = site.rows(Study)
    assert study.model_input is not None
    left_over = site.store / study.model_input
    shutil.copytree(left_over, left_over.with_name("f" * 32))  # of a worker that lost its lease
    site.database.run(lambda session: studies.requeue(session, study.id))
    tasks.answer(worker_process, Stage.PREPARE, "task")
    ask(site, drafted)
    claimed = site.database.run(lambda session: evidence.claim(session, "worker", 60))
    assert claimed is not None
    assert claimed.folder == study.model_input


def test_request_that_nobody_could_answer_for_a_day_is_refused(site: Site, drafted: str) -> None:
    ask(site, drafted, ago=timedelta(days=2))
    assert site.database.run(lambda session: evidence.claim(session, "worker", 60)) is None
    assert request(site).reason.startswith("no worker could answer within a day")


def test_sweep_rings_for_a_request(site: Site, drafted: str, worker_process: WorkerProcess) -> None:
    site.start_worker()
    ask(site, drafted)
    wait_for(lambda: request(site).done_at)
