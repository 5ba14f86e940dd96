"""Command sets, held to what pynetdicom reads and writes."""

from io import BytesIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pynetdicom.dimse_messages import C_STORE_RQ, N_EVENT_REPORT_RQ, DIMSEMessage
from pynetdicom.dimse_primitives import C_STORE, N_EVENT_REPORT
from pynetdicom.pdu_primitives import P_DATA

from dicom_listener import commands, pdus
from dicom_listener.commands import Command, CommandField
from dicom_listener.statuses import COMMENTS, Status
from worker.core.errors import InvalidObjectError

REQUEST = Command(CommandField.C_STORE_RQ, 7, None, True, "1.2.840.10008.5.1.4.1.1.2", "1.2.3", None, None, None)


def read_by_pynetdicom(command: bytes) -> DIMSEMessage:
    """The message as pynetdicom understands it."""
    primitive = P_DATA()
    primitive.presentation_data_value_list = [[1, b"\x03" + command]]
    message = DIMSEMessage()
    message.decode_msg(primitive)
    return message


def test_store_request_of_pynetdicom_is_read() -> None:
    primitive = C_STORE()
    primitive.MessageID, primitive.Priority = 513, 2
    primitive.AffectedSOPClassUID, primitive.AffectedSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", "1.2.34"
    primitive.DataSet = BytesIO(b"x")
    message = C_STORE_RQ()
    message.primitive_to_message(primitive)
    encoded = next(message.encode_msg(1, 0)).presentation_data_value_list[0][1][1:]
    command = commands.decode(encoded)
    assert (command.field, command.message_id, command.has_data_set) == (CommandField.C_STORE_RQ, 513, True)
    assert (command.class_uid, command.instance_uid) == ("1.2.840.10008.5.1.4.1.1.2", "1.2.34")


@pytest.mark.parametrize("status", list(Status))
def test_response_is_what_pynetdicom_expects(status: Status) -> None:
    message = read_by_pynetdicom(commands.encode_response(REQUEST, status, COMMENTS.get(status, "")))
    primitive = message.message_to_primitive()
    assert isinstance(primitive, C_STORE)
    assert (primitive.Status, primitive.MessageIDBeingRespondedTo) == (status, 7)
    assert (primitive.AffectedSOPClassUID, primitive.AffectedSOPInstanceUID) == (REQUEST.class_uid, "1.2.3")
    assert (
        message.command_set.CommandGroupLength
        == len(commands.encode_response(REQUEST, status, COMMENTS.get(status, ""))) - 12
    )


def test_event_report_request_is_what_pynetdicom_expects() -> None:
    primitive = read_by_pynetdicom(
        commands.encode_event_report(9, "1.2.840.10008.1.20.1", "1.2", 2)
    ).message_to_primitive()
    assert isinstance(primitive, N_EVENT_REPORT)
    assert (primitive.MessageID, primitive.EventTypeID, primitive.AffectedSOPInstanceUID) == (9, 2, "1.2")
    assert N_EVENT_REPORT_RQ


def test_comments_fit_their_attribute() -> None:
    assert [c for c in COMMENTS.values() if len(c) > 64 or not c.isascii()] == []


def test_statuses_are_known_to_the_standard() -> None:
    for status in Status:
        assert status == 0 or 0x0106 <= status <= 0x0211 or status in (0xA700, 0xA900) or 0xC000 <= status <= 0xCFFF


@given(st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_command_or_a_clear_error(data: bytes) -> None:
    try:
        commands.decode(data)
    except InvalidObjectError:
        return


@pytest.mark.parametrize("limit", [0, 128, 16_384])
def test_response_is_cut_to_the_peers_maximum(limit: int) -> None:
    payload = bytes(range(256)) * 3
    sent = pdus.p_data(5, payload, command=True, max_pdu_bytes=limit)
    collected, position, lasts = b"", 0, []
    while position < len(sent):
        length = int.from_bytes(sent[position + 2 : position + 6], "big")
        assert not limit or length <= limit
        body = sent[position + 6 : position + 6 + length]
        assert (int.from_bytes(body[:4], "big"), body[4]) == (length - 4, 5)
        collected += body[6:]
        lasts.append(bool(body[5] & pdus.LAST))
        position += 6 + length
    assert collected == payload
    assert lasts == [False] * (len(lasts) - 1) + [True]
