"""Acknowledgements read and written."""

import hl7 as python_hl7
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.core.errors import DeliveryUnavailableError
from worker.delivery import acknowledgement

MESSAGE = b"MSH|^~\\&|MU2|CITY|RIS|NORTH|20260302||ORU^R01^ORU_R01|C1|T|2.5.1\rPID|1\r"


@pytest.mark.parametrize("code", sorted(acknowledgement.CODES))
def test_composed_acknowledgement_is_read_back(code):
    answer = acknowledgement.parse(acknowledgement.compose(MESSAGE, code, text="noted"))
    assert (answer.code, answer.control_id, answer.text) == (code, "C1", "noted")
    assert answer.is_accepted == (code in {"AA", "CA"})


def test_composed_acknowledgement_is_hl7_to_another_parser():
    message = python_hl7.parse(acknowledgement.compose(MESSAGE, "AA"))
    msh = message.segment("MSH")
    assert [str(msh[n]) for n in (3, 4, 5, 6, 9)] == ["RIS", "NORTH", "MU2", "CITY", "ACK^R01^ACK"]
    assert str(message.segment("MSA")) == "MSA|AA|C1"


@pytest.mark.parametrize("end", [b"\r", b"\n", b"\r\n"])
def test_acknowledgement_is_read_whatever_ends_its_segments(end):
    answer = acknowledgement.parse(end.join([b"MSH|^~\\&|RIS", b"MSA|AE|C1|no such order", b"ERR|||207|E|||why", b""]))
    assert (answer.code, answer.text) == ("AE", "no such order; 207; why")


def test_acknowledgement_of_another_package_is_read():
    ack = str(python_hl7.parse(MESSAGE).create_ack("AR")).encode()
    assert acknowledgement.parse(ack) == acknowledgement.Acknowledgement("AR", "C1", "")


def test_acknowledgement_with_other_delimiters_is_read():
    assert acknowledgement.parse(b"MSH$%~\\&$RIS\rMSA$AA$C1").code == "AA"


@pytest.mark.parametrize(
    "payload",
    [b"", b"hello", b"MSH", b"MSH|^~\\&|RIS\r", b"MSH|^~\\&|\rMSA|\r", b"MSH|^~\\&|\rMSA|OK|C1\r", b"\xff\xfe"],
)
def test_what_is_no_acknowledgement_is_an_error_without_its_bytes(payload):
    with pytest.raises(DeliveryUnavailableError) as caught:
        acknowledgement.parse(payload)
    assert "hello" not in str(caught.value) and "OK" not in str(caught.value)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(payload):
    try:
        assert acknowledgement.parse(b"MSH|^~\\&|\r" + payload).code in acknowledgement.CODES
    except DeliveryUnavailableError as error:
        assert str(error).startswith("the receiver answered")


def test_text_of_an_answer_is_bounded_and_not_in_its_repr():
    answer = acknowledgement.parse(b"MSH|^~\\&|\rMSA|AE|C1|" + b"Rossi " * 1000)
    assert len(answer.text) == acknowledgement.TEXT_LIMIT
    assert "Rossi" not in repr(answer)
