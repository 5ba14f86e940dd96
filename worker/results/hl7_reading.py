"""HL7 v2 read back: the check of an ORU against its profile before it leaves, and a form that a person can read.

hl7apy checks structure, cardinality and data types. It does not look at the values of OBR-25 and OBX-11 (`Q9` passes)
and takes an empty required field for a present one, so those checks are ours.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from hl7apy import load_reference
from hl7apy.exceptions import ChildNotFound, HL7apyException, ValidationError
from hl7apy.parser import parse_message

from worker.results import hl7_text

VERSION = "2.5.1"
SIGNED = frozenset({"F", "C"})
"""Values of OBR-25 and OBX-11 that only a signed report may carry."""

_REQUIRED = {
    "MSH": (7, 9, 10, 11, 12),
    "PID": (3, 5),
    "PV1": (2,),
    "ORC": (1,),
    "OBR": (4, 22, 25),
    "OBX": (2, 3, 5, 11),
}
_TABLES = {("PID", 8): "HL70001", ("OBR", 25): "HL70123", ("OBX", 11): "HL70085"}
_STATUS_PAIRS = frozenset({("R", "R"), ("P", "P"), ("F", "F"), ("C", "C"), ("X", "X"), ("C", "W")})


@dataclass(frozen=True)
class _Segment:
    name: str
    fields: tuple[str, ...]  # by HL7 number; fields[0] is the name

    def __getitem__(self, number: int) -> str:
        return self.fields[number] if number < len(self.fields) else ""


def validate(payload: bytes) -> tuple[str, ...]:
    """What is wrong with an ORU^R01 of ours, in sentences that name fields and hold no values; empty when it is right.

    Checks the structure by hl7apy, the required fields, HL7 tables 0001, 0085 and 0123, that OBX-11 and OBR-25 are one
    row of the status table, and that F or C names a signer in OBR-32.
    """
    try:
        text = payload.decode(_codec(payload))
    except UnicodeDecodeError:
        return ("the bytes are not of the character set that MSH-18 names",)
    if not text.startswith("MSH|^~\\&|"):
        return ("the message does not start with MSH and the usual delimiters",)
    if re.search(r"[\x00-\x0c\x0e-\x1f]", text):
        return ("the message holds a control character that was not escaped",)
    segments = [_segment(line) for line in text.split("\r") if line]
    return (*_structure(text), *_profile(segments))


def _codec(payload: bytes) -> str:
    header = payload.split(b"\r", 1)[0].split(b"|")
    name = header[17].decode("ascii", errors="replace") if len(header) > 17 else ""
    return hl7_text.CODECS.get(name, "utf-8")


def _segment(line: str) -> _Segment:
    fields = line.split("|")
    if fields[0] == "MSH":
        fields.insert(1, "|")  # MSH-1 is the delimiter itself
    return _Segment(fields[0], tuple(fields))


def _structure(text: str) -> Iterator[str]:
    try:
        parse_message(text).validate()
    except ValidationError as error:
        yield str(error)  # names elements of the standard, no values
    except HL7apyException as error:
        yield f"hl7apy cannot parse the message ({type(error).__name__})"


def _profile(segments: list[_Segment]) -> Iterator[str]:
    for name, numbers in _REQUIRED.items():
        found = [segment for segment in segments if segment.name == name]
        if not found:
            yield f"{name} is missing"
        for segment in found:
            yield from (f"{name}-{number} is empty" for number in numbers if not segment[number])
    for (name, number), table in _TABLES.items():
        allowed = load_reference(table, "Table", VERSION)[1]
        values = [segment[number] for segment in segments if segment.name == name]
        if any(value not in allowed for value in values if value):
            yield f"{name}-{number} is not in HL7 table {table.removeprefix('HL7')}"
    header = segments[0]
    if (header[9], header[12]) != ("ORU^R01^ORU_R01", VERSION):
        yield f"MSH-9 and MSH-12 are not ORU^R01^ORU_R01 of {VERSION}"
    yield from _statuses(segments)


def _statuses(segments: list[_Segment]) -> Iterator[str]:
    requests = [segment for segment in segments if segment.name == "OBR"]
    observations = [segment for segment in segments if segment.name == "OBX"]
    if len(requests) != 1:
        yield f"{len(requests)} OBR segments where one report has one"
        return
    pairs = {(requests[0][25], observation[11]) for observation in observations}
    if len(pairs) > 1 or not pairs <= _STATUS_PAIRS:
        yield "OBR-25 and OBX-11 are not one row of the status table"
    if any(set(pair) & SIGNED for pair in pairs) and not requests[0][32]:
        yield "F or C without a signer in OBR-32"


def readable(payload: bytes) -> str:
    """Any HL7 v2 message as lines for a terminal: field number, the standard's name of the field, unescaped value.

    Meant for people; holds patient data as the message does. Control characters are drawn as pictures, so that nothing
    in a message can act on the terminal. Bytes that are no HL7 are shown as they are.
    """
    codec = _codec(payload)
    text = payload.decode(codec, errors="replace").strip("\x0b\x1c\r\n")
    lines: list[str] = []
    for segment in (_segment(line) for line in re.split(r"\r\n|\r|\n", text) if line):
        lines.append(_visible(segment.name))
        names = _field_names(segment.name)
        for number, value in enumerate(segment.fields[1:], start=1):
            if value:
                lines.extend(_field_lines(number, names.get(number, ""), value, codec, segment.name == "MSH"))
    return "\n".join(lines)


def _field_lines(number: int, name: str, value: str, codec: str, is_header: bool) -> Iterator[str]:
    """One line a repetition or a line break; delimiters of components stay, because they carry meaning."""
    label = f"  {number:>3}  {name:<36}  "
    repetitions = [value] if is_header and number == 2 else value.split("~")
    for repetition in repetitions:
        for line in hl7_text.unescape(repetition, codec).split("\n"):
            yield (label + _visible(line)).rstrip()
            label = " " * len(label)


def _field_names(segment: str) -> dict[int, str]:
    try:
        reference = load_reference(segment, "Segment", VERSION)
    except ChildNotFound:
        return {}
    return {
        int(child[0].rsplit("_", 1)[1]): (child[1][3] or "").replace("_", " ").capitalize() for child in reference[1]
    }


def _visible(text: str) -> str:
    """Control characters as their pictures (U+2400 and on), C1 controls as a question mark."""
    pictures = {code: 0x2400 + code for code in range(0x20)} | {0x7F: 0x2421}
    return text.translate(pictures | dict.fromkeys(range(0x80, 0xA0), "?"))
