"""A small C-STORE SCU: sends a folder of DICOM files by real associations, exactly as the files are.

Data sets are not decoded or encoded again, so pixels travel in the transfer syntax they are stored in.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydicom import dcmread
from pydicom.errors import InvalidDicomError
from pydicom.uid import MediaStorageDirectoryStorage
from pynetdicom import AE, _config
from pynetdicom.association import Association
from pynetdicom.presentation import build_context

from worker.core.errors import DeliveryUnavailableError, InvalidObjectError
from worker.core.report import Phi
from worker.demo.study import TRUTH_NAME

MOST_CONTEXTS = 128  # of one association (PS3.8 section 9.3.2.2)
MAX_PDU_BYTES = 262_144
SUCCESS = 0x0000
_HEADER_TAGS = ["StudyInstanceUID", "SOPClassUID"]


@dataclass(frozen=True)
class Outgoing:
    """One file to send."""

    path: Path
    sop_class: str
    transfer_syntax: str
    study_uid: Phi
    size_bytes: int

    @property
    def kind(self) -> tuple[str, str]:
        """What a presentation context is about."""
        return self.sop_class, self.transfer_syntax


@dataclass(frozen=True)
class Folder:
    """What a folder holds."""

    objects: tuple[Outgoing, ...]
    foreign: int  # files that are no DICOM objects
    directories: int  # DICOMDIR files, which are never sent


@dataclass
class Sent:
    """What became of the objects."""

    seconds: float = 0.0
    accepted: int = 0
    bytes: int = 0
    study_uids: set[Phi] = field(default_factory=set)  # of what was accepted
    refused: Counter[str] = field(default_factory=Counter)  # by status and the listener's comment, or by reason


def read_folder(folder: Path) -> Folder:
    """Looks through a folder and the folders below; raises `InvalidObjectError` when there is nothing to send.

    The file that tells the truth about a synthetic study is passed over in silence.
    """
    if not folder.is_dir():
        raise InvalidObjectError(f"{folder} is no folder; name a folder of DICOM files")
    objects, foreign, directories = [], 0, 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != TRUTH_NAME):
        try:
            found = _outgoing(path)
        except InvalidDicomError:
            foreign += 1
            continue
        if found is None:
            directories += 1
        else:
            objects.append(found)
    if not objects:
        raise InvalidObjectError(f"{folder} holds no DICOM object ({foreign} other files)")
    return Folder(tuple(objects), foreign, directories)


def send(
    objects: Sequence[Outgoing],
    host: str,
    port: int,
    *,
    called_ae: str,
    calling_ae: str = "MU2DEMO",
    progress: Callable[[int], None] = lambda done: None,
) -> Sent:
    """Sends the objects, in one association unless they need more presentation contexts than one has.

    Raises `DeliveryUnavailableError` when the listener refuses the association or ends it half way.
    """
    _config.STORE_SEND_CHUNKED_DATASET = True  # straight from the file, neither decoded nor held in memory
    sent = Sent()
    started = time.monotonic()
    done = 0
    for group in _groups(objects):
        association = _associate(group, host, port, called_ae, calling_ae)
        try:
            for outgoing in group:
                _send_one(association, outgoing, sent)
                done += 1
                progress(done)
        finally:
            association.release()
    sent.seconds = time.monotonic() - started
    return sent


def _outgoing(path: Path) -> Outgoing | None:
    """The file as something to send, None for a DICOMDIR; raises `InvalidDicomError` for what is no DICOM file."""
    try:
        with path.open("rb") as file:
            if file.read(132)[128:] != b"DICM":
                raise InvalidDicomError("no DICM prefix")
        header = dcmread(path, stop_before_pixels=True, specific_tags=_HEADER_TAGS)
        meta = header.file_meta
        sop_class, transfer_syntax = str(meta.MediaStorageSOPClassUID), str(meta.TransferSyntaxUID)
    except (AttributeError, EOFError, ValueError, OSError) as error:
        raise InvalidDicomError("the header cannot be read") from error
    if sop_class == MediaStorageDirectoryStorage:
        return None
    study_uid = str(header.get("StudyInstanceUID", ""))
    return Outgoing(path, sop_class, transfer_syntax, study_uid, path.stat().st_size)


def _groups(objects: Sequence[Outgoing]) -> Iterator[list[Outgoing]]:
    """The objects in their order, cut where one association would need too many presentation contexts."""
    group: list[Outgoing] = []
    kinds: set[tuple[str, str]] = set()
    for outgoing in objects:
        if len(kinds | {outgoing.kind}) > MOST_CONTEXTS:
            yield group
            group, kinds = [], set()
        group.append(outgoing)
        kinds.add(outgoing.kind)
    if group:
        yield group


def _associate(group: Sequence[Outgoing], host: str, port: int, called_ae: str, calling_ae: str) -> Association:
    entity = AE(ae_title=calling_ae)
    entity.requested_contexts = [build_context(*kind) for kind in sorted({o.kind for o in group})]
    association = entity.associate(host, port, ae_title=called_ae, max_pdu=MAX_PDU_BYTES)
    if not association.is_established:
        why = "rejected the association" if association.is_rejected else "did not answer the association request"
        raise DeliveryUnavailableError(f"the DICOM listener {why}; see its log")
    return association


def _send_one(association: Association, outgoing: Outgoing, sent: Sent) -> None:
    if not association.is_established:
        raise DeliveryUnavailableError("the DICOM listener ended the association; see its log")
    try:
        answer = association.send_c_store(outgoing.path)
    except (ValueError, AttributeError):
        sent.refused["its kind was not accepted by the listener"] += 1
        return
    status = answer.get("Status")
    if status is None:
        raise DeliveryUnavailableError("the DICOM listener did not answer a C-STORE; see its log")
    if status == SUCCESS:
        sent.accepted += 1
        sent.bytes += outgoing.size_bytes
        sent.study_uids.add(outgoing.study_uid)
    else:
        comment = answer.get("ErrorComment", "")
        sent.refused[f"status 0x{status:04X}" + (f", {comment}" if comment else "")] += 1
