"""One association, one blocking thread: negotiate, receive, answer, until release, abort, silence or stop."""

import socket
import ssl
import threading
import time
from collections.abc import Mapping
from enum import StrEnum
from typing import Protocol

import structlog

from dicom_listener import commands, handlers, negotiation, pdus
from dicom_listener.commands import Command, CommandField
from dicom_listener.commitment import CommitmentService, Report
from dicom_listener.committer import Rows
from dicom_listener.handlers import ActionSink, RefusingSink, Sender, Services, Sink, StoreSink
from dicom_listener.negotiation import Accepted, Context, Refusal, Refused
from dicom_listener.pdus import AbortReason, PduStream, PduType, PeerGoneError, PeerStalledError, ProtocolError
from dicom_listener.statuses import Status
from worker.core.errors import InvalidObjectError
from worker.core.settings import DicomSettings

log = structlog.get_logger(__name__)

LONGEST_MESSAGE_SECONDS = 3600.0  # a gigabyte over a slow line; a peer that drips bytes does not hold a thread for ever
_STORE_RQ, _ECHO_RQ, _ACTION_RQ = CommandField.C_STORE_RQ, CommandField.C_ECHO_RQ, CommandField.N_ACTION_RQ


class Ending(StrEnum):
    """How an association ended."""

    RELEASED = "released"
    REFUSED = "refused"
    ABORTED_BY_PEER = "aborted_by_peer"
    PROTOCOL_ERROR = "protocol_error"
    STALLED = "stalled"
    CONNECTION_LOST = "connection_lost"
    STOPPED = "stopped"


class House(Protocol):
    """What an association needs of the server."""

    settings: DicomSettings
    services: Services
    commitments: CommitmentService

    def admit(self, association: "Association") -> Refusal | None:
        """Counts the association in, or says why not."""

    def refused(self, refused: Refused, address: str) -> None:
        """Notes a refused association."""

    def ended(self, association: "Association", ending: Ending) -> None:
        """Notes the end."""


class Association(threading.Thread):
    """Serves one accepted connection; one that came in by a port with TLS has its context."""

    def __init__(
        self,
        house: House,
        number: int,
        connection: socket.socket,
        address: str,
        rows: Rows,
        tls: ssl.SSLContext | None,
    ) -> None:
        super().__init__(name=f"association-{number}", daemon=True)
        self.number = number
        self.address = address
        self.established = False
        self.leaving = False
        self._house = house
        self._connection = connection
        self._rows = rows
        self._tls = tls
        self._stream: PduStream | None = None
        self._sender: Sender | None = None
        self._contexts: Mapping[int, Context] = {}
        self._peer_max_pdu_bytes = 0
        self._command_bytes = bytearray()
        self._command: Command | None = None
        self._context_id = 0
        self._sink: Sink | None = None
        self._reports: dict[int, Report] = {}  # N-EVENT-REPORTs whose answer is awaited, by message id
        self._message_id = 0
        self._lock = threading.Lock()
        self._in_message = False
        self._stopping = False

    def run(self) -> None:
        """The whole life of the association."""
        ending = Ending.CONNECTION_LOST
        try:
            ending = self._serve()
        except ProtocolError as error:
            log.warning("protocol_error", association_id=str(self.number), address=self.address, reason=error)
            self._abort(error.reason)
            ending = Ending.PROTOCOL_ERROR
        except PeerStalledError:
            self._abort(AbortReason.NOT_SPECIFIED)
            ending = Ending.STALLED
        except PeerGoneError:
            ending = Ending.STOPPED if self._stopping else Ending.CONNECTION_LOST
            self._abort(AbortReason.NOT_SPECIFIED)
        finally:
            try:
                self._let_go()
            finally:
                self._house.ended(self, ending)

    def _let_go(self) -> None:
        try:
            if self._sink is not None:
                self._sink.abandon()
        except OSError as error:  # the next start sweeps it
            log.error("incoming_file_left", association_id=str(self.number), exc_info=error)
        self._connection.close()
        self._rows.close()
        self._house.commitments.unanswered(self._reports.values())

    def stop(self) -> None:
        """Lets the message that is under way finish, then ends the association."""
        with self._lock:
            self._stopping = True
            if not self._in_message:
                self.cut()

    def cut(self) -> None:
        """Ends the connection at once, from any thread."""
        self.leaving = True
        try:
            # Not SSLSocket.shutdown, which would drop the TLS state under the reading thread.
            socket.socket.shutdown(self._connection, socket.SHUT_RDWR if self._in_message else socket.SHUT_RD)
        except OSError:
            return  # closed already

    def _serve(self) -> Ending:
        settings = self._house.settings
        self._connection.settimeout(settings.artim_seconds)
        deadline = time.monotonic() + settings.artim_seconds
        tls = self._tls is not None and not self._speaks_plainly()
        if self._tls is not None and tls:
            self._handshake(self._tls)
        stream = self._stream = PduStream(self._connection, settings.artim_seconds)
        stream.deadline = deadline
        outcome = self._negotiate(stream.request(), tls=tls)
        stream.deadline = float("inf")
        if isinstance(outcome, Refused):
            self._house.refused(outcome, self.address)
            stream.send(outcome.reply)
            return Ending.REFUSED
        self._sender = Sender(self.number, outcome.calling_ae_title, self.address, outcome.peer, self._rows)
        self._contexts = outcome.contexts
        self._peer_max_pdu_bytes = outcome.peer_max_pdu_bytes
        stream.enlarge()
        stream.set_stall_seconds(settings.idle_seconds)
        stream.send(outcome.reply)
        return self._receive(stream)

    def _speaks_plainly(self) -> bool:
        """Whether the first byte, which is there, is no TLS record's: such a peer is refused in words that it reads."""
        try:
            return self._connection.recv(1, socket.MSG_PEEK) == bytes([PduType.ASSOCIATE_RQ])
        except TimeoutError as error:
            raise PeerStalledError("nothing came in time") from error
        except OSError as error:
            raise PeerGoneError("the connection broke before its first byte") from error

    def _handshake(self, context: ssl.SSLContext) -> None:
        try:
            # In two steps, so that `cut` reaches the socket while the handshake waits.
            secured = context.wrap_socket(self._connection, server_side=True, do_handshake_on_connect=False)
            self._connection = secured
            secured.do_handshake()
        except TimeoutError as error:
            raise PeerStalledError("no TLS handshake in time") from error
        except OSError as error:  # SSLError among them
            raise PeerGoneError("TLS handshake failed") from error

    def _negotiate(self, request: bytes, *, tls: bool) -> Accepted | Refused:
        refuse = self._house.admit(self)
        tls_only = self._tls is not None
        settings = self._house.settings
        return negotiation.negotiate(request, settings, self.address, tls=tls, tls_only=tls_only, refuse=refuse)

    def _receive(self, stream: PduStream) -> Ending:
        max_pdu_bytes = self._house.settings.max_pdu_bytes
        while True:
            kind, length = stream.header()
            if kind == PduType.P_DATA_TF:
                for context_id, control, piece in stream.fragments(length, max_pdu_bytes):
                    self._take(stream, context_id, control, piece)
                if self._stopping and not self._in_message:
                    self._abort(AbortReason.NOT_SPECIFIED)
                    return Ending.STOPPED
            elif kind == PduType.RELEASE_RQ:
                stream.control_body(length)
                stream.send(pdus.RELEASE_RP)
                return Ending.RELEASED
            elif kind == PduType.ABORT:
                return Ending.ABORTED_BY_PEER
            else:
                raise ProtocolError("PDU of an unexpected type", AbortReason.UNEXPECTED_PDU)

    def _take(self, stream: PduStream, context_id: int, control: int, piece: memoryview) -> None:
        """One piece of a command set or of a data set."""
        if control & pdus.COMMAND:
            if self._sink is not None:
                raise ProtocolError("a command set inside a data set", AbortReason.UNEXPECTED_PARAMETER)
            if not self._command_bytes:
                self._begin_message(stream, context_id)
            self._command_bytes += piece
            if len(self._command_bytes) > commands.MAX_COMMAND_BYTES:
                raise ProtocolError("command set is too long", AbortReason.INVALID_PARAMETER)
            if control & pdus.LAST:
                self._begin_data_set(stream)
        else:
            if self._sink is None or context_id != self._context_id:
                raise ProtocolError("a data set without its command set", AbortReason.UNEXPECTED_PARAMETER)
            self._sink.write(piece)
            if control & pdus.LAST:
                sink, self._sink = self._sink, None
                self._answer(stream, sink.finish())
                self._end_message(stream)

    def _begin_message(self, stream: PduStream, context_id: int) -> None:
        if context_id not in self._contexts:
            raise ProtocolError("presentation context was not accepted", AbortReason.INVALID_PARAMETER)
        self._context_id = context_id
        stream.deadline = time.monotonic() + LONGEST_MESSAGE_SECONDS
        with self._lock:
            self._in_message = True

    def _begin_data_set(self, stream: PduStream) -> None:
        try:
            command = self._command = commands.decode(bytes(self._command_bytes))
        except InvalidObjectError as error:
            raise ProtocolError("command set cannot be decoded", AbortReason.INVALID_PARAMETER) from error
        self._command_bytes.clear()
        if command.has_data_set:
            self._sink = self._sink_of(command)
            stream.before_reuse = self._sink.flush
            return
        if command.field == CommandField.N_EVENT_REPORT_RSP:
            self._report_answered(command)
        elif command.field == _ECHO_RQ:
            self._answer(stream, handlers.handle_echo())
        elif command.field == _STORE_RQ:
            self._answer(stream, Status.EMPTY_DATA_SET)
        elif command.field == _ACTION_RQ:
            self._answer(stream, Status.NO_SUCH_ARGUMENT)
        elif command.field != CommandField.C_CANCEL_RQ and not command.field & commands.RESPONSE_BIT:
            self._answer(stream, Status.UNRECOGNIZED_OPERATION)
        self._end_message(stream)

    def _sink_of(self, command: Command) -> Sink:
        """Where the data set of a message goes."""
        context = self._contexts[self._context_id]
        assert self._sender is not None
        if command.field == _STORE_RQ:
            return StoreSink(self._house.services, self._sender, command, context)
        if command.field == _ACTION_RQ:
            return ActionSink(lambda data: self._act(command, context, data))
        return RefusingSink(Status.UNRECOGNIZED_OPERATION)

    def _answer(self, stream: PduStream, status: Status) -> None:
        """Sends the response to the present command, unless that is a response itself."""
        command = self._command
        assert command is not None
        if command.field & commands.RESPONSE_BIT:
            return
        response = commands.encode_response(command, status, handlers.comment(status))
        stream.send(pdus.p_data(self._context_id, response, command=True, max_pdu_bytes=self._peer_max_pdu_bytes))

    def _end_message(self, stream: PduStream) -> None:
        """Back to rest; a storage commitment that was just accepted is reported first."""
        self._command = None
        for report in self._house.commitments.take_reports(self.number):
            self._message_id = self._message_id % 0xFFFF + 1
            self._reports[self._message_id] = report
            self._send_report(stream, report)
        stream.deadline = float("inf")
        stream.rewind()
        with self._lock:
            self._in_message = False

    def _act(self, command: Command, context: Context, data: bytes) -> Status:
        assert self._sender is not None
        return self._house.commitments.request(self._sender, command, context, data)

    def _send_report(self, stream: PduStream, report: Report) -> None:
        transfer_syntax = self._contexts[self._context_id].transfer_syntax
        command = commands.encode_event_report(
            self._message_id, report.class_uid, report.instance_uid, report.event_type
        )
        for fragment, is_command in ((command, True), (report.encode(transfer_syntax), False)):
            limit = self._peer_max_pdu_bytes
            stream.send(pdus.p_data(self._context_id, fragment, command=is_command, max_pdu_bytes=limit))

    def _report_answered(self, command: Command) -> None:
        report = self._reports.pop(command.responded_to or 0, None)
        if report is not None:
            self._house.commitments.answered(report, command.status)

    def _abort(self, reason: AbortReason) -> None:
        """Sends an A-ABORT if the peer still takes one."""
        if self._stream is None:
            return
        try:
            self._stream.send(pdus.abort(reason))
        except (PeerGoneError, PeerStalledError):
            return  # nobody is there to hear it
