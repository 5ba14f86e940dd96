"""The main job of the worker, with real processes: a complete study becomes a draft and an acknowledged ORU."""

from tests.worker.hospital_site import Site, wait_for
from worker import queues
from worker.core.records import MessageState, StudyStatus
from worker.delivery.mllp_receiver import MllpReceiver


def test_complete_study_becomes_a_draft_and_an_acknowledged_oru(site: Site, receiver: MllpReceiver) -> None:
    site.deliver_to({"name": "ris", "host": "127.0.0.1", "port": receiver.port, "drafts": "R"})
    site.start_worker()
    study_id = site.add_study()
    site.doorbell().ring(queues.PREPARE, study_id)

    site.wait_for_status(study_id, StudyStatus.DRAFTED)
    wait_for(lambda: [m.state for m in site.messages()] == [MessageState.ACKNOWLEDGED])
    assert [m.control_id for m in receiver.received] == [m.control_id for m in site.messages()]
    assert b"Canned text of the fake reporter" in receiver.received[0].payload
