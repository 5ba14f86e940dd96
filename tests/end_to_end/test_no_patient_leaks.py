"""A marked patient goes through everything, errors included; the marks may stand in database, store and ORU only."""

import os
import signal
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest
from pydicom import dcmread
from redis import Redis

from tests.end_to_end.running_services import Services, save, settings, write_study
from tests.worker.hospital_site import CANARY, wait_for
from worker import queues
from worker.core.records import AuditEvent, Message, MessageState, Study, StudyStatus
from worker.delivery.mllp_receiver import Behaviour, MllpReceiver
from worker.services import services, with_chosen_ports

MARKS = {
    "PatientName": f"{CANARY}^Ada",
    "PatientID": f"{CANARY}-ID-77",
    "AccessionNumber": f"{CANARY}-ACC",
    "StudyDescription": f"CT of {CANARY}",
    "SeriesDescription": f"{CANARY} axial",
    "ReferringPhysicianName": f"{CANARY}^Referrer",
}
MAY_HOLD_PATIENTS = ("mu2.sqlite", "store")
"""What lies under MU2_HOME and is the patient's record itself."""


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[Services, MllpReceiver]]:
    """All services; the receiver quotes the patient in its first answer, which is an error."""
    with MllpReceiver(script=[Behaviour.AE], text=f"patient {CANARY} unknown") as receiver:
        destination = {"name": "ris", "host": "127.0.0.1", "port": receiver.port, "drafts": "R"}
        config = with_chosen_ports(
            settings(tmp_path / "home", hl7={"destinations": [destination], "backoff_seconds": 0.2})
        )
        started = Services.start(config, services(config, review=False))
        yield started, receiver
        started.stop()


def write_broken_study(folder: Path) -> str:
    """A marked study whose every slice breaks off inside its pixels."""
    uid = write_study(folder, **MARKS)
    for path in folder.iterdir():
        dataset = dcmread(path)
        dataset.PixelData = dataset.PixelData[:100]
        save(dataset, path)
    return uid


def every_value(client: "Redis") -> bytes:
    """Everything that lies in the broker: names and serialised values of all keys."""
    return b"".join(key + (client.dump(key) or b"") for key in client.scan_iter())


def metrics(port: int) -> bytes:
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", "/metrics")
    return connection.getresponse().read()


def test_a_marked_patient_is_found_in_database_store_and_oru_only(
    running: tuple[Services, MllpReceiver], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    site, receiver = running
    config = site.settings
    good, skipped = (
        write_study(tmp_path / "good", **MARKS),
        write_study(tmp_path / "few", slices=3, **MARKS),
    )
    broken = write_broken_study(tmp_path / "broken")
    broker = Redis(unix_socket_path=str(config.broker_socket))

    worker = site.supervisor.pid("worker")
    assert worker is not None
    os.kill(worker, signal.SIGSTOP)
    for name in ("good", "few", "broken"):
        site.send(tmp_path / name)
    waiting = wait_for(lambda: every_value(broker) if broker.llen(queues.PREPARE) else b"", what="a task that waits")
    os.kill(worker, signal.SIGCONT)

    site.wait_for_status(good, StudyStatus.DRAFTED)
    site.wait_for_status(skipped, StudyStatus.SKIPPED)
    site.wait_for_status(broken, StudyStatus.FAILED)
    message = wait_for(lambda: site.rows(Message, Message.state == MessageState.ACKNOWLEDGED), what="acknowledgement")[
        0
    ]
    counted = metrics(config.dicom.metrics_port) + metrics(config.worker.metrics_port)
    marks = [CANARY.encode(), *(uid.encode() for uid in (good, skipped, broken))]

    holds_marks = [name for name, content in {"tasks": waiting, "metrics": counted}.items() if has(marks, content)]
    assert holds_marks == []
    assert leaking_files(config.home, marks) == []
    assert not has(marks, "".join(capfd.readouterr()).encode())
    assert not has(marks, b"".join(str(row.detail).encode() for row in site.rows(AuditEvent)))
    assert not has(marks, b"".join(row.reason.encode() for row in site.rows(Study)))
    # the marks were really there to be found
    assert CANARY.encode() in message.payload and list(receiver.accepted) == [message.control_id]
    assert any(has(marks, path.read_bytes()) for path in config.store_root.rglob("*.dcm"))


def has(marks: list[bytes], content: bytes) -> bool:
    return any(mark in content for mark in marks)


def leaking_files(home: Path, marks: list[bytes]) -> list[str]:
    """Files that hold a mark although they are no record, and paths that bear one."""
    found = []
    for path in (p for p in home.rglob("*") if p.is_file()):
        relative = str(path.relative_to(home))
        content = b"" if relative.startswith(MAY_HOLD_PATIENTS) else path.read_bytes()
        if has(marks, content) or has(marks, relative.encode()):
            found.append(relative)
    return found
