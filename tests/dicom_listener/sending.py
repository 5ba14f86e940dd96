"""Objects to send, senders, and a look at what a listener kept."""

import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydicom import FileDataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE, build_context
from pynetdicom.association import Association
from pynetdicom.pdu import A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import A_ASSOCIATE, ImplementationClassUIDNotification, MaximumLengthNotification

from dicom_listener import part10
from worker.core.database import Database
from worker.core.records import Instance, Study
from worker.core.settings import Settings

VERIFICATION = "1.2.840.10008.1.1"


class Sent:
    """What a listener kept of what was sent to it."""

    def __init__(self, listener: Any, settings: Settings) -> None:
        self._listener = listener
        self.root = settings.store_root
        self.database = Database.from_settings(settings)

    def instances(self) -> list[Instance]:
        with self.database.read() as session:
            return list(session.scalars(sa.select(Instance).order_by(Instance.received_at)))

    def studies(self) -> list[Study]:
        with self.database.read() as session:
            return list(session.scalars(sa.select(Study)))

    def files(self) -> list[Path]:
        return sorted((self.root / "instances").rglob("*.dcm"))

    def counted(self, name: str, **labels: str) -> float:
        return self._listener.metrics.registry.get_sample_value(name, labels) or 0.0


def ct(study_uid: str = "", **changes: Any) -> FileDataset:
    """A small CT image; keywords set or, with None, remove attributes."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, generate_uid()
    image.StudyInstanceUID = study_uid or generate_uid()
    image.SeriesInstanceUID = f"{image.StudyInstanceUID[:60]}.1"
    image.PatientID, image.PatientName, image.PatientSex = "MRN-1", "DOE^JANE", "F"
    image.PatientBirthDate, image.StudyDate, image.StudyTime = "19500102", "20250304", "050607.08"
    image.Modality, image.AccessionNumber, image.StudyDescription = "CT", "A-1", "CT Chest"
    image.SeriesNumber, image.InstanceNumber = 2, 1
    image.Rows = image.Columns = 16
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 12, 11, 0
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.PixelData = generate_uid().encode().ljust(512, b"\0")
    for keyword, value in changes.items():
        if value is None:
            delattr(image, keyword)
        else:
            setattr(image, keyword, value)
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
    return image


def connect(
    port: int,
    objects: Iterable[Any] = (),
    *,
    called: str = "MU2",
    calling: str = "PACS",
    patience_seconds: float = 20,
    **options: Any,
) -> Association:
    """An association that proposes what `objects` need (data sets, files), or a CT image and an echo."""
    entity = AE(ae_title=calling)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = patience_seconds
    pairs = {(str(CTImageStorage), str(ExplicitVRLittleEndian))}
    for item in objects:
        header = dcmread(item, stop_before_pixels=True, force=True) if isinstance(item, Path) else item
        pairs.add((str(header.file_meta.MediaStorageSOPClassUID), str(header.file_meta.TransferSyntaxUID)))
    contexts = [build_context(sop_class, syntax) for sop_class, syntax in sorted(pairs)]
    return entity.associate("127.0.0.1", port, [*contexts, build_context(VERIFICATION)], ae_title=called, **options)


def send(port: int, objects: Iterable[Any], **options: Any) -> list[int]:
    """Statuses of one C-STORE each, over one association."""
    items = list(objects)
    association = connect(port, items, **options)
    assert association.is_established
    statuses = [association.send_c_store(item).get("Status", -1) for item in items]
    association.release()
    return statuses


def echo(port: int, **options: Any) -> bool:
    """Whether a C-ECHO is answered with success."""
    association = connect(port, **options)
    if not association.is_established:
        return False
    status = association.send_c_echo().get("Status", -1)
    association.release()
    return bool(status == 0)


def data_set_bytes(path: Path) -> bytes:
    """The bytes behind the file header of a DICOM file, wherever it came from."""
    held = part10.read_file(path)
    return path.read_bytes()[held.offset :]


def eventually(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """The condition's value once it is true; fails when that takes longer than `seconds`."""
    limit = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < limit, "it did not come to pass in time"
        time.sleep(0.02)
    return value


def request_pdu(
    called: str = "MU2", calling: str = "PACS", contexts: Iterable[tuple[str, list[str]]] = (), max_pdu: int = 16_384
) -> bytes:
    """The bytes of an A-ASSOCIATE-RQ."""
    primitive = A_ASSOCIATE()
    primitive.application_context_name = "1.2.840.10008.3.1.1.1"
    primitive.called_ae_title, primitive.calling_ae_title = called, calling
    proposed = []
    for number, (abstract, syntaxes) in enumerate(contexts or [(CTImageStorage, [ExplicitVRLittleEndian])]):
        context = build_context(abstract, syntaxes)
        context.context_id = 2 * number + 1
        proposed.append(context)
    primitive.presentation_context_definition_list = proposed
    length = MaximumLengthNotification()
    length.maximum_length_received = max_pdu
    implementation = ImplementationClassUIDNotification()
    implementation.implementation_class_uid = "1.2.3.4"
    primitive.user_information = [length, implementation]
    return A_ASSOCIATE_RQ(primitive).encode()


class RawPeer:
    """A peer that sends what bytes it likes."""

    def __init__(self, port: int, *, associate: bool = True) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        if associate:
            self.socket.sendall(request_pdu())
            assert self.read_pdu()[0] == 2, "association was not accepted"

    def __enter__(self) -> "RawPeer":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def read_pdu(self) -> tuple[int, bytes]:
        """Type and body of the next PDU; type 0 at the end of the connection."""
        header = self._exactly(6)
        if len(header) < 6:
            return 0, b""
        kind, length = struct.unpack(">BxI", header)
        return kind, self._exactly(length)

    def _exactly(self, count: int) -> bytes:
        data = BytesIO()
        while data.tell() < count:
            try:
                block = self.socket.recv(count - data.tell())
            except ConnectionResetError:
                break
            if not block:
                break
            data.write(block)
        return data.getvalue()


@contextmanager
def silent(port: int, count: int, first_words: bytes = b"") -> Iterator[list[socket.socket]]:
    """`count` clients that say `first_words` and then nothing."""
    with ExitStack() as stack:
        clients = []
        for _ in range(count):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
            client.sendall(first_words)
            clients.append(client)
        yield clients


def store_command(context: int = 1) -> bytes:
    """A P-DATA-TF PDU with a whole C-STORE-RQ command set."""
    elements = [
        (0x0002, b"1.2.840.10008.5.1.4.1.1.2\0"),
        (0x0100, b"\1\0"),
        (0x0110, b"\1\0"),
        (0x0700, b"\2\0"),
        (0x0800, b"\1\0"),
        (0x1000, b"1.2.3\0"),
    ]
    command = b"".join(struct.pack("<HHI", 0, element, len(value)) + value for element, value in elements)
    pdv = struct.pack(">IBB", len(command) + 2, context, 3) + command
    return struct.pack(">BxI", 4, len(pdv)) + pdv
