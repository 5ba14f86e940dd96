"""The few attributes that arrivals need, read from the start of an encoded data set; pixels are never touched.

The walk goes over top-level elements, skips every value it does not want and stops behind the last wanted tag. Reading
costs about 60 microseconds; pydicom's `dcmread(specific_tags=...)` costs 1,000.

What the top level leaves out about the order is taken from the sequences of requests, where all their items agree: an
image made for two orders belongs to neither alone. The procedure's code is the one that was asked for, else the one that
was performed, again where it is one.

Source: PS3.3 tables 10-9 (requests), C.17-3b (referenced requests), 8.8-1 (codes), PS3.5 section 6.1.2 (character sets).
"""

import re
from dataclasses import dataclass
from typing import Annotated

from pydicom.charset import convert_encodings, decode_bytes
from pydicom.valuerep import PN_DELIMS, TEXT_VR_DELIMS

from dicom_listener import elements
from dicom_listener.elements import Encoding, HeadTooShortError
from worker.core.errors import InvalidObjectError

Phi = Annotated[str, "patient data: never logged, never in a metric, a file name or a URL"]

HEAD_BYTES = 32_768  # enough for most CT images; when it is not, `MORE_BYTES` are read
_UID = re.compile(r"[0-9]+(\.[0-9]+)*", re.ASCII)
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
    0x0032000C: "study_priority",
    0x00321032: "requesting_physician",
    0x00321060: "requested_procedure",
    0x00380010: "admission_id",
    0x00401002: "requested_procedure_reason",
    0x00401003: "requested_priority",
    0x00402016: "placer",
    0x00402017: "filler",
}
_REQUESTS = frozenset({0x00400275, 0x0040A370})  # Request Attributes Sequence, Referenced Request Sequence
_OF_REQUESTS = frozenset({0x00080050, 0x00321032, 0x00321060, 0x00401002, 0x00402016, 0x00402017})
_PERFORMED, _REQUESTED = 0x00081032, 0x00321064  # Procedure Code Sequence, Requested Procedure Code Sequence
_CODE_VALUE, _LONG_CODE_VALUE = 0x00080100, 0x00080119  # the second where the first has too few characters
_CODE = {_CODE_VALUE: "procedure_code", 0x00080102: "procedure_system", 0x00080104: "procedure_text"}
_SERIES_UID = 0x0020000E
_LAST_WANTED = max(*_WANTED, *_REQUESTS)
_PERSON_NAMES = {"patient_name", "referring_physician", "requesting_physician"}
_ASCII_ONLY = {"sop_class_uid", "sop_instance_uid", "study_uid", "series_uid"}


_Code = tuple[bytes, bytes, bytes]  # value, designator of the scheme, meaning: in the order of `_CODE`


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
    body_part: str = ""
    accession_number: Phi = ""
    referring_physician: Phi = ""
    patient_name: Phi = ""  # with its `^` and `=`
    patient_id: Phi = ""
    issuer_of_patient_id: Phi = ""
    birth_date: Phi = ""
    sex: str = ""
    study_priority: str = ""  # (0032,000C), retired but still sent
    requesting_physician: Phi = ""
    requested_procedure: str = ""
    requested_procedure_reason: Phi = ""
    requested_priority: str = ""  # (0040,1003)
    procedure_code: str = ""
    procedure_system: str = ""  # Coding Scheme Designator
    procedure_text: Phi = ""  # Code Meaning
    admission_id: Phi = ""
    placer: Phi = ""
    filler: Phi = ""


def valid_uid(uid: str) -> bool:
    """True when `uid` is digits and dots, 1 to 64 characters. Leading zeros, seen in the field, pass."""
    return len(uid) <= 64 and _UID.fullmatch(uid) is not None


def read(head: bytes, transfer_syntax: str, *, whole: bool, last: bool = False) -> Attributes | None:
    """The attributes of the data set that starts with `head`; None when more of it is needed to say.

    `whole` says that `head` is all there is, `last` that no more will be read: what stands behind it is then left out.
    Raises `InvalidObjectError` when the bytes are no data set in `transfer_syntax`.
    """
    data, whole = elements.inflated(head, transfer_syntax, whole=whole)
    found: dict[int, bytes] = {}
    try:
        _walk(data, elements.encoding_of(transfer_syntax), found)
    except HeadTooShortError:
        if not whole and not (last and _SERIES_UID in found):
            return None
        if _SERIES_UID not in found:
            raise InvalidObjectError("the data set breaks off before its series is named") from None
    return _texts(found)


def _walk(data: bytes, encoding: Encoding, found: dict[int, bytes]) -> None:
    """Puts the values of the wanted top-level elements of `data` into `found`, and what only sequences name."""
    requests: dict[int, set[bytes]] = {}
    codes: dict[int, set[_Code]] = {}
    end = len(data)
    try:
        for tag, vr, start, stop in elements.walk(data, encoding, last=_LAST_WANTED):
            if stop > end:
                raise HeadTooShortError
            if tag in _WANTED or tag == _CHARACTER_SET:
                found[tag] = data[start:stop]
            elif tag in _REQUESTS:
                _read_requests(data, encoding.within(vr), start, stop, requests, codes)
            elif tag in (_PERFORMED, _REQUESTED):
                codes.setdefault(tag, set()).update(_codes(data, encoding.within(vr), start, stop))
    finally:
        for tag, values in requests.items():
            if len(values) == 1 and not found.get(tag, b"").strip(b"\0 "):
                found[tag] = values.pop()
        for sequence in (_REQUESTED, _PERFORMED):
            if len(codes.get(sequence, ())) == 1:
                found.update(zip(_CODE, codes[sequence].pop(), strict=True))
                break


def _read_requests(
    data: bytes,
    encoding: Encoding,
    start: int,
    stop: int,
    requests: dict[int, set[bytes]],
    codes: dict[int, set[_Code]],
) -> None:
    """Collects what the items of a sequence of requests name; a broken one names nothing more and harms nothing."""
    try:
        for first, after in elements.items(data, encoding, start, stop):
            for tag, vr, begin, end in elements.walk(data, encoding, first, after):
                value = data[begin:end].strip(b"\0 ")
                if tag in _OF_REQUESTS and value:
                    requests.setdefault(tag, set()).add(value)
                elif tag == _REQUESTED:
                    codes.setdefault(tag, set()).update(_codes(data, encoding.within(vr), begin, end))
    except (HeadTooShortError, InvalidObjectError):
        return


def _codes(data: bytes, encoding: Encoding, start: int, stop: int) -> set[_Code]:
    """The codes of a code sequence; one without a value is none, and a broken sequence names no more."""
    found: set[_Code] = set()
    try:
        for first, after in elements.items(data, encoding, start, stop):
            code = {
                tag: data[begin:end].strip(b"\0 ") for tag, _, begin, end in elements.walk(data, encoding, first, after)
            }
            value = code.get(_CODE_VALUE) or code.get(_LONG_CODE_VALUE)
            if value:
                _, scheme, meaning = _CODE
                found.add((value, code.get(scheme, b""), code.get(meaning, b"")))
    except (HeadTooShortError, InvalidObjectError):
        return found
    return found


def _texts(found: dict[int, bytes]) -> Attributes:
    declared = found.get(_CHARACTER_SET, b"").decode("latin-1").strip("\0 ")
    encodings: list[str] | None = None
    values: dict[str, str] = {}
    for tag, name in (_WANTED | _CODE).items():
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
    delimiters = PN_DELIMS if name in _PERSON_NAMES else TEXT_VR_DELIMS
    return decode_bytes(raw, encodings, set(delimiters)).strip()
