"""The HL7 v2 acknowledgement: read from a receiver's bytes, and written for the receiver of the demo and the tests.

Source: HL7 2.5.1 §2.9 (original and enhanced mode), §2.15.8 (MSA), §2.15.5 (ERR), table 0008.
"""

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime

from worker.core.errors import DeliveryUnavailableError
from worker.core.report import Phi

ACCEPTED = frozenset({"AA", "CA"})  # application accept; commit accept: safely stored
UNAVAILABLE = frozenset({"AE", "CE"})  # an error now, worth another try
REFUSED = frozenset({"AR", "CR"})  # rejected for good
CODES = ACCEPTED | UNAVAILABLE | REFUSED
TEXT_LIMIT = 500  # characters of MSA-3 and ERR that are kept

_ERR_TEXT_FIELDS = (1, 3, 7, 8)  # location and code (old form), code, diagnostic information, user message


@dataclass(frozen=True)
class Acknowledgement:
    """What a receiver answered; `text` may quote the patient and is left out of the repr."""

    code: str  # MSA-1, HL7 table 0008
    control_id: str  # MSA-2, the MSH-10 that is answered
    text: Phi = field(default="", repr=False)  # MSA-3 and ERR: for the database, never for a log

    @property
    def is_accepted(self) -> bool:
        """Whether the receiver has taken the message over (AA or CA)."""
        return self.code in ACCEPTED


def parse(payload: bytes) -> Acknowledgement:
    """Reads an acknowledgement, whatever delimiters its MSH declares; segments may end in CR, LF or both.

    Raises `DeliveryUnavailableError` when the bytes are no acknowledgement: no MSH, no MSA, or a code outside table
    0008. The message of the error holds nothing of what was received.
    """
    text = payload.decode("utf-8", errors="replace")
    if not re.match(r"MSH[^\w\s]", text):
        raise DeliveryUnavailableError("the receiver answered something that is not an HL7 message")
    separator = text[3]
    segments = [line.split(separator) for line in re.split(r"[\r\n]+", text)]
    msa = next((fields for fields in segments if fields[0] == "MSA"), None)
    if msa is None:
        raise DeliveryUnavailableError("the receiver answered an HL7 message without an MSA segment")
    code, control_id, message = (*msa[1:4], "", "", "")[:3]
    if code not in CODES:
        raise DeliveryUnavailableError("the receiver answered with an acknowledgement code outside HL7 table 0008")
    details = [_at(fields, n) for fields in segments if fields[0] == "ERR" for n in _ERR_TEXT_FIELDS]
    said = "; ".join(part for part in (message, *details) if part)
    return Acknowledgement(code, control_id, said[:TEXT_LIMIT])


def _at(fields: list[str], number: int) -> str:
    return fields[number] if number < len(fields) else ""


def control_id_of(message: bytes) -> str:
    """MSH-10 of a message; empty when there is none."""
    return _at(_header(message), 9)


def compose(message: bytes, code: str, control_id: str | None = None, text: str = "") -> bytes:
    """An acknowledgement of `message` with this code; `control_id` stands in MSA-2 instead of the message's own.

    Sender and receiver change places, the version is the message's. Nothing else of the message is repeated.
    """
    header = _header(message)
    answered = _at(header, 9) if control_id is None else control_id
    now = datetime.now(UTC)
    trigger = _at(_at(header, 8).split("^"), 1)
    msh = ["MSH", "^~\\&", _at(header, 4), _at(header, 5), _at(header, 2), _at(header, 3), f"{now:%Y%m%d%H%M%S}+0000"]
    msh += ["", "^".join(filter(None, ("ACK", trigger, "ACK"))), f"A{now:%H%M%S%f}", _at(header, 10) or "P"]
    msh += [_at(header, 11) or "2.5.1"]
    return "\r".join(["|".join(msh), f"MSA|{code}|{answered}|{text}".rstrip("|"), ""]).encode()


def _header(message: bytes) -> list[str]:
    return re.split(rb"[\r\n]", message, maxsplit=1)[0].decode("utf-8", errors="replace").split("|")
