"""A small MLLP receiver that acknowledges: the other side of `mu2 demo`, and a receiver with bad habits for tests.

Not a production receiver: it keeps what it took in memory and understands nothing but MSH.
"""

import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Self

from worker.delivery import acknowledgement
from worker.delivery.mllp import END_BLOCK, START_BLOCK

MESSAGE_LIMIT_BYTES = 16_777_216
DRIBBLE_SECONDS = 0.02  # between two bytes of an answer that comes one by one
_READ_BYTES = 65_536


class Behaviour(StrEnum):
    """What the receiver does with one message."""

    AA = "AA"
    AE = "AE"
    AR = "AR"
    CA = "CA"
    CE = "CE"
    CR = "CR"
    CA_THEN_AA = "CA then AA"  # enhanced mode on one connection
    CA_THEN_AE = "CA then AE"
    AA_THEN_CLOSE = "AA then close"  # one message a connection, as many receivers do
    CLOSE = "close"  # reads the message and closes without a word
    HANG = "hang"  # reads the message and never answers
    GARBAGE = "garbage"  # bytes that are no MLLP block
    NOT_HL7 = "not HL7"  # an MLLP block that is no HL7
    OTHER_CONTROL_ID = "other control id"
    HALF = "half"  # the start of an answer, then the connection closes
    DRIBBLE = "dribble"  # an answer a byte at a time that takes seconds
    ENDLESS = "endless"  # an answer whose end block never comes


@dataclass(frozen=True)
class ReceivedMessage:
    """One message as it arrived, and what was done with it."""

    control_id: str  # MSH-10
    behaviour: Behaviour
    payload: bytes = field(repr=False)  # patient data


_ACCEPTING = {Behaviour.AA, Behaviour.CA, Behaviour.CA_THEN_AA, Behaviour.AA_THEN_CLOSE}


class MllpReceiver:
    """Listens on a loopback port, a thread for each connection; use it as a context manager.

    `script` is what to do with the first messages, one behaviour each; every later one gets `behaviour`, which may be
    changed while it runs. With `tls`, a server context, each connection starts with a handshake in its own thread.
    `text` stands in MSA-3 of every answer.
    """

    def __init__(
        self,
        port: int = 0,
        *,
        behaviour: Behaviour = Behaviour.AA,
        script: Iterable[Behaviour] = (),
        tls: ssl.SSLContext | None = None,
        text: str = "",
    ) -> None:
        self.behaviour = behaviour
        self.received: list[ReceivedMessage] = []
        self.connections = 0  # accepted so far
        self._requested_port = port
        self._script = deque(script)
        self._tls = tls
        self._text = text
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def port(self) -> int:
        """The port it listens on; 0 while it is stopped and none was asked for."""
        return int(self._listener.getsockname()[1]) if self._listener else self._requested_port

    @property
    def open_connections(self) -> int:
        """Connections that are open now."""
        with self._changed:
            return len(self._sockets)

    @property
    def accepted(self) -> dict[str, bytes]:
        """Messages that were accepted, by control id; one that came twice stands once, as it came first."""
        with self._changed:
            kept: dict[str, bytes] = {}
            for message in self.received:
                if message.behaviour in _ACCEPTING:
                    kept.setdefault(message.control_id, message.payload)
            return kept

    def wait_for(self, count: int, seconds: float) -> bool:
        """Waits until `count` messages have arrived, whatever was answered; False when the time ran out."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self.received) >= count, seconds)

    def start(self) -> None:
        """Binds to 127.0.0.1 and accepts connections until `stop`."""
        self._stopping.clear()
        self._listener = socket.create_server(("127.0.0.1", self._requested_port))
        self._spawn(self._accept, self._listener)

    def stop(self) -> None:
        """Closes the port and every connection and waits for the threads; the messages stay readable."""
        self._stopping.set()
        with self._changed:
            ends = [*self._sockets, *([self._listener] if self._listener else [])]
        for end in ends:
            try:
                end.shutdown(socket.SHUT_RDWR)  # wakes the thread that is blocked on it
            except OSError:
                continue  # the peer was faster
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        if self._listener:
            self._listener.close()
            self._listener = None

    def _spawn(self, run: Callable[[socket.socket], None], argument: socket.socket) -> None:
        thread = threading.Thread(target=run, args=(argument,), name="mllp-receiver", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while not self._stopping.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # shut down by `stop`
            if self._tls:
                # The wrapped socket replaces the plain one; the handshake waits for the connection's own thread.
                connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
            with self._changed:
                if self._stopping.is_set():
                    connection.close()  # `stop` has already looked through the open ones
                    return
                self._sockets.add(connection)
                self.connections += 1
            self._spawn(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        try:
            if isinstance(connection, ssl.SSLSocket):
                connection.do_handshake()
            self._converse(connection)
        except OSError:
            return  # the peer went away or spoke no TLS; a receiver has nobody to tell
        finally:
            connection.close()
            with self._changed:
                self._sockets.discard(connection)

    def _converse(self, connection: socket.socket) -> None:
        buffer = b""
        while not self._stopping.is_set():
            end = buffer.find(END_BLOCK)
            if end >= 0:
                message, buffer = buffer[:end].removeprefix(START_BLOCK), buffer[end + len(END_BLOCK) :]
                if not self._answer(connection, message):
                    return
                continue
            data = connection.recv(_READ_BYTES)
            if not data or len(buffer) > MESSAGE_LIMIT_BYTES:
                return
            buffer += data

    def _answer(self, connection: socket.socket, message: bytes) -> bool:
        """Acts on one message; returns whether the connection stays open."""
        with self._changed:
            behaviour = self._script.popleft() if self._script else self.behaviour
            self.received.append(ReceivedMessage(acknowledgement.control_id_of(message), behaviour, message))
            self._changed.notify_all()
        match behaviour:
            case Behaviour.HANG:
                return True
            case Behaviour.CLOSE:
                return False
            case Behaviour.GARBAGE:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            case Behaviour.NOT_HL7:
                connection.sendall(START_BLOCK + b"accepted" + END_BLOCK)
            case Behaviour.OTHER_CONTROL_ID:
                connection.sendall(self._frame(message, "AA", "ANOTHER"))
            case Behaviour.HALF:
                connection.sendall(self._frame(message, "AA")[:20])
                return False
            case Behaviour.DRIBBLE:
                self._dribble(connection, self._frame(message, "AA"))
            case Behaviour.ENDLESS:
                self._flood(connection)
            case _:
                for code in (word for word in behaviour.split() if word in acknowledgement.CODES):
                    connection.sendall(self._frame(message, code))
                return behaviour is not Behaviour.AA_THEN_CLOSE
        return True

    def _frame(self, message: bytes, code: str, control_id: str | None = None) -> bytes:
        return START_BLOCK + acknowledgement.compose(message, code, control_id, self._text) + END_BLOCK

    def _dribble(self, connection: socket.socket, frame: bytes) -> None:
        for byte in frame:
            if self._stopping.wait(DRIBBLE_SECONDS):
                return
            connection.sendall(bytes([byte]))

    def _flood(self, connection: socket.socket) -> None:
        connection.sendall(START_BLOCK + b"MSH|^~\\&|")
        while not self._stopping.is_set():
            connection.sendall(b"x" * _READ_BYTES)
