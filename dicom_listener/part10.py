"""The files of the store: what stands before the data set, written and read back (PS3.10 section 7.1)."""

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

from dicom_listener import attributes, elements
from dicom_listener.attributes import Attributes
from dicom_listener.negotiation import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from worker.core.errors import InvalidObjectError

PREAMBLE = bytes(128) + b"DICM"
_META_OFFSET = len(PREAMBLE) + 12  # behind (0002,0000), whose value is the length of the rest
_TRANSFER_SYNTAX, _SOURCE_AE_TITLE = 0x0010, 0x0016
_LONG_META = (b"OB", b"UN", b"OW", b"SQ", b"UT")


def file_meta(sop_class_uid: str, sop_instance_uid: str, transfer_syntax: str, source_ae_title: str = "") -> bytes:
    """Preamble and File Meta Information (PS3.10 section 7.1).

    The sender's AE title stands in it, so that recovery knows whose study it was; empty leaves it out.
    """
    body = b"".join(
        (
            struct.pack("<HH2sHI2s", 2, 1, b"OB", 0, 2, b"\0\1"),
            _meta_element(0x0002, b"UI", sop_class_uid),
            _meta_element(0x0003, b"UI", sop_instance_uid),
            _meta_element(_TRANSFER_SYNTAX, b"UI", transfer_syntax),
            _meta_element(0x0012, b"UI", IMPLEMENTATION_CLASS_UID),
            _meta_element(0x0013, b"SH", IMPLEMENTATION_VERSION_NAME),
            _meta_element(_SOURCE_AE_TITLE, b"AE", source_ae_title) if source_ae_title else b"",
        )
    )
    return PREAMBLE + struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(body)) + body


def _meta_element(element: int, vr: bytes, value: str) -> bytes:
    raw = value.encode("ascii")
    raw += (b"\0" if vr == b"UI" else b" ") * (len(raw) % 2)
    return struct.pack("<HH2sH", 2, element, vr, len(raw)) + raw


@dataclass(frozen=True, slots=True)
class Held:
    """One whole file, received or found in the store."""

    path: str | Path
    size_bytes: int  # of the file
    offset: int  # of the data set in the file
    sha256: str  # of the data set's bytes as received
    head: bytes  # first bytes of the data set
    transfer_syntax: str
    source_ae_title: str = ""  # of the sender, as the file's header names it

    def attributes(self) -> Attributes:
        """What the data set says about itself; raises `InvalidObjectError` when it cannot be read."""
        data_set_bytes = self.size_bytes - self.offset
        found = attributes.read(self.head, self.transfer_syntax, whole=len(self.head) == data_set_bytes)
        if found is not None:
            return found
        with Path(self.path).open("rb") as file:
            file.seek(self.offset)
            more = file.read(elements.MORE_BYTES)
        found = attributes.read(more, self.transfer_syntax, whole=len(more) == data_set_bytes, last=True)
        if found is None:
            raise InvalidObjectError("the data set names no series within its first 16 MiB")
        return found


def read_file(path: Path) -> Held:
    """A stored file as if it were just received; for the recovery of rows.

    Raises `InvalidObjectError` when the file has not the form in which this store writes.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        start = file.read(_META_OFFSET)
        if len(start) < _META_OFFSET or start[128:132] != b"DICM":
            raise InvalidObjectError(f"{path.name} in the store is no DICOM file; move it away")
        length = struct.unpack_from("<I", start, _META_OFFSET - 4)[0]
        if length > 65_536:
            raise InvalidObjectError(f"{path.name} in the store has a broken file header; move it away")
        meta = _meta_values(file.read(length))
        if _TRANSFER_SYNTAX not in meta:
            raise InvalidObjectError("a file in the store names no transfer syntax; move it away")
        head = file.read(attributes.HEAD_BYTES)
        digest.update(head)
        size = _META_OFFSET + length + len(head)
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    syntax, source = meta[_TRANSFER_SYNTAX], meta.get(_SOURCE_AE_TITLE, "")
    return Held(path, size, _META_OFFSET + length, digest.hexdigest(), head, syntax, source)


def is_whole(path: Path, sha256: str) -> bool:
    """Whether the file's data set has this hash; false also for a file that is not ours."""
    try:
        return read_file(path).sha256 == sha256
    except InvalidObjectError:
        return False


def _meta_values(meta: bytes) -> dict[int, str]:
    """Text of each element of group 0002 whose VR has a length of two bytes."""
    values: dict[int, str] = {}
    position = 0
    while position + 8 <= len(meta):
        group, number, vr, length = struct.unpack_from("<HH2sH", meta, position)
        position += 8
        if vr in _LONG_META:
            length = struct.unpack("<I", meta[position : position + 4].ljust(4, b"\0"))[0]
            position += 4
        elif group == 2:
            values[number] = meta[position : position + length].rstrip(b"\0 ").decode("ascii", errors="replace")
        position += length
    return values
