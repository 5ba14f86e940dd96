"""A marked patient goes through everything, errors included; the marks may stand in database, store and ORU only."""

import base64
import logging
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path

import pytest
import structlog
from pydicom import Dataset, dcmread
from typer.testing import CliRunner

from tests.end_to_end.running_services import Services, processes_of, save, settings, write_study
from tests.worker.hospital_site import CANARY, wait_for
from worker import queues
from worker.cli import app
from worker.core import settings as settings_module
from worker.core.records import AuditEvent, Message, MessageState, Study, StudyStatus
from worker.delivery.mllp_receiver import Behaviour, MllpReceiver
from worker.services import environment, services, with_chosen_ports

MARKS = {
    "PatientName": f"{CANARY}^Ada",
    "PatientID": f"{CANARY}-ID-77",
    "AccessionNumber": f"{CANARY}-ACC",
    "StudyDescription": f"CT of {CANARY}",
    "SeriesDescription": f"{CANARY} axial",
    "ReferringPhysicianName": f"{CANARY}^Referrer",
    "RequestingPhysician": f"{CANARY}^Asker",
    "AdmissionID": f"{CANARY}-VISIT",
    "PatientBirthDate": "19031217",
}
MAY_HOLD_PATIENTS = ("mu2.sqlite", "store")
"""What lies under MU2_HOME and is the patient's record itself."""


READING = (
    ("doctor", "--json"),
    ("doctor",),
    ("queue", "status"),
    ("study", "list"),
    ("message", "list"),
    ("audit", "verify"),
    ("retention", "run", "--dry-run"),
)
"""What a person of the IT department types who has not asked for a patient."""


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Services, MllpReceiver]]:
    """All services, the worker with the events that Flower reads; the receiver's first answer quotes the patient."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    with MllpReceiver(script=[Behaviour.AE], text=f"patient {CANARY} unknown") as receiver:
        destination = {"name": "ris", "host": "127.0.0.1", "port": receiver.port, "drafts": "R"}
        config = with_chosen_ports(
            settings(tmp_path / "home", hl7={"destinations": [destination], "backoff_seconds": 0.2})
        )
        ours = [
            replace(one, command=(*one.command, "-E")) if one.name == "worker" else one
            for one in services(config, review=False)
        ]
        started = Services.start(config, ours)
        yield started, receiver
        started.stop()


def write_marked_study(folder: Path, **options: int) -> str:
    """A study whose every text bears the mark; returns its Study Instance UID."""
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = CANARY[:16], "99SITE", f"CT of {CANARY}"
    request = Dataset()
    request.ReasonForTheRequestedProcedure, request.RequestedProcedureCodeSequence = f"{CANARY} coughs", [code]
    return write_study(folder, **options, **MARKS, RequestAttributesSequence=[request])


def uids_in(folder: Path) -> set[bytes]:
    """The UIDs of study, series and instances below a folder."""
    found = [dcmread(path, stop_before_pixels=True) for path in folder.rglob("*") if path.is_file()]
    return {uid.encode() for d in found for uid in (d.StudyInstanceUID, d.SeriesInstanceUID, d.SOPInstanceUID)}


def write_broken_study(folder: Path) -> str:
    """A marked study whose every slice breaks off inside its pixels."""
    uid = write_marked_study(folder)
    for path in folder.iterdir():
        dataset = dcmread(path)
        dataset.PixelData = dataset.PixelData[:100]
        save(dataset, path)
    return uid


@contextmanager
def overheard(broker_socket: Path) -> Iterator[bytearray]:
    """Every command that the broker is given meanwhile, whatever becomes of it: tasks, events, their acknowledgements."""
    heard = bytearray()
    with socket.socket(socket.AF_UNIX) as spy:
        spy.connect(str(broker_socket))
        spy.sendall(b"MONITOR\r\n")

        def listen() -> None:
            while piece := spy.recv(65_536):
                heard.extend(piece)

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        yield heard
        spy.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def unwrapped(content: bytes) -> bytes:
    """The content and what Celery wraps in it as Base64, the arguments of tasks above all."""
    wrapped = re.findall(rb"[A-Za-z0-9+/]{12,}={0,2}", content)
    return content + b"\n".join(base64.b64decode(one) for one in wrapped if len(one) % 4 == 0)


PAGES = ("/metrics", "/livez", "/readyz", "/nothing")


def page(port: int, path: str) -> bytes:
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", path)
    return connection.getresponse().read()


def what_commands_say(config: settings_module.Settings, *more: tuple[str, ...]) -> dict[str, bytes]:
    """What `mu2` writes to both streams, by command."""
    said = {}
    handlers, configured = list(logging.getLogger().handlers), structlog.get_config()
    for command in (*READING, *more):
        settings_module.current.cache_clear()
        result = CliRunner(env={**environment(config, {}), "COLUMNS": "250"}).invoke(app, list(command))
        said[" ".join(command)] = result.output.encode() + repr(result.exception).encode()
    logging.getLogger().handlers[:] = handlers
    structlog.configure(**configured)
    settings_module.current.cache_clear()
    queues._doorbell.cache_clear()
    return said


def test_a_marked_patient_is_found_in_database_store_and_oru_only(
    running: tuple[Services, MllpReceiver], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    site, receiver = running
    config = site.settings
    good, skipped = write_marked_study(tmp_path / "good"), write_marked_study(tmp_path / "few", slices=3)
    broken = write_broken_study(tmp_path / "broken")
    with overheard(config.broker_socket) as heard:
        for name in ("good", "few", "broken"):
            site.send(tmp_path / name)
        study = site.wait_for_status(good, StudyStatus.DRAFTED)
        site.wait_for_status(skipped, StudyStatus.SKIPPED)
        site.wait_for_status(broken, StudyStatus.FAILED)
        acknowledged = Message.state == MessageState.ACKNOWLEDGED
        message = wait_for(lambda: site.rows(Message, acknowledged), what="acknowledgement")[0]
    broker_saw = unwrapped(bytes(heard))
    processes = processes_of(config.home)
    asked = what_commands_say(config, ("study", "show", study.id))
    pages = [page(port, path) for port in (config.dicom.metrics_port, config.worker.metrics_port) for path in PAGES]
    marks = [CANARY.encode(), b"19031217", b"1903-12-17"]
    marks += [uid for name in ("good", "few", "broken") for uid in uids_in(tmp_path / name)]

    seen = {"broker": broker_saw, "pages": b"".join(pages), "processes": "".join(processes).encode(), **asked}
    assert [name for name, content in seen.items() if has(marks, content)] == []
    assert leaking_files(config.home, marks) == []
    assert leaking_files(tmp_path / "temporary", marks) == []
    assert not has(marks, "".join(capfd.readouterr()).encode())
    assert not has(marks, b"".join(str(row.detail).encode() for row in site.rows(AuditEvent)))
    assert not has(marks, b"".join(row.reason.encode() for row in site.rows(Study)))
    # the marks were really there to be found, and where they might have been was really looked at
    assert study.id.encode() in broker_saw and b"task-received" in broker_saw
    assert f"|{CANARY[:16]}^CT of {CANARY}^99SITE|".encode() in message.payload  # OBR-4
    assert f"|^{CANARY} coughs".encode() in message.payload  # OBR-31
    assert any("celery" in command for command in processes)
    assert {name for name, said in asked.items() if study.id[:8].encode() in said} >= {
        "study list",
        "message list",
        f"study show {study.id}",
    }, asked
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
