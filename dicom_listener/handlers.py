"""What the listener does with each message: C-ECHO, C-STORE, N-ACTION. One bad instance never ends an association."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

import structlog

from dicom_listener import attributes, statuses
from dicom_listener.arrivals import Ranking, arrival
from dicom_listener.attributes import Attributes
from dicom_listener.commands import Command
from dicom_listener.committer import Rows
from dicom_listener.metrics import Metrics
from dicom_listener.negotiation import Context
from dicom_listener.statuses import Status
from dicom_listener.storage import Incoming, Store
from worker.core.arrivals import Arrival, Recorded
from worker.core.errors import InvalidObjectError, RetryableError, StoreUnavailableError
from worker.core.records import Disposition
from worker.core.settings import Peer

log = structlog.get_logger(__name__)

MOST_REPLACEMENTS = 2  # retention passes a study once in a run
MOST_ACTION_BYTES = 4 << 20  # 40,000 references


@dataclass(frozen=True)
class Services:
    """What handlers work with; one for all associations of a process."""

    store: Store
    ranking: Ranking
    metrics: Metrics


@dataclass(frozen=True)
class Sender:
    """The other end of one association."""

    association: int
    calling_ae_title: str
    address: str
    peer: Peer | None
    rows: Rows


class Sink(Protocol):
    """Where the data set of one message goes."""

    def write(self, piece: memoryview) -> None:
        """Takes the next piece, which stays as it is until `flush`; never raises because of what it holds."""

    def flush(self) -> None:
        """Lets go of every piece."""

    def finish(self) -> Status:
        """The data set is whole; the status to answer."""

    def abandon(self) -> None:
        """The association ended inside the message."""


class RefusingSink:
    """Lets a data set pass that is refused before it came."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def write(self, piece: memoryview) -> None:
        """Forgets the piece."""

    def flush(self) -> None:
        """Keeps none."""

    def finish(self) -> Status:
        """The status that was decided at the start."""
        return self._status

    def abandon(self) -> None:
        """Nothing to clear away."""


class ActionSink:
    """Collects the small data set of an N-ACTION."""

    def __init__(self, act: Callable[[bytes], Status]) -> None:
        self._act = act
        self._data = bytearray()

    def write(self, piece: memoryview) -> None:
        """Collects up to the bound; a longer data set is refused at its end."""
        if len(self._data) <= MOST_ACTION_BYTES:
            self._data += piece

    def flush(self) -> None:
        """Keeps none: pieces were copied."""

    def finish(self) -> Status:
        """Does the action."""
        return self._act(bytes(self._data)) if len(self._data) <= MOST_ACTION_BYTES else Status.PROCESSING_FAILURE

    def abandon(self) -> None:
        """Nothing to clear away."""


class StoreSink:
    """Streams one data set into the store; the handler of C-STORE."""

    def __init__(self, services: Services, sender: Sender, command: Command, context: Context) -> None:
        self._services = services
        self._sender = sender
        self._command = command
        self._context = context
        self._incoming: Incoming | None = None
        self._status = self._check()
        if self._status is Status.SUCCESS:
            self._guarded(self._open)

    def write(self, piece: memoryview) -> None:
        """Takes the piece; after a failure the rest of the data set passes by."""
        if self._incoming is not None:
            self._guarded(self._incoming.add, piece)

    def flush(self) -> None:
        """Writes what was taken."""
        if self._incoming is not None:
            self._guarded(self._incoming.flush)

    def finish(self) -> Status:
        """Makes the instance durable and says how that went."""
        if self._incoming is not None:
            self._guarded(self._store)
        self._services.metrics.instances.labels(self._status.name.lower()).inc()
        if self._status is not Status.SUCCESS:
            log.warning("instance_refused", association_id=str(self._sender.association), status=self._status)
        return self._status

    def abandon(self) -> None:
        """Removes what was written so far."""
        if self._incoming is not None:
            self._incoming.discard()
            self._incoming = None

    def _check(self) -> Status:
        if self._command.class_uid != self._context.abstract_syntax:
            return Status.SOP_CLASS_NOT_SUPPORTED
        return Status.SUCCESS if attributes.valid_uid(self._command.instance_uid) else Status.INVALID_SOP_INSTANCE

    def _open(self) -> None:
        self._incoming = self._services.store.receive(
            self._command.class_uid,
            self._command.instance_uid,
            self._context.transfer_syntax,
            self._sender.calling_ae_title,
        )

    def _guarded(self, step: Callable[..., None], *arguments: memoryview) -> None:
        """Runs a step; whatever goes wrong becomes a status. The door of C-STORE: nothing passes it."""
        try:
            step(*arguments)
            return
        except _RefusedError as refused:
            self._status = refused.status
        except InvalidObjectError:
            self._status = Status.CANNOT_UNDERSTAND
        except RetryableError as error:
            log.error("instance_not_stored", association_id=str(self._sender.association), exc_info=error)
            self._status = Status.OUT_OF_RESOURCES
        except Exception as error:
            log.error("store_handler_failed", association_id=str(self._sender.association), exc_info=error)
            self._status = Status.PROCESSING_FAILURE
        try:
            self.abandon()
        except OSError:
            log.error("incoming_file_left", association_id=str(self._sender.association))

    def _store(self) -> None:
        incoming = self._incoming
        if incoming is None or incoming.data_set_bytes == 0:
            raise _RefusedError(Status.EMPTY_DATA_SET)
        held = incoming.seal()
        said = held.attributes()
        self._match(said)
        services = self._services
        name = services.store.name(held, said.study_uid, said.sop_instance_uid)
        priority = services.ranking.rank(said, self._sender.peer.priority if self._sender.peer else None)
        row = arrival(held, said, name, self._sender.calling_ae_title, priority, datetime.now(UTC))
        recorded = self._keep(incoming, name, row)
        incoming.discard()
        self._incoming = None
        self._note(recorded, held.size_bytes)

    def _keep(self, incoming: Incoming, name: str, row: Arrival) -> Recorded:
        """File, then row; once more when retention, on its way before the row's commit, took the file away again."""
        incoming.place(name)
        recorded = self._sender.rows.commit(row)
        for _ in range(MOST_REPLACEMENTS):
            if self._services.store.holds(name):
                return recorded
            log.warning("stored_file_gone", association_id=str(self._sender.association))
            incoming.place(name)
            self._sender.rows.commit(row)  # takes back what retention wrote into it meanwhile
        if self._services.store.holds(name):
            return recorded
        raise StoreUnavailableError("a file is removed from the store as often as it is placed; look who does it")

    def _match(self, said: Attributes) -> None:
        """Refuses a data set that is not what its request announced."""
        if not said.study_uid or not said.series_uid:
            raise _RefusedError(Status.MISSING_STUDY_OR_SERIES_UID)
        if not (attributes.valid_uid(said.study_uid) and attributes.valid_uid(said.series_uid)):
            raise _RefusedError(Status.INVALID_STUDY_OR_SERIES_UID)
        if said.sop_class_uid != self._command.class_uid or said.sop_instance_uid != self._command.instance_uid:
            raise _RefusedError(Status.DATA_SET_DOES_NOT_MATCH)

    def _note(self, recorded: Recorded, size_bytes: int) -> None:
        metrics = self._services.metrics
        metrics.bytes.inc(size_bytes)
        if recorded.corrected:
            metrics.corrections.inc()
            log.info("instance_corrected", study_id=recorded.study_id, revision=recorded.revision)
        elif recorded.repeated:
            metrics.duplicates.inc()
        elif recorded.disposition is Disposition.VARIANT:
            metrics.variants.inc()  # whether it shows the same picture is decided where pixels are decoded
        elif recorded.disposition is Disposition.CONFLICT:
            metrics.conflicts.inc()
            log.error("instance_conflict", study_id=recorded.study_id, disposition=recorded.disposition.value)
        if recorded.new_revision:
            log.info("study_reopened", study_id=recorded.study_id, revision=recorded.revision)


class _RefusedError(Exception):
    """Carries a status out of the steps of one C-STORE."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.name)
        self.status = status


def handle_echo() -> Status:
    """C-ECHO touches neither disk nor database, so that it answers when both are blocked."""
    return Status.SUCCESS


def comment(status: Status) -> str:
    """The Error Comment that goes with a status, empty for success."""
    return statuses.COMMENTS.get(status, "")
