"""DIMSE command sets: the 30 bytes to 300 bytes that say what a message asks for, read and written without pydicom.

A command set is Implicit VR Little Endian, group 0000, without sequences (PS3.7 section 6.3.1). Reading one takes about
10 microseconds here and 300 by way of pydicom's Dataset, which would be a third of the listener's work; the tests hold
both to the same answer.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

from worker.core.errors import InvalidObjectError

MAX_COMMAND_BYTES = 16_384
NO_DATA_SET = 0x0101

_GROUP_LENGTH = 0x0000
_AFFECTED_SOP_CLASS_UID = 0x0002
_REQUESTED_SOP_CLASS_UID = 0x0003
_COMMAND_FIELD = 0x0100
_MESSAGE_ID = 0x0110
_MESSAGE_ID_RESPONDED_TO = 0x0120
_DATA_SET_TYPE = 0x0800
_STATUS = 0x0900
_ERROR_COMMENT = 0x0902
_AFFECTED_SOP_INSTANCE_UID = 0x1000
_REQUESTED_SOP_INSTANCE_UID = 0x1001
_EVENT_TYPE_ID = 0x1002
_ACTION_TYPE_ID = 0x1008

_ELEMENT = struct.Struct("<HHI")
_U2 = struct.Struct("<H")
_U4 = struct.Struct("<I")


class CommandField(IntEnum):
    """Command Field (0000,0100) of the messages this listener knows (PS3.7 table E.1-1)."""

    C_STORE_RQ = 0x0001
    C_ECHO_RQ = 0x0030
    C_CANCEL_RQ = 0x0FFF
    N_EVENT_REPORT_RQ = 0x0100
    N_EVENT_REPORT_RSP = 0x8100
    N_ACTION_RQ = 0x0130


RESPONSE_BIT = 0x8000


@dataclass(frozen=True, slots=True)
class Command:
    """One received command set; a UID that was absent is empty, a number that was absent is None."""

    field: int  # Command Field; a value outside `CommandField` is a service we do not offer
    message_id: int | None
    responded_to: int | None  # Message ID Being Responded To; None in a request
    has_data_set: bool
    class_uid: str  # affected, or requested in an N-ACTION
    instance_uid: str
    status: int | None
    action_type: int | None
    event_type: int | None


def decode(data: bytes) -> Command:
    """The command set in `data`; raises `InvalidObjectError` when the bytes are none."""
    elements: dict[int, bytes] = {}
    position, end = 0, len(data)
    while position < end:
        if position + 8 > end:
            raise InvalidObjectError("command set breaks off inside an element")
        group, element, length = _ELEMENT.unpack_from(data, position)
        position += 8
        if group != 0 or position + length > end:
            raise InvalidObjectError("command set holds an element outside group 0000 or longer than itself")
        elements[element] = data[position : position + length]
        position += length
    field = _number(elements, _COMMAND_FIELD)
    if field is None:
        raise InvalidObjectError("command set names no command")
    return Command(
        field=field,
        message_id=_number(elements, _MESSAGE_ID),
        responded_to=_number(elements, _MESSAGE_ID_RESPONDED_TO),
        has_data_set=_number(elements, _DATA_SET_TYPE) not in (NO_DATA_SET, None),
        class_uid=_uid(elements, _AFFECTED_SOP_CLASS_UID) or _uid(elements, _REQUESTED_SOP_CLASS_UID),
        instance_uid=_uid(elements, _AFFECTED_SOP_INSTANCE_UID) or _uid(elements, _REQUESTED_SOP_INSTANCE_UID),
        status=_number(elements, _STATUS),
        action_type=_number(elements, _ACTION_TYPE_ID),
        event_type=_number(elements, _EVENT_TYPE_ID),
    )


def _number(elements: dict[int, bytes], element: int) -> int | None:
    value = elements.get(element)
    if value is None:
        return None
    if len(value) != 2:
        raise InvalidObjectError(f"command element (0000,{element:04X}) is not one unsigned short")
    return int(_U2.unpack(value)[0])


def _uid(elements: dict[int, bytes], element: int) -> str:
    # latin-1 maps every byte, so a hostile UID stays a string until `valid_uid` refuses it with a status.
    return elements.get(element, b"").rstrip(b"\0 ").decode("latin-1")


def encode_response(request: Command, status: int, comment: str = "") -> bytes:
    """The response to `request`, without a data set; `comment` is at most 64 ASCII characters."""
    body = [
        _text(_AFFECTED_SOP_CLASS_UID, request.class_uid, b"\0") if request.class_uid else b"",
        _short(_COMMAND_FIELD, request.field | RESPONSE_BIT),
        _short(_MESSAGE_ID_RESPONDED_TO, request.message_id or 0),
        _short(_DATA_SET_TYPE, NO_DATA_SET),
        _short(_STATUS, status),
        _text(_ERROR_COMMENT, comment, b" ") if comment else b"",
        _text(_AFFECTED_SOP_INSTANCE_UID, request.instance_uid, b"\0") if request.instance_uid else b"",
        _short(_ACTION_TYPE_ID, request.action_type) if request.action_type is not None else b"",
    ]
    return _with_group_length(b"".join(body))


def encode_event_report(message_id: int, class_uid: str, instance_uid: str, event_type: int) -> bytes:
    """An N-EVENT-REPORT-RQ command that a data set follows (PS3.7 section 10.3.1.1)."""
    body = [
        _text(_AFFECTED_SOP_CLASS_UID, class_uid, b"\0"),
        _short(_COMMAND_FIELD, CommandField.N_EVENT_REPORT_RQ),
        _short(_MESSAGE_ID, message_id),
        _short(_DATA_SET_TYPE, 0x0001),
        _text(_AFFECTED_SOP_INSTANCE_UID, instance_uid, b"\0"),
        _short(_EVENT_TYPE_ID, event_type),
    ]
    return _with_group_length(b"".join(body))


def _with_group_length(body: bytes) -> bytes:
    return _ELEMENT.pack(0, _GROUP_LENGTH, 4) + _U4.pack(len(body)) + body


def _short(element: int, value: int) -> bytes:
    return _ELEMENT.pack(0, element, 2) + _U2.pack(value)


def _text(element: int, value: str, pad: bytes) -> bytes:
    raw = value.encode("latin-1", errors="replace")
    raw += pad * (len(raw) % 2)
    return _ELEMENT.pack(0, element, len(raw)) + raw
