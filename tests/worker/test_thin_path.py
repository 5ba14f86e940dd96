"""The main job of the worker, with real processes: a complete study becomes a draft and an acknowledged ORU."""

import time

from tests.worker.hospital_site import Site, wait_for
from worker import queues
from worker.core.records import Lease, MessageState, StudyStatus
from worker.delivery.mllp_receiver import MllpReceiver


def test_complete_study_becomes_a_draft_and_an_acknowledged_oru_within_seconds(
    site: Site, receiver: MllpReceiver
) -> None:
    site.deliver_to({"name": "ris", "host": "127.0.0.1", "port": receiver.port, "drafts": "R"})
    site.environment["MU2_QUEUE__SWEEP_SECONDS"] = "30"  # only doorbells can be this quick
    site.start_worker()
    wait_for(lambda: site.rows(Lease))  # the first sweep is over, and the next one far off
    study_id = site.add_study()
    started = time.monotonic()
    site.doorbell().ring(queues.PREPARE, study_id)
    assert receiver.wait_for(1, seconds=20)
    assert time.monotonic() - started < 10

    wait_for(lambda: [m.state for m in site.messages()] == [MessageState.ACKNOWLEDGED])
    assert site.status(study_id) is StudyStatus.DRAFTED
    assert [m.control_id for m in receiver.received] == [m.control_id for m in site.messages()]
    assert b"Canned text of the fake reporter" in receiver.received[0].payload
