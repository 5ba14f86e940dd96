"""The worker on PostgreSQL: separate machines share the work, and a server that is gone for seconds loses nothing."""

import time
from collections import Counter

import pytest

from tests.postgres import PostgresServer
from tests.worker.hospital_site import Site, wait_for
from worker.core.database import Database
from worker.core.records import MessageState, ReportVersion, StudyStatus
from worker.delivery.mllp_receiver import MllpReceiver


@pytest.fixture
def site_database(postgres_database: Database) -> Database:
    """A database on the server."""
    return postgres_database


def test_workers_of_separate_queues_draft_and_deliver_each_study_once(site: Site, receiver: MllpReceiver) -> None:
    site.deliver_to({"name": "ris", "host": "127.0.0.1", "port": receiver.port, "drafts": "R"})
    study_ids = [site.add_study() for _ in range(8)]
    for served in ("prepare,deliver", "draft", "prepare,draft,deliver"):
        site.start_worker("-Q", served, ready=False)
    for study_id in study_ids:
        site.wait_for_status(study_id, StudyStatus.DRAFTED, seconds=40)
    wait_for(lambda: {m.state for m in site.messages()} == {MessageState.ACKNOWLEDGED})
    assert len(site.rows(ReportVersion)) == 8
    assert Counter(m.control_id for m in receiver.received) == {m.control_id: 1 for m in site.messages()}


def test_database_server_gone_for_seconds_loses_nothing(
    site: Site, postgres: PostgresServer, receiver: MllpReceiver
) -> None:
    site.deliver_to({"name": "ris", "host": "127.0.0.1", "port": receiver.port, "drafts": "R"})
    worker = site.start_worker()
    study_ids = [site.add_study(slices=40, side=256) for _ in range(3)]
    wait_for(lambda: site.status(study_ids[0]) is not StudyStatus.COMPLETE)
    postgres.kill()
    time.sleep(5)
    postgres.start()
    for study_id in study_ids:
        site.wait_for_status(study_id, StudyStatus.DRAFTED, seconds=40)
    wait_for(lambda: {m.state for m in site.messages()} == {MessageState.ACKNOWLEDGED})
    assert worker.process.poll() is None
    assert len(site.rows(ReportVersion)) == 3
    assert len({m.control_id for m in receiver.received}) == 3
