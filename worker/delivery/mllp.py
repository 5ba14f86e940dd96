"""MLLP client: one HL7 v2 message out, one acknowledgement in, over a connection that is kept.

The client sends a message at most once a call. When the connection breaks after bytes have left, nobody can know
whether the receiver took them, so the call raises `DeliveryUnavailableError` and the outbox decides: it sends the same
bytes with the same control id later, which a receiver recognises (HL7 2.5.1 §2.9.2). A client that resent by itself
would hide that.

Source: HL7 Transport Specification MLLP, release 1 (block framing); HL7 2.5.1 §2.9 (acknowledgements).
"""

import socket
import ssl
import threading
import time
from types import TracebackType
from typing import NoReturn, Self

from worker.core.errors import (
    DeliveryRefusedError,
    DeliveryUnavailableError,
    DeliveryUnreachableError,
    SettingsError,
)
from worker.core.settings import Destination
from worker.delivery import acknowledgement
from worker.delivery.acknowledgement import Acknowledgement

START_BLOCK = b"\x0b"
END_BLOCK = b"\x1c\r"
ANSWER_LIMIT_BYTES = 65_536  # an acknowledgement is a few hundred bytes; more is not one
KEEPALIVE_IDLE_SECONDS = 30  # firewalls forget silent connections after minutes
KEEPALIVE_INTERVAL_SECONDS = 10
KEEPALIVE_PROBES = 3
_READ_BYTES = 4_096


class MllpConnection:
    """A connection to one destination, opened when first needed and kept between messages.

    Calls are serialised: one message of a destination is under way at a time, so the order of calls is the order of
    arrival. Use it as a context manager, or call `close`.
    """

    def __init__(self, destination: Destination) -> None:
        self.destination = destination
        self._socket: socket.socket | None = None
        self._received = b""  # bytes behind the last answer's end block
        self._stored: set[str] = set()  # answered CA on this connection: their application answer may come any time
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; the next `send` opens a new one."""
        with self._lock:
            self._disconnect()

    def send(self, payload: bytes, control_id: str) -> Acknowledgement:
        """Sends one message and returns the acknowledgement that accepts it: AA, or CA (safely stored: stop resending).

        After CA the application's own answer is awaited only when the destination says so, and for `answer_seconds`;
        if it does not come the CA stands, because a stored message must not be sent again.

        Raises `DeliveryUnavailableError` when the destination cannot be reached, does not answer in time, answers AE or
        CE, something that is no acknowledgement, or about another control id; `DeliveryRefusedError` on AR and CR; both
        carry the code and the receiver's text. Raises `SettingsError` when the TLS files cannot be used.
        """
        if START_BLOCK in payload or b"\x1c" in payload:
            raise DeliveryRefusedError("the message holds an MLLP block character; it was not written by this system")
        with self._lock:
            try:
                answer = self._exchange(START_BLOCK + payload + END_BLOCK, control_id)
            except BaseException:
                self._disconnect()  # what comes later on a broken exchange could be taken for the next answer
                raise
        if not answer.is_accepted:
            _raise_for(answer)
        return answer

    def _exchange(self, frame: bytes, control_id: str) -> Acknowledgement:
        connection = self._connected()
        deadline = time.monotonic() + self.destination.answer_seconds
        self._write(connection, frame, deadline)
        answer = self._answer(connection, control_id, deadline)
        if answer.code == "CA" and self.destination.wait_for_application_answer:
            return self._application_answer(connection, control_id) or answer
        if answer.code == "CA":
            self._stored.add(control_id)
        return answer

    def _application_answer(self, connection: socket.socket, control_id: str) -> Acknowledgement | None:
        """The answer that follows a CA, or None when none comes that can be used."""
        try:
            return self._answer(connection, control_id, time.monotonic() + self.destination.answer_seconds)
        except DeliveryUnavailableError:
            self._disconnect()  # it may still arrive, and would be taken for the next message's
            return None

    def _answer(self, connection: socket.socket, control_id: str, deadline: float) -> Acknowledgement:
        answer = acknowledgement.parse(self._read(connection, deadline))
        while answer.control_id in self._stored and answer.control_id != control_id:
            answer = acknowledgement.parse(self._read(connection, deadline))
        if answer.control_id != control_id:
            raise DeliveryUnavailableError(
                "the receiver acknowledged another control id (MSA-2); it may have lost its place", answer.code
            )
        return answer

    def _connected(self) -> socket.socket:
        if self._socket is not None and not self._is_quiet(self._socket):
            self._disconnect()
        if self._socket is None:
            self._socket = _connect(self.destination)
        return self._socket

    def _is_quiet(self, connection: socket.socket) -> bool:
        """Whether a kept connection is open with nothing to read.

        A receiver that closes after each message is met here, before a byte of the next one leaves. Bytes that nobody
        asked for (a late answer) make the connection as useless as its end does.
        """
        if self._received:
            return False
        connection.settimeout(0)
        try:
            connection.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        except OSError:
            return False
        return False

    def _disconnect(self) -> None:
        self._received = b""
        self._stored.clear()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _write(self, connection: socket.socket, frame: bytes, deadline: float) -> None:
        remaining = memoryview(frame)
        while remaining:
            connection.settimeout(_left(deadline))
            try:
                remaining = remaining[connection.send(remaining) :]
            except TimeoutError as error:
                raise DeliveryUnavailableError("the receiver stopped reading in the middle of the message") from error
            except OSError as error:
                raise DeliveryUnavailableError(f"the connection broke while sending ({_cause(error)})") from error

    def _read(self, connection: socket.socket, deadline: float) -> bytes:
        """One framed answer without its block characters; `deadline` bounds the whole answer, not each byte."""
        while True:
            if self._received and not self._received.startswith(START_BLOCK):
                raise DeliveryUnavailableError("the receiver answered something that is not an MLLP block")
            end = self._received.find(END_BLOCK)
            if end >= 0:
                answer, self._received = self._received[1:end], self._received[end + len(END_BLOCK) :]
                return answer
            if len(self._received) > ANSWER_LIMIT_BYTES:
                raise DeliveryUnavailableError(f"the answer is longer than {ANSWER_LIMIT_BYTES} bytes")
            self._received += self._read_some(connection, deadline)

    def _read_some(self, connection: socket.socket, deadline: float) -> bytes:
        connection.settimeout(_left(deadline))
        try:
            data = connection.recv(_READ_BYTES)
        except TimeoutError as error:
            raise self._no_answer() from error
        except OSError as error:
            raise DeliveryUnavailableError(f"the connection broke before the answer ({_cause(error)})") from error
        if not data:
            raise DeliveryUnavailableError("the receiver closed the connection without a whole answer")
        return data

    def _no_answer(self) -> DeliveryUnavailableError:
        seconds = self.destination.answer_seconds
        what = "only part of an answer" if self._received else "no answer"
        return DeliveryUnavailableError(f"{what} within {seconds:g} s (answer_seconds)")


def probe(destination: Destination) -> None:
    """Opens a connection, TLS handshake included, and closes it again; no message is sent.

    Raises `DeliveryUnavailableError` when it cannot be opened, `SettingsError` when the TLS files cannot be used.
    """
    _connect(destination).close()


def _raise_for(answer: Acknowledgement) -> NoReturn:
    if answer.code in acknowledgement.REFUSED:
        raise DeliveryRefusedError(f"the receiver rejected the message ({answer.code})", answer.code, answer.text)
    raise DeliveryUnavailableError(f"the receiver reported an error ({answer.code})", answer.code, answer.text)


def _left(deadline: float) -> float:
    """Seconds until the deadline, never 0: to a socket that would mean "do not wait"."""
    return max(deadline - time.monotonic(), 0.001)


def _cause(error: OSError) -> str:
    """The system's or TLS's own word for what happened; neither quotes the message."""
    if isinstance(error, ssl.SSLError):
        return error.reason or "TLS error"
    return error.strerror or type(error).__name__


def _connect(destination: Destination) -> socket.socket:
    """A connected socket, its TLS handshake done; both within `connect_seconds`."""
    context = _tls_context(destination) if destination.tls else None
    deadline = time.monotonic() + destination.connect_seconds
    where = f"{destination.host}:{destination.port}"
    try:
        connection = socket.create_connection((destination.host, destination.port), destination.connect_seconds)
    except UnicodeError as error:  # the codec of host names, before any look-up
        raise DeliveryUnreachableError(f"no connection to {where} (that is no host name)") from error
    except OSError as error:
        raise DeliveryUnreachableError(f"no connection to {where} ({_cause(error)})") from error
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    if context is None:
        return connection
    connection.settimeout(_left(deadline))
    try:
        return context.wrap_socket(connection, server_hostname=destination.host)
    except OSError as error:
        connection.close()
        raise DeliveryUnreachableError(f"no TLS connection to {where} ({_cause(error)})") from error


def _tls_context(destination: Destination) -> ssl.SSLContext:
    """The TLS context of a destination: the receiver's certificate and host name are always checked."""
    try:
        context = ssl.create_default_context(cafile=destination.tls_ca)
        if destination.tls_certificate:
            context.load_cert_chain(destination.tls_certificate, destination.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(
            f"the TLS files of destination {destination.name} cannot be used ({_cause(error)}); "
            "check tls_ca, tls_certificate and tls_key"
        ) from error
    return context
