"""Storage commitment with pynetdicom as the modality."""

import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from pydicom import Dataset
from pydicom.uid import generate_uid
from pynetdicom import AE, build_context, build_role, evt
from pynetdicom.association import Association

from dicom_listener import commitment
from dicom_listener.commitment import ALL_COMMITTED, SOME_FAILED, WELL_KNOWN_INSTANCE, CommitmentService, Report
from dicom_listener.negotiation import COMMITMENT_CLASS
from dicom_listener.statuses import Status
from dicom_listener.storage import Store
from tests.conftest import free_port
from tests.core.builders import arrival
from tests.dicom_listener.conftest import Certificates, Running
from tests.dicom_listener.sending import ct, eventually, send
from worker.core import arrivals
from worker.core.database import Database
from worker.core.records import Commitment, CommitmentState, Instance, Study, new_id
from worker.core.settings import DicomSettings, Peer

CT = "1.2.840.10008.5.1.4.1.1.2"


class Modality:
    """Asks for commitment and hears the reports."""

    def __init__(self) -> None:
        self.reports: list[tuple[int, Dataset]] = []
        self._server: Any = None

    def heard(self, event: evt.Event) -> tuple[int, None]:
        self.reports.append((event.event_type, event.event_information))
        return 0x0000, None

    def ask(self, port: int) -> Association:
        entity = AE(ae_title="PACS")
        entity.dimse_timeout = entity.acse_timeout = 10
        return entity.associate(
            "127.0.0.1",
            port,
            [build_context(COMMITMENT_CLASS)],
            ae_title="MU2",
            evt_handlers=[(evt.EVT_N_EVENT_REPORT, self.heard)],
        )

    def listen(self, tls: ssl.SSLContext | None = None) -> int:
        entity = AE(ae_title="PACS")
        entity.add_supported_context(COMMITMENT_CLASS, scu_role=False, scp_role=True)
        port = free_port()
        self._server = entity.start_server(
            ("127.0.0.1", port), block=False, ssl_context=tls, evt_handlers=[(evt.EVT_N_EVENT_REPORT, self.heard)]
        )
        return port

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()


@pytest.fixture
def modality() -> Iterator[Modality]:
    made = Modality()
    yield made
    made.close()


def wanted(*items: tuple[str, str]) -> Dataset:
    data = Dataset()
    data.TransactionUID = generate_uid()
    data.ReferencedSOPSequence = []
    for class_uid, instance_uid in items:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = class_uid, instance_uid
        data.ReferencedSOPSequence.append(item)
    return data


def request(association: Association, data: Dataset, action: int = 1) -> int:
    status, _ = association.send_n_action(data, action, COMMITMENT_CLASS, WELL_KNOWN_INSTANCE)
    return status.get("Status", -1)


def states(running: Running) -> list[CommitmentState]:
    with running.sent.database.read() as session:
        return list(session.scalars(sa.select(Commitment.state)))


def test_commitment_is_not_offered_by_default(running: Running, modality: Modality) -> None:
    association = modality.ask(running.port)
    assert association.accepted_contexts == []
    association.release()


def test_stored_instances_are_confirmed_on_the_same_association_and_marked(
    start: Callable[..., Running], modality: Modality
) -> None:
    running = start(storage_commitment=True)
    images = [ct(), ct()]
    send(running.port, images)
    association = modality.ask(running.port)
    data = wanted(*((CT, i.SOPInstanceUID) for i in images))
    assert request(association, data) == Status.SUCCESS
    ((event_type, report),) = eventually(lambda: modality.reports)
    eventually(lambda: states(running) == [CommitmentState.REPORTED])
    association.release()
    assert (event_type, report.TransactionUID) == (ALL_COMMITTED, data.TransactionUID)
    assert {i.ReferencedSOPInstanceUID for i in report.ReferencedSOPSequence} == {i.SOPInstanceUID for i in images}
    assert [row.committed_at is not None for row in running.sent.instances()] == [True, True]


def test_what_is_not_here_is_reported_as_failed_with_its_reason(
    start: Callable[..., Running], modality: Modality
) -> None:
    running = start(storage_commitment=True)
    kept, gone = ct(), ct()
    send(running.port, [kept, gone])
    path = next(r.path for r in running.sent.instances() if r.sop_instance_uid == gone.SOPInstanceUID)
    (running.sent.root / path).unlink()
    association = modality.ask(running.port)
    other_class = "1.2.840.10008.5.1.4.1.1.4"
    request(association, wanted((CT, "1.2.3"), (CT, gone.SOPInstanceUID), (other_class, kept.SOPInstanceUID)))
    ((event_type, report),) = eventually(lambda: modality.reports)
    association.release()
    assert event_type == SOME_FAILED
    assert [i.FailureReason for i in report.FailedSOPSequence] == [
        Status.NO_SUCH_OBJECT_INSTANCE,
        Status.NO_SUCH_OBJECT_INSTANCE,
        Status.CLASS_INSTANCE_CONFLICT,
    ]
    assert not any(row.committed_at for row in running.sent.instances())


def test_report_goes_to_the_peers_port_when_it_released_at_once(
    start: Callable[..., Running], modality: Modality, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commitment, "TICK_SECONDS", 0.2)
    port = modality.listen()
    running = start(storage_commitment=True, peers=(Peer(ae_title="PACS", port=port),))
    image = ct()
    send(running.port, [image])
    association = modality.ask(running.port)
    monkeypatch.setattr(commitment.CommitmentService, "take_reports", lambda *_: [])
    assert request(association, wanted((CT, image.SOPInstanceUID))) == Status.SUCCESS
    association.release()
    with running.sent.database.write() as session:
        session.execute(sa.update(Commitment).values(due_at=datetime.now(UTC)))
    ((event_type, _),) = eventually(lambda: modality.reports)
    assert event_type == ALL_COMMITTED
    eventually(lambda: states(running) == [CommitmentState.REPORTED])


def test_instance_that_came_with_two_contents_is_not_promised(
    start: Callable[..., Running], modality: Modality
) -> None:
    running = start(storage_commitment=True)
    image = ct()
    other = ct(image.StudyInstanceUID, SOPInstanceUID=image.SOPInstanceUID)
    assert send(running.port, [image, other]) == [Status.SUCCESS] * 2
    association = modality.ask(running.port)
    assert request(association, wanted((CT, image.SOPInstanceUID))) == Status.SUCCESS
    ((event_type, report),) = eventually(lambda: modality.reports)
    association.release()
    assert event_type == SOME_FAILED
    assert [i.FailureReason for i in report.FailedSOPSequence] == [Status.CLASS_INSTANCE_CONFLICT]
    assert not any(row.committed_at for row in running.sent.instances())


def test_promise_waits_while_retention_holds_the_study(postgres_database: Database, tmp_path: Path) -> None:
    store = Store(tmp_path, 0)
    arrived = replace(arrival(generate_uid()), sop_class_uid=CT)
    store.path(arrived.path).parent.mkdir(parents=True)
    store.path(arrived.path).touch()
    arrivals.record(postgres_database, [arrived])
    service = CommitmentService(DicomSettings(storage_commitment=True), store, postgres_database)
    row = Commitment(id=new_id(), transaction_uid="1.2", items=[[CT, arrived.sop_instance_uid]])
    reports: list[Report] = []
    asking = threading.Thread(
        target=lambda: reports.append(postgres_database.run(lambda session: service._resolve(session, row)))
    )
    with postgres_database.write() as retention:
        retention.execute(sa.select(Study).with_for_update())
        asking.start()
        asking.join(0.5)
        assert not reports
        store.path(arrived.path).unlink()
        retention.execute(sa.update(Instance).values(removed_at=arrived.received_at))
    asking.join(10)
    assert reports[0].event_type == SOME_FAILED


def test_report_goes_by_tls_to_a_peer_that_speaks_it(
    start: Callable[..., Running],
    modality: Modality,
    monkeypatch: pytest.MonkeyPatch,
    certificates: Certificates,
) -> None:
    monkeypatch.setattr(commitment, "TICK_SECONDS", 0.2)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificates.ca)
    server.load_cert_chain(certificates.client, certificates.client_key)
    server.verify_mode = ssl.CERT_REQUIRED
    peer = Peer(ae_title="PACS", port=modality.listen(server), tls=True)
    running = start(storage_commitment=True, peers=(peer,), tls_ca=certificates.ca, **certificates.settings)
    row = {"id": new_id(), "transaction_uid": "1.2.3", "calling_ae": "PACS", "address": "127.0.0.1", "attempts": 0}
    now = datetime.now(UTC)
    with running.sent.database.write() as session:
        session.add(
            Commitment(**row, items=[[CT, "1.2.4"]], state=CommitmentState.WAITING, requested_at=now, due_at=now)
        )
    eventually(lambda: modality.reports)
    eventually(lambda: states(running) == [CommitmentState.REPORTED])


def test_peer_without_a_port_cannot_be_told_later(
    start: Callable[..., Running], modality: Modality, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commitment, "TICK_SECONDS", 0.1)
    running = start(storage_commitment=True)
    monkeypatch.setattr(modality, "heard", lambda _: (0x0110, None))
    association = modality.ask(running.port)
    request(association, wanted((CT, "1.2.3")))
    eventually(lambda: states(running) == [CommitmentState.FAILED])
    association.release()


@pytest.mark.parametrize(
    ("data", "action", "status"),
    [
        (wanted((CT, "../../etc")), 1, Status.INVALID_ATTRIBUTE_VALUE),
        (wanted(), 1, Status.NO_SUCH_ARGUMENT),
        (wanted((CT, "1.2.3")), 2, Status.NO_SUCH_ACTION),
    ],
    ids=["a path for a UID", "no reference", "another action"],
)
def test_requests_that_make_no_sense_have_their_status(
    start: Callable[..., Running], modality: Modality, data: Dataset, action: int, status: Status
) -> None:
    running = start(storage_commitment=True)
    association = modality.ask(running.port)
    assert request(association, data, action) == status
    association.release()
    assert states(running) == []


def test_store_and_commitment_work_on_one_association(start: Callable[..., Running], modality: Modality) -> None:
    running = start(storage_commitment=True)
    image = ct()
    entity = AE(ae_title="PACS")
    association = entity.associate(
        "127.0.0.1",
        running.port,
        [build_context(COMMITMENT_CLASS), build_context(CT, image.file_meta.TransferSyntaxUID)],
        ae_title="MU2",
        ext_neg=[build_role(COMMITMENT_CLASS, scu_role=True)],
        evt_handlers=[(evt.EVT_N_EVENT_REPORT, modality.heard)],
    )
    assert association.send_c_store(image).Status == Status.SUCCESS
    assert request(association, wanted((CT, image.SOPInstanceUID))) == Status.SUCCESS
    assert eventually(lambda: modality.reports)[0][0] == ALL_COMMITTED
    association.release()
