"""Storage Commitment Push Model: N-ACTION in, N-EVENT-REPORT out (PS3.4 annex J). Off unless a site turns it on.

A request becomes a row before it is answered, so that the report goes out even after a restart: on the association that
asked while it is open, else on a new one to the port that the peer's settings name. Instances that were confirmed are
marked, and retention leaves them alone: the modality may have erased its only copy.
"""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from io import BytesIO

import sqlalchemy as sa
import structlog
from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom import AE, build_role
from pynetdicom.dsutils import decode, encode
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from dicom_listener import attributes
from dicom_listener.commands import Command
from dicom_listener.handlers import Sender
from dicom_listener.negotiation import COMMITMENT_CLASS, Context
from dicom_listener.statuses import Status
from dicom_listener.storage import Store
from dicom_listener.tls import client_context
from worker.core.database import Database
from worker.core.errors import DatabaseUnavailableError, SettingsError
from worker.core.records import Commitment, CommitmentState, Disposition, Instance, Study, new_id
from worker.core.settings import DicomSettings, Peer

log = structlog.get_logger(__name__)

WELL_KNOWN_INSTANCE = "1.2.840.10008.1.20.1.1"
REQUEST_COMMITMENT = 1  # action type
ALL_COMMITTED, SOME_FAILED = 1, 2  # event types
MAX_ATTEMPTS = 8
FIRST_WAIT_SECONDS = 5.0
TICK_SECONDS = 2.0
_CHUNK = 500
_DECODER_ERRORS = (ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, NotImplementedError, OSError)


@dataclass(frozen=True)
class Report:
    """What the peer is told about one request."""

    commitment_id: str
    transaction_uid: str
    committed: Sequence[tuple[str, str]]  # SOP class, SOP instance
    failed: Sequence[tuple[str, str, int]]  # SOP class, SOP instance, failure reason
    class_uid: str = COMMITMENT_CLASS
    instance_uid: str = WELL_KNOWN_INSTANCE

    @property
    def event_type(self) -> int:
        """1 when every instance is safe here, 2 when one is not."""
        return SOME_FAILED if self.failed else ALL_COMMITTED

    def data_set(self) -> Dataset:
        """The Event Information (PS3.4 table J.3-2)."""
        data = Dataset()
        data.TransactionUID = self.transaction_uid
        if self.committed:
            data.ReferencedSOPSequence = [_reference(c, i) for c, i in self.committed]
        if self.failed:
            data.FailedSOPSequence = [_reference(c, i, reason) for c, i, reason in self.failed]
        return data

    def encode(self, transfer_syntax: str) -> bytes:
        """The Event Information in the syntax of a presentation context."""
        syntax = UID(transfer_syntax)
        encoded = encode(self.data_set(), syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated)
        if encoded is None:
            raise ValueError("a storage commitment report cannot be encoded")
        return encoded


def _reference(class_uid: str, instance_uid: str, reason: int | None = None) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = class_uid
    item.ReferencedSOPInstanceUID = instance_uid
    if reason is not None:
        item.FailureReason = reason
    return item


class CommitmentService:
    """Takes requests from associations and delivers what could not be reported on them. Safe for threads."""

    def __init__(self, settings: DicomSettings, store: Store, database: Database) -> None:
        self._settings = settings
        self._store = store
        self._database = database
        self._ready: dict[int, list[Report]] = {}  # association → reports to send on it
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="commitments", daemon=True)

    def start(self) -> None:
        """Starts the thread that delivers late reports; does nothing where the service is off."""
        if self._settings.storage_commitment:
            self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def is_alive(self) -> bool:
        """Whether the thread runs, or need not because the service is off."""
        return self._thread.is_alive() or not self._settings.storage_commitment

    def request(self, sender: Sender, command: Command, context: Context, data: bytes) -> Status:
        """Answers an N-ACTION-RQ; its report is then ready for `take_reports`."""
        if command.class_uid != COMMITMENT_CLASS or context.abstract_syntax != COMMITMENT_CLASS:
            return Status.NO_SUCH_SOP_CLASS
        if command.action_type != REQUEST_COMMITMENT:
            return Status.NO_SUCH_ACTION
        try:
            syntax = UID(context.transfer_syntax)
            wanted = decode(BytesIO(data), syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated)
            transaction = str(wanted.TransactionUID)
            items = [
                [str(i.ReferencedSOPClassUID), str(i.ReferencedSOPInstanceUID)] for i in wanted.ReferencedSOPSequence
            ]
        except _DECODER_ERRORS:
            return Status.NO_SUCH_ARGUMENT
        if not items:
            return Status.NO_SUCH_ARGUMENT
        if not all(attributes.valid_uid(uid) for uid in [transaction, *(uid for item in items for uid in item)]):
            return Status.INVALID_ATTRIBUTE_VALUE
        row = Commitment(
            id=new_id(),
            transaction_uid=transaction,
            calling_ae=sender.calling_ae_title,
            address=sender.address,
            items=items,
            state=CommitmentState.WAITING,
            requested_at=datetime.now(UTC),
            due_at=datetime.now(UTC) + timedelta(seconds=self._settings.idle_seconds),
            attempts=0,
        )
        try:
            report = self._database.run(lambda session: self._accept(session, row))
        except (DatabaseUnavailableError, SQLAlchemyError) as error:
            log.error("commitment_not_accepted", exc_info=error)
            return Status.PROCESSING_FAILURE
        with self._lock:
            self._ready.setdefault(sender.association, []).append(report)
        log.info("commitment_accepted", commitment_id=row.id, count=len(items))
        return Status.SUCCESS

    def take_reports(self, association: int) -> list[Report]:
        """Reports that this association is to send now."""
        if not self._ready:
            return []
        with self._lock:
            return self._ready.pop(association, [])

    def answered(self, report: Report, status: int | None) -> None:
        """The peer answered a report on the association that asked."""
        if status != Status.SUCCESS:
            self.unanswered([report])
            return
        try:
            self._finish(report.commitment_id, CommitmentState.REPORTED)
        except DatabaseUnavailableError as error:  # told once more later, which the standard allows
            log.warning("commitment_postponed", error=type(error).__name__)

    def unanswered(self, reports: Iterable[Report]) -> None:
        """The association ended before these were answered: they are due on a new one."""
        ids = [report.commitment_id for report in reports]
        if not ids:
            return
        change = sa.update(Commitment).where(Commitment.id.in_(ids)).values(due_at=datetime.now(UTC))
        try:
            self._database.run(lambda session: session.execute(change))
        except DatabaseUnavailableError as error:  # the rows are due anyway once their first time is over
            log.warning("commitment_postponed", error=type(error).__name__)

    def _accept(self, session: Session, row: Commitment) -> Report:
        """Stores the request, marks what is here, and says what the peer is to be told."""
        if session.get(Commitment, row.id) is None:
            session.add(Commitment(**{c.key: getattr(row, c.key) for c in sa.inspect(Commitment).column_attrs}))
        return self._resolve(session, row)

    def _resolve(self, session: Session, row: Commitment) -> Report:
        uids = sorted({instance for _, instance in row.items})
        self._lock_studies(session, uids)
        stored, disputed = self._stored(session, uids), self._disputed(session, uids)
        committed, failed = [], []
        for class_uid, instance_uid in row.items:
            found = stored.get(instance_uid)
            if found is None:
                failed.append((class_uid, instance_uid, int(Status.NO_SUCH_OBJECT_INSTANCE)))
            elif found[1] != class_uid or instance_uid in disputed:
                failed.append((class_uid, instance_uid, int(Status.CLASS_INSTANCE_CONFLICT)))
            else:
                committed.append((class_uid, instance_uid))
        ids = [stored[instance][0] for _, instance in committed]
        for start in range(0, len(ids), _CHUNK):
            session.execute(
                sa.update(Instance)
                .where(Instance.id.in_(ids[start : start + _CHUNK]), Instance.committed_at.is_(None))
                .values(committed_at=datetime.now(UTC))
            )
        return Report(row.id, row.transaction_uid, committed, failed)

    def _lock_studies(self, session: Session, uids: Sequence[str]) -> None:
        """Keeps retention, which locks a study while its files go, away until what is promised here is committed.

        SQLite has no rows to lock: its writing transactions queue.
        """
        for start in range(0, len(uids), _CHUNK):
            of_instances = sa.select(Instance.study_id).where(
                Instance.sop_instance_uid.in_(uids[start : start + _CHUNK])
            )
            session.execute(
                sa.select(Study.id)
                .where(Study.id.in_(of_instances))
                .order_by(Study.study_instance_uid)  # the order in which rows of arrivals lock them
                .with_for_update()
            )

    def _disputed(self, session: Session, uids: Sequence[str]) -> set[str]:
        """UIDs that came with two contents: which of them the sender would erase cannot be known, so neither is promised."""
        found: set[str] = set()
        for start in range(0, len(uids), _CHUNK):
            found.update(
                session.scalars(
                    sa.select(Instance.sop_instance_uid).where(
                        Instance.sop_instance_uid.in_(uids[start : start + _CHUNK]),
                        Instance.disposition == Disposition.CONFLICT,
                    )
                )
            )
        return found

    def _stored(self, session: Session, uids: Sequence[str]) -> dict[str, tuple[str, str]]:
        """Row id and SOP class of each instance that is in the rows and, as a file, in the store."""
        found: dict[str, tuple[str, str]] = {}
        for start in range(0, len(uids), _CHUNK):
            rows = session.execute(
                sa.select(Instance.sop_instance_uid, Instance.id, Instance.sop_class_uid, Instance.path).where(
                    Instance.sop_instance_uid.in_(uids[start : start + _CHUNK]),
                    Instance.disposition == Disposition.KEPT,
                    Instance.removed_at.is_(None),
                )
            )
            found.update({uid: (row_id, cls) for uid, row_id, cls, path in rows if self._store.path(path).is_file()})
        return found

    def _run(self) -> None:
        while not self._stop.wait(TICK_SECONDS):
            try:
                self.deliver_due()
            except DatabaseUnavailableError as error:
                log.warning("commitment_postponed", error=type(error).__name__)
            except (SQLAlchemyError, SettingsError) as error:  # a certificate that went since the start
                log.error("commitment_postponed", exc_info=error)

    def deliver_due(self) -> None:
        """Reports what is due on new associations, each to its own peer. Raises `DatabaseUnavailableError`."""
        with self._database.read() as session:
            due = session.scalars(
                sa.select(Commitment).where(
                    Commitment.state == CommitmentState.WAITING, Commitment.due_at <= datetime.now(UTC)
                )
            ).all()
        for row in due:
            peer = next((p for p in self._settings.peers if p.ae_title.strip() == row.calling_ae and p.port), None)
            if peer is None:
                log.warning("commitment_peer_without_port", commitment_id=row.id)
                self._finish(row.id, CommitmentState.FAILED)
                continue
            report = self._database.run(lambda session, row=row: self._resolve(session, row))  # type: ignore[misc]
            if self._call(row, peer, report):
                self._finish(row.id, CommitmentState.REPORTED)
            else:
                self._postpone(row)

    def _call(self, row: Commitment, peer: Peer, report: Report) -> bool:
        """One new association to the peer, as SCU in the role of the service's SCP."""
        entity = AE(ae_title=self._settings.ae_title)
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = self._settings.artim_seconds
        entity.connection_timeout = self._settings.artim_seconds
        entity.add_requested_context(COMMITMENT_CLASS)
        roles = [build_role(COMMITMENT_CLASS, scp_role=True)]
        association = entity.associate(
            row.address,
            peer.port,
            ae_title=row.calling_ae,
            ext_neg=roles,  # type: ignore[arg-type]
            tls_args=(client_context(self._settings), row.address) if peer.tls else None,
        )
        if not association.is_established:
            return False
        try:
            status, _ = association.send_n_event_report(
                report.data_set(), report.event_type, UID(report.class_uid), UID(report.instance_uid)
            )
            return bool(status.get("Status") == Status.SUCCESS)
        except (ValueError, RuntimeError) as error:  # the context was not accepted, or the association broke
            log.warning("commitment_report_failed", commitment_id=row.id, error=type(error).__name__)
            return False
        finally:
            association.release() if association.is_established else association.kill()

    def _postpone(self, row: Commitment) -> None:
        attempts = row.attempts + 1
        if attempts >= MAX_ATTEMPTS:
            self._finish(row.id, CommitmentState.FAILED)
            return
        due = datetime.now(UTC) + timedelta(seconds=FIRST_WAIT_SECONDS * 2**row.attempts)
        change = sa.update(Commitment).where(Commitment.id == row.id).values(due_at=due, attempts=attempts)
        self._database.run(lambda session: session.execute(change))

    def _finish(self, commitment_id: str, state: CommitmentState) -> None:
        change = sa.update(Commitment).where(Commitment.id == commitment_id).values(state=state)
        self._database.run(lambda session: session.execute(change))
        log.info(
            "commitment_reported" if state is CommitmentState.REPORTED else "commitment_failed",
            commitment_id=commitment_id,
        )
