"""What an operator and an auditor see of a worker: health, metrics, logs, heartbeat; and that no patient is in them."""

import json
import socket
import urllib.error
import urllib.request

import redis

from tests.worker.hospital_site import CANARY, Site, wait_for
from worker import queues
from worker.core.records import Heartbeat, Instance, Lease, MessageState, Study, StudyStatus
from worker.delivery.mllp_receiver import MllpReceiver


def ask(port: int, path: str) -> tuple[int, str]:
    """Status and body of one page of the worker's port."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_worker_tells_its_health_and_logs_and_counts_what_it_did(site: Site, receiver: MllpReceiver) -> None:
    site.deliver_to({"name": "ris", "host": "127.0.0.1", "port": receiver.port, "drafts": "R"})
    study_id = site.add_study()
    worker = site.start_worker()
    port = worker.wait_for_event("worker_started")["port"]
    ended = wait_for(lambda: worker.events("stage_ended") if len(worker.events("stage_ended")) == 2 else [])
    assert {line["study_id"] for line in ended} == {study_id}
    assert all(line["task_id"] and line["service"] == "worker" for line in ended)
    wait_for(lambda: "mu2_messages_total{" in ask(port, "/metrics")[1])
    metrics = ask(port, "/metrics")[1]
    assert ask(port, "/livez")[0] == 200
    assert 'mu2_stage_outcomes_total{outcome="done",stage="prepare"} 1.0' in metrics
    assert 'mu2_stage_outcomes_total{outcome="done",stage="draft"} 1.0' in metrics
    assert 'mu2_stage_seconds_count{stage="draft"} 1.0' in metrics
    assert 'mu2_messages_total{destination="ris",outcome="sent"} 1.0' in metrics

    assert ask(port, "/readyz")[0] == 200
    site.broker.kill()
    status, body = ask(port, "/readyz")
    assert (status, json.loads(body)) == (503, {"database": True, "broker": False, "claims": True})


def test_worker_that_finds_its_metrics_port_taken_names_port_and_setting(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        worker = site.start_worker(ready=False, MU2_WORKER__METRICS_PORT=str(port))
        sentence = f"cannot listen on 127.0.0.1 port {port} (Address already in use)"
        wait_for(lambda: sentence in worker.output)
    assert "MU2_WORKER__METRICS_PORT" in worker.output


def test_worker_keeps_a_heartbeat_and_one_holds_the_sweep(site: Site) -> None:
    site.start_worker(ready=False)
    site.start_worker(ready=False)
    wait_for(lambda: len(site.rows(Heartbeat)) == 2)
    names = {row.owner: row.queues for row in site.rows(Heartbeat)}
    assert set(names.values()) == {"prepare,draft,deliver"}
    (lease,) = wait_for(lambda: site.rows(Lease))
    assert lease.owner in names
    holder = next(w for w in site.workers if w.events("worker_started")[0]["worker"] == lease.owner)
    holder.kill()
    wait_for(lambda: site.rows(Lease)[0].owner != lease.owner)


def test_no_patient_is_in_logs_metrics_or_the_broker(site: Site, receiver: MllpReceiver) -> None:
    site.deliver_to({"name": "ris", "host": "127.0.0.1", "port": receiver.port, "drafts": "R"})
    doorbell = site.doorbell()
    drafted, failed = site.add_study(), site.add_study()
    next(path for path in site.store.rglob("*.dcm") if site.owns(failed, path)).write_bytes(b"Canarynova is no DICOM")
    for study_id in (drafted, failed):
        doorbell.ring(queues.PREPARE, study_id)
    with redis.Redis(unix_socket_path=str(site.broker.socket_path)) as client:
        payloads = client.lrange("prepare", 0, -1)
    assert len(payloads) == 2
    worker = site.start_worker()
    site.wait_for_status(drafted, StudyStatus.DRAFTED)
    wait_for(lambda: site.status(failed) not in {StudyStatus.COMPLETE, StudyStatus.PREPARING})
    wait_for(lambda: [m.state for m in site.messages()][:1] == [MessageState.ACKNOWLEDGED])
    metrics = ask(worker.events("worker_started")[0]["port"], "/metrics")[1]
    worker.stop()
    appended = b"".join(path.read_bytes() for path in site.broker.socket_path.parent.rglob("*") if path.is_file())

    study = site.rows(Study)[0]
    secrets = [CANARY, study.study_instance_uid, study.accession, *[i.sop_instance_uid for i in site.rows(Instance)]]
    assert CANARY.encode() in receiver.received[0].payload  # the canary sings where it may
    for secret in secrets:
        assert secret not in worker.output
        assert secret not in metrics
        assert secret.encode() not in b"".join(payloads)
        assert secret.encode() not in appended
