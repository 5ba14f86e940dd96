"""Storage commitment with pynetdicom as the modality."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa
from pydicom import Dataset
from pydicom.uid import generate_uid
from pynetdicom import AE, build_context, build_role, evt
from pynetdicom.association import Association

from dicom_listener import commitment
from dicom_listener.commitment import ALL_COMMITTED, SOME_FAILED, WELL_KNOWN_INSTANCE
from dicom_listener.negotiation import COMMITMENT_CLASS
from dicom_listener.statuses import Status
from tests.conftest import free_port
from tests.dicom_listener.conftest import Running
from tests.dicom_listener.sending import ct, eventually, send
from worker.core.records import Commitment, CommitmentState
from worker.core.settings import Peer

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

    def listen(self) -> int:
        entity = AE(ae_title="PACS")
        entity.add_supported_context(COMMITMENT_CLASS, scu_role=False, scp_role=True)
        port = free_port()
        self._server = entity.start_server(
            ("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_N_EVENT_REPORT, self.heard)]
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
    assert all(row.committed_at for row in running.sent.instances())


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
