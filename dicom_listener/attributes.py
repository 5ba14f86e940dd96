"""The few attributes that arrivals need, read from the start of an encoded data set; pixels are never touched.

The walk goes over top-level elements in their ascending order, skips every value it does not want (sequences of
undefined length item by item), and stops behind the last wanted tag. Reading costs about 60 microseconds; pydicom's
`dcmread(specific_tags=...)` costs 1,000.

Source: PS3.5 sections 7.1 (elements), 7.5 (sequences), A.5 (deflated), 6.1.2 (character sets).
"""

import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from pydicom.charset import convert_encodings, decode_bytes
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian
from pydicom.valuerep import PN_DELIMS, TEXT_VR_DELIMS

from worker.core.errors import InvalidObjectError

Phi = Annotated[str, "patient data: never logged, never in a metric, a file name or a URL"]

HEAD_BYTES = 8_192  # enough for most CT images; when it is not, `MORE_BYTES` are read
MORE_BYTES = 16_777_216
_MAX_NESTING = 16
_UID = re.compile(r"[0-9]+(\.[0-9]+)*", re.ASCII)
_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_LONG_VRS = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_SHORT_VR_NAMES = "AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US"
_SHORT_VRS = frozenset(name.encode() for name in _SHORT_VR_NAMES.split())
_INFLATED_SYNTAXES = frozenset({str(DeflatedExplicitVRLittleEndian)})

_CHARACTER_SET = 0x00080005
_WANTED = {
    0x00080016: "sop_class_uid",
    0x00080018: "sop_instance_uid",
    0x00080020: "study_date",
    0x00080030: "study_time",
    0x00080050: "accession_number",
    0x00080060: "modality",
    0x00080090: "referring_physician",
    0x00081030: "study_description",
    0x0008103E: "series_description",
    0x00100010: "patient_name",
    0x00100020: "patient_id",
    0x00100021: "issuer_of_patient_id",
    0x00100030: "birth_date",
    0x00100040: "sex",
    0x00180015: "body_part",
    0x0020000D: "study_uid",
    0x0020000E: "series_uid",
    0x00200011: "series_number",
    0x00200013: "instance_number",
    0x0032000C: "study_priority",
    0x00321060: "requested_procedure",
    0x00401003: "requested_priority",
    0x00402016: "placer",
    0x00402017: "filler",
}
_LAST_NEEDED = 0x0020000E
_LAST_WANTED = max(_WANTED)
_ASCII_ONLY = {"sop_class_uid", "sop_instance_uid", "study_uid", "series_uid"}


@dataclass(frozen=True, slots=True)
class Attributes:
    """What a data set says about itself, as text; an absent or empty attribute is the empty string."""

    sop_class_uid: str = ""
    sop_instance_uid: str = ""
    study_uid: str = ""
    series_uid: str = ""
    modality: str = ""
    study_date: str = ""  # as sent (DA)
    study_time: str = ""  # as sent (TM)
    study_description: Phi = ""
    series_description: Phi = ""
    series_number: str = ""
    instance_number: str = ""
    body_part: str = ""
    accession_number: Phi = ""
    referring_physician: Phi = ""
    patient_name: Phi = ""  # with its `^` and `=`
    patient_id: Phi = ""
    issuer_of_patient_id: Phi = ""
    birth_date: Phi = ""
    sex: str = ""
    study_priority: str = ""  # (0032,000C), retired but still sent
    requested_procedure: str = ""
    requested_priority: str = ""  # (0040,1003)
    placer: Phi = ""
    filler: Phi = ""


class _HeadTooShortError(Exception):
    """The bytes end before the walk does."""


def valid_uid(uid: str) -> bool:
    """True when `uid` is digits and dots, 1 to 64 characters. Leading zeros, seen in the field, pass."""
    return len(uid) <= 64 and _UID.fullmatch(uid) is not None


def read(head: bytes, transfer_syntax: str, *, whole: bool) -> Attributes | None:
    """The attributes of the data set that starts with `head`; None when more of it is needed to say.

    `whole` says that `head` is all there is. Raises `InvalidObjectError` when the bytes are no data set in `transfer_syntax`.
    """
    if transfer_syntax in _INFLATED_SYNTAXES:
        head, whole = _inflate(head, whole)
    found: dict[int, bytes] = {}
    try:
        _walk(head, _ENCODINGS.get(transfer_syntax, _EXPLICIT), found)
    except _HeadTooShortError:
        if not whole and max(found, default=0) < _LAST_NEEDED:
            return None
        if whole and 0x0020000E not in found:
            raise InvalidObjectError("the data set breaks off before its series is named") from None
    return _texts(found)


def _inflate(head: bytes, whole: bool) -> tuple[bytes, bool]:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = inflater.decompress(head, MORE_BYTES)
    except zlib.error as error:
        raise InvalidObjectError("deflated data set cannot be inflated") from error
    return inflated, inflater.eof or (whole and len(inflated) < MORE_BYTES)


def _walk(data: bytes, encoding: "_Encoding", found: dict[int, bytes]) -> None:
    """Puts the values of the wanted top-level elements of `data` into `found`."""
    position, end, previous = 0, len(data), -1
    while position < end:
        tag, vr, length, position = encoding.element(data, position)
        if tag <= previous:
            raise InvalidObjectError("elements do not ascend: no data set in the agreed transfer syntax")
        if tag > _LAST_WANTED:
            return
        previous = tag
        if length == _UNDEFINED:
            position = _skip_items(data, position, encoding.within(vr), 0)
            continue
        if tag in _WANTED or tag == _CHARACTER_SET:
            if position + length > end:
                raise _HeadTooShortError
            found[tag] = data[position : position + length]
        position += length
    if position > end:
        raise _HeadTooShortError


@dataclass(frozen=True, slots=True)
class _Encoding:
    """How elements are written: byte order, and whether they name their VR."""

    implicit: bool
    short: Callable[[bytes, int], tuple[int, int, bytes, int]]  # group, element, VR, 16-bit length
    long: Callable[[bytes, int], tuple[int, int, int]]  # group, element, 32-bit length
    number: Callable[[bytes, int], tuple[int]]  # 32 bits

    def element(self, data: bytes, position: int) -> tuple[int, bytes, int, int]:
        """Tag, VR (empty when implicit), length and start of the value of the element at `position`."""
        try:
            if self.implicit:
                group, element, length = self.long(data, position)
                return group << 16 | element, b"", length, position + 8
            group, element, vr, length = self.short(data, position)
            if vr in _SHORT_VRS:
                return group << 16 | element, vr, length, position + 8
            if vr in _LONG_VRS:
                return group << 16 | element, vr, self.number(data, position + 8)[0], position + 12
        except struct.error:
            raise _HeadTooShortError from None
        raise InvalidObjectError("an element has no VR: no data set in the agreed transfer syntax")

    def within(self, vr: bytes) -> "_Encoding":
        """The encoding inside a value of undefined length: UN holds implicit little endian (PS3.5 section 6.2.2)."""
        return _IMPLICIT if vr == b"UN" else self


def _encoding(order: str, implicit: bool) -> _Encoding:
    short, long, number = (struct.Struct(order + form).unpack_from for form in ("HH2sH", "HHI", "I"))
    return _Encoding(implicit, short, long, number)


_IMPLICIT = _encoding("<", implicit=True)
_EXPLICIT = _encoding("<", implicit=False)
_BIG_ENDIAN = _encoding(">", implicit=False)
# Papyrus 3 (retired) is implicit as well; every syntax not named here is explicit little endian (PS3.5 annex A).
_ENCODINGS = {
    str(ImplicitVRLittleEndian): _IMPLICIT,
    "1.2.840.10008.1.20": _IMPLICIT,
    str(ExplicitVRBigEndian): _BIG_ENDIAN,
}


def _skip_items(data: bytes, position: int, encoding: _Encoding, depth: int) -> int:
    """The position behind a sequence of undefined length whose first item starts at `position`."""
    if depth > _MAX_NESTING:
        raise InvalidObjectError("sequences are nested too deep")
    while True:
        tag, length, position = _item(data, position, encoding)
        if tag == _SEQUENCE_END:
            return position
        if tag != _ITEM:
            raise InvalidObjectError("a sequence holds something that is no item")
        position = _skip_item(data, position, encoding, depth) if length == _UNDEFINED else position + length


def _skip_item(data: bytes, position: int, encoding: _Encoding, depth: int) -> int:
    """The position behind an item of undefined length whose first element starts at `position`."""
    while True:
        if _item(data, position, encoding)[0] == _ITEM_END:
            return position + 8
        _, vr, length, position = encoding.element(data, position)
        if length == _UNDEFINED:
            position = _skip_items(data, position, encoding.within(vr), depth + 1)
        else:
            position += length


def _item(data: bytes, position: int, encoding: _Encoding) -> tuple[int, int, int]:
    """Tag, length and start of what stands at `position` if it is an item or a delimiter, which name no VR."""
    try:
        group, element, length = encoding.long(data, position)
    except struct.error:
        raise _HeadTooShortError from None
    return group << 16 | element, length, position + 8


def _texts(found: dict[int, bytes]) -> Attributes:
    declared = found.get(_CHARACTER_SET, b"").decode("latin-1").strip("\0 ")
    encodings: list[str] | None = None
    values: dict[str, str] = {}
    for tag, name in _WANTED.items():
        raw = found.get(tag, b"").rstrip(b"\0 ")
        if not raw:
            continue
        if name in _ASCII_ONLY or (raw.isascii() and b"\x1b" not in raw and b"\\" not in raw):
            values[name] = raw.decode("latin-1").strip()
            continue
        if encodings is None:
            encodings = _encodings(declared)
        values[name] = _decode(raw, encodings, name)
    return Attributes(**values)


def _encodings(declared: str) -> list[str]:
    return list(convert_encodings(declared.split("\\"))) if declared else []


def _decode(raw: bytes, encodings: list[str], name: str) -> str:
    """Text of `raw`; without a declared character set UTF-8 is tried before Latin-1, which decodes anything."""
    if not encodings:
        try:
            return raw.decode("utf-8").strip()
        except UnicodeDecodeError:
            return raw.decode("latin-1").strip()
    delimiters = PN_DELIMS if name in ("patient_name", "referring_physician") else TEXT_VR_DELIMS
    return decode_bytes(raw, encodings, set(delimiters)).strip()
