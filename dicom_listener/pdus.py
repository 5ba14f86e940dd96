"""PDUs on a socket: every length is bounded before memory is given, every wait is bounded in time.

    PDU          type (1), reserved (1), length (4, big endian), body            PS3.8 section 9.3.1
    P-DATA-TF    body = one or more PDVs: length (4), context id (1), control (1), fragment     section 9.3.5, annex E.2

`PduStream` gives the fragments as views into one reused buffer, straight from `recv_into`, so a PDU of any size costs the
buffer and no more. The agreed maximum is checked all the same: a longer PDU is a `ProtocolError`, answered with A-ABORT.
Views stay valid until the buffer is full, when `before_reuse` is called: whoever keeps views writes them out then. So a
slice of a CT, which fits the buffer, is hashed and written in one go.
"""

import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from enum import IntEnum

from worker.core.errors import FinalError, RetryableError

BUFFER_BYTES = 1 << 20
MAX_REQUEST_BYTES = 262_144  # 128 contexts that each propose 40 transfer syntaxes need 150,000
_LEAST_READ_BYTES = 1_024  # a read into less room than this is not worth its call
_MAX_CONTROL_PDU_BYTES = 4  # A-RELEASE and A-ABORT bodies are exactly this long
_HEADER = struct.Struct(">BxI")
_PDV = struct.Struct(">IBB")
_PDV_OVERHEAD = 2  # context id and control byte count in the PDV's length

COMMAND = 0x01  # bit of the control byte: the fragment belongs to a command set
LAST = 0x02  # bit of the control byte: it is the last fragment of its command set or data set


class PduType(IntEnum):
    """First byte of a PDU (PS3.8 section 9.3)."""

    ASSOCIATE_RQ = 0x01
    ASSOCIATE_AC = 0x02
    ASSOCIATE_RJ = 0x03
    P_DATA_TF = 0x04
    RELEASE_RQ = 0x05
    RELEASE_RP = 0x06
    ABORT = 0x07


class AbortReason(IntEnum):
    """Reason of an A-ABORT whose source is the service provider (PS3.8 table 9-26)."""

    NOT_SPECIFIED = 0
    UNRECOGNIZED_PDU = 1
    UNEXPECTED_PDU = 2
    UNRECOGNIZED_PARAMETER = 4
    UNEXPECTED_PARAMETER = 5
    INVALID_PARAMETER = 6


class ProtocolError(FinalError):
    """The peer broke the upper layer protocol; the association is aborted with `reason`."""

    def __init__(self, message: str, reason: AbortReason) -> None:
        super().__init__(message)
        self.reason = reason


class PeerGoneError(RetryableError):
    """The connection ended without a release."""


class PeerStalledError(RetryableError):
    """Nothing came, or nothing was taken, within the time-out."""


RELEASE_RP = _HEADER.pack(PduType.RELEASE_RP, 4) + bytes(4)


def abort(reason: AbortReason) -> bytes:
    """An A-ABORT PDU from the service provider."""
    return _HEADER.pack(PduType.ABORT, 4) + bytes([0, 0, 2, reason])


def p_data(context_id: int, fragment: bytes, *, command: bool, max_pdu_bytes: int) -> bytes:
    """P-DATA-TF PDUs that carry one whole command set or data set; `max_pdu_bytes` is the receiver's limit, 0 for none."""
    room = max(max_pdu_bytes - _PDV.size, 1) if max_pdu_bytes else max(len(fragment), 1)
    out = []
    for start in range(0, max(len(fragment), 1), room):
        part = fragment[start : start + room]
        control = (COMMAND if command else 0) | (LAST if start + room >= len(fragment) else 0)
        pdv = _PDV.pack(len(part) + _PDV_OVERHEAD, context_id, control)
        out.append(_HEADER.pack(PduType.P_DATA_TF, len(pdv) + len(part)) + pdv + part)
    return b"".join(out)


class PduStream:
    """One connection, read PDU by PDU and fragment by fragment. Not safe for two threads.

    `stall_seconds` bounds every single read and write; `deadline` (monotonic seconds) bounds all reads together.
    """

    def __init__(self, connection: socket.socket, stall_seconds: float) -> None:
        self._socket = connection
        self._buffer = bytearray(4_096)  # grows to BUFFER_BYTES once the association is accepted
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0
        self._socket.settimeout(stall_seconds)
        self.deadline = float("inf")
        self.before_reuse: Callable[[], None] = _nothing_kept

    def set_stall_seconds(self, seconds: float) -> None:
        """Changes the bound of a single read or write."""
        self._socket.settimeout(seconds)

    def enlarge(self) -> None:
        """Takes the large buffer; called when the peer is known, so that strangers never cost one."""
        rest = bytes(self._view[self._start : self._end])
        self._view.release()
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._view[: len(rest)] = rest
        self._start, self._end = 0, len(rest)

    def header(self) -> tuple[int, int]:
        """Type and body length of the next PDU; raises `PeerGoneError` at the end of the connection."""
        self._need(_HEADER.size)
        kind, length = _HEADER.unpack_from(self._buffer, self._start)
        self._start += _HEADER.size
        return kind, length

    def request(self) -> bytes:
        """The first PDU, which must be an A-ASSOCIATE-RQ of at most `MAX_REQUEST_BYTES`, with its header."""
        kind, length = self.header()
        if kind != PduType.ASSOCIATE_RQ:
            raise ProtocolError("first PDU is no A-ASSOCIATE-RQ", AbortReason.UNEXPECTED_PDU)
        if length > MAX_REQUEST_BYTES:
            raise ProtocolError("A-ASSOCIATE-RQ is too long", AbortReason.INVALID_PARAMETER)
        body = bytearray()  # grows with what arrives, never with what is claimed
        while len(body) < length:
            body += self._some(length - len(body))
        return _HEADER.pack(kind, length) + bytes(body)

    def control_body(self, length: int) -> bytes:
        """The body of an A-RELEASE or A-ABORT PDU."""
        if length != _MAX_CONTROL_PDU_BYTES:
            raise ProtocolError("control PDU has a wrong length", AbortReason.INVALID_PARAMETER)
        self._need(length)
        body = bytes(self._view[self._start : self._start + length])
        self._start += length
        return body

    def fragments(self, length: int, max_pdu_bytes: int) -> Iterator[tuple[int, int, memoryview]]:
        """(context id, control byte, piece) of each PDV of a P-DATA-TF PDU whose body has `length` bytes.

        A PDV that is not wholly in the buffer comes in several pieces; only its last piece carries the LAST bit.
        """
        if length > max_pdu_bytes:
            raise ProtocolError("P-DATA-TF is longer than the agreed maximum", AbortReason.INVALID_PARAMETER)
        remaining = length
        while remaining:
            if remaining < _PDV.size:
                raise ProtocolError("PDV header breaks off", AbortReason.INVALID_PARAMETER)
            self._need(_PDV.size)
            pdv_length, context_id, control = _PDV.unpack_from(self._buffer, self._start)
            self._start += _PDV.size
            remaining -= _PDV.size
            left = pdv_length - _PDV_OVERHEAD
            if left < 0 or left > remaining:
                raise ProtocolError("PDV is longer than its PDU", AbortReason.INVALID_PARAMETER)
            remaining -= left
            while True:
                piece = self._some(left)
                left -= len(piece)
                yield context_id, (control if left == 0 else control & ~LAST), piece
                if left == 0:
                    break

    def send(self, data: bytes) -> None:
        """Sends all of `data`."""
        try:
            self._socket.sendall(data)
        except (TimeoutError, ssl.SSLWantWriteError) as error:
            raise PeerStalledError("the peer takes no bytes") from error
        except OSError as error:
            raise PeerGoneError("connection lost while sending") from error

    def _some(self, wanted: int) -> memoryview:
        """Up to `wanted` bytes, at least one unless `wanted` is 0."""
        if wanted and self._start == self._end:
            self._fill(1)
        take = min(wanted, self._end - self._start)
        piece = self._view[self._start : self._start + take]
        self._start += take
        return piece

    def _need(self, count: int) -> None:
        while self._end - self._start < count:
            self._fill(count)

    def _fill(self, count: int) -> None:
        """Reads once, after making sure that `count` bytes have room from the first unread one on."""
        if len(self._buffer) - self._start < max(count, _LEAST_READ_BYTES):
            self.before_reuse()
            unread = self._end - self._start
            self._view[:unread] = self._view[self._start : self._end]
            self._start, self._end = 0, unread
        if time.monotonic() > self.deadline:
            raise PeerStalledError("the peer is too slow to finish what it began")
        try:
            received = self._socket.recv_into(self._view[self._end :])
        except (TimeoutError, ssl.SSLWantReadError) as error:
            raise PeerStalledError("the peer sends nothing") from error
        except OSError as error:
            raise PeerGoneError("connection lost while receiving") from error
        if received == 0:
            raise PeerGoneError("connection closed")
        self._end += received

    def rewind(self) -> None:
        """Starts the buffer anew between two messages, when nothing in it is needed any more."""
        if self._start == self._end:
            self._start = self._end = 0


def _nothing_kept() -> None:
    """Nobody keeps views."""
