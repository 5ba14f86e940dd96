"""The tables, but for those of the review page (`review_records.py`); nothing else defines a column.

Long, because tables refer to each other and a reader wants them side by side.

Columns named with a patient's data are marked `info={"phi": True}`; a test keeps them out of logs, metrics and tasks.
Times are UTC and zone-aware. Ids that leave the database are opaque: random UUIDs and running numbers.
"""

import uuid
from datetime import UTC, date, datetime
from enum import IntEnum, StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy import CheckConstraint, ForeignKey, ForeignKeyConstraint, Index, UniqueConstraint
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from worker.core.report import Assessment, Origin, ReportState, Section

PHI = {"phi": True}
REASON_LENGTH = 500


class StudyStatus(StrEnum):
    """Where a study stands; every change is a function in `studies.py`."""

    RECEIVING = "receiving"  # instances arrive
    COMPLETE = "complete"  # quiet for long enough, waits for prepare
    PREPARING = "preparing"  # a worker chooses the series and builds the volume
    PREPARED = "prepared"  # model input stored, waits for draft
    DRAFTING = "drafting"  # a worker runs the model
    DRAFTED = "drafted"  # report stored
    SKIPPED = "skipped"  # nothing to report, with the reason
    FAILED = "failed"  # a person must look, with the reason and the stage


class Priority(IntEnum):
    """Rank of a study; a smaller number is drafted first."""

    STAT = 0
    URGENT = 1
    ROUTINE = 2


class Stage(StrEnum):
    """The work that is claimed on a study's row."""

    PREPARE = "prepare"
    DRAFT = "draft"


class Disposition(StrEnum):
    """What became of an instance that arrived."""

    KEPT = "kept"  # the instance of this SOP Instance UID
    VARIANT = "variant"  # the same picture in another encoding or under an earlier header; lies aside
    CONFLICT = "conflict"  # the same UID with other content; lies aside and raises an alarm


class AttemptOutcome(StrEnum):
    """How one try of a stage ended."""

    RUNNING = "running"  # its lease is alive
    DONE = "done"
    SKIPPED = "skipped"  # nothing to report
    RETRY = "retry"  # a retryable error; tried again later
    FAILED = "failed"  # a final error, or the last retry
    LOST = "lost"  # the lease ran out: the worker died or hung
    SUPERSEDED = "superseded"  # late instances or a requeue opened a new revision meanwhile


class AuthorKind(StrEnum):
    """Who wrote a version."""

    MACHINE = "machine"
    PERSON = "person"


class MessageState(StrEnum):
    """Where an outbox row stands."""

    PENDING = "pending"  # waits for its turn or its next try
    SENT = "sent"  # bytes left, no acknowledgement yet
    ACKNOWLEDGED = "acknowledged"  # the destination took it
    REFUSED = "refused"  # AR or CR: a person must look
    PARKED = "parked"  # out of retries: a person must look
    SUPERSEDED = "superseded"  # a later version, a renewed message or a person's decision took its place


class Role(StrEnum):
    """What a user may do."""

    VIEWER = "viewer"
    RADIOLOGIST = "radiologist"  # alone may sign
    ADMIN = "admin"
    AUDITOR = "auditor"


class CommitmentState(StrEnum):
    """Where a storage commitment request stands."""

    WAITING = "waiting"  # accepted, the N-EVENT-REPORT is not out yet
    REPORTED = "reported"
    FAILED = "failed"  # the peer could not be told; it will ask again


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """A zone-aware time, stored as UTC; naive values are refused."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """UTC for the database."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without zone cannot be stored; use datetime.now(UTC)")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Zone-aware UTC; SQLite forgets the zone."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def named_enum(kind: type[StrEnum]) -> sa.Enum:
    """A text column that takes the values of `kind` and nothing else."""
    return sa.Enum(
        kind,
        name=kind.__name__.lower(),
        native_enum=False,
        length=16,
        create_constraint=True,
        values_callable=lambda members: [m.value for m in members],
    )


Uuid = sa.Uuid(as_uuid=False)
BigId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def new_id() -> str:
    """A random UUID: an id that says nothing."""
    return str(uuid.uuid4())


class Base(DeclarativeBase):
    """Naming makes constraints equal on every database and in every migration."""

    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {datetime: UtcDateTime(), dict[str, Any]: sa.JSON(), list[Any]: sa.JSON()}


class Study(Base):
    """One study, its patient as DICOM says, its place in the pipeline and the claim on it."""

    __tablename__ = "studies"
    __table_args__ = (
        Index(None, "status", "priority", "due_at"),
        CheckConstraint("revision >= 1", name="revision"),
        CheckConstraint("(lease_token IS NULL) = (lease_until IS NULL)", name="lease"),
    )

    id: Mapped[str] = mapped_column(Uuid, primary_key=True, default=new_id)
    study_instance_uid: Mapped[str] = mapped_column(sa.String(64), unique=True, info=PHI)
    revision: Mapped[int] = mapped_column(default=1)
    status: Mapped[StudyStatus] = mapped_column(named_enum(StudyStatus), default=StudyStatus.RECEIVING)
    priority: Mapped[int] = mapped_column(sa.SmallInteger, default=Priority.ROUTINE)

    patient_identifier: Mapped[str] = mapped_column(sa.String(64), default="", info=PHI)
    patient_authority: Mapped[str] = mapped_column(sa.String(64), default="", info=PHI)
    patient_name: Mapped[str] = mapped_column(sa.String(324), default="", info=PHI)
    patient_birth_date: Mapped[date | None] = mapped_column(info=PHI)
    patient_sex: Mapped[str] = mapped_column(sa.String(16), default="", info=PHI)
    accession: Mapped[str] = mapped_column(sa.String(64), default="", info=PHI)
    placer: Mapped[str] = mapped_column(sa.String(64), default="", info=PHI)
    filler: Mapped[str] = mapped_column(sa.String(64), default="", info=PHI)
    referring_physician: Mapped[str] = mapped_column(sa.String(324), default="", info=PHI)
    study_time: Mapped[datetime | None] = mapped_column(sa.DateTime, info=PHI)  # scanner's wall clock, no zone in DICOM
    description: Mapped[str] = mapped_column(sa.String(64), default="", info=PHI)
    calling_ae: Mapped[str] = mapped_column(sa.String(16), default="")

    received_at: Mapped[datetime]
    last_arrival_at: Mapped[datetime]
    completed_at: Mapped[datetime | None]  # of the present revision
    status_at: Mapped[datetime]
    due_at: Mapped[datetime | None]  # not before this time; None is at once

    lease_token: Mapped[str | None] = mapped_column(Uuid)
    lease_until: Mapped[datetime | None]
    attempts: Mapped[int] = mapped_column(default=0)  # failures of the present stage that were retryable
    crashes: Mapped[int] = mapped_column(default=0)  # leases lost in the present stage

    failed_stage: Mapped[str] = mapped_column(sa.String(16), default="")
    reason: Mapped[str] = mapped_column(sa.String(REASON_LENGTH), default="")
    choice: Mapped[dict[str, Any] | None]  # which series, why not the others, repairs; made by prepare
    model_input: Mapped[str | None] = mapped_column(sa.String(255))  # path below the store

    # What was ordered, as DICOM says; added later, with the default that the older rows took.
    requesting_physician: Mapped[str] = mapped_column(sa.String(324), default="", server_default="", info=PHI)
    procedure_code: Mapped[str] = mapped_column(sa.String(64), default="", server_default="", info=PHI)
    procedure_text: Mapped[str] = mapped_column(sa.String(64), default="", server_default="", info=PHI)
    procedure_system: Mapped[str] = mapped_column(sa.String(16), default="", server_default="", info=PHI)
    procedure_reason: Mapped[str] = mapped_column(sa.String(64), default="", server_default="", info=PHI)
    visit: Mapped[str] = mapped_column(sa.String(64), default="", server_default="", info=PHI)

    series: Mapped[list["Series"]] = relationship(back_populates="study")
    report: Mapped["Report | None"] = relationship(back_populates="study")


class Series(Base):
    """One series as its first instance described it."""

    __tablename__ = "series"
    __table_args__ = (UniqueConstraint("study_id", "series_instance_uid"),)

    id: Mapped[str] = mapped_column(Uuid, primary_key=True, default=new_id)
    study_id: Mapped[str] = mapped_column(ForeignKey("studies.id"))
    series_instance_uid: Mapped[str] = mapped_column(sa.String(64), info=PHI)
    modality: Mapped[str] = mapped_column(sa.String(16), default="")
    number: Mapped[int | None]
    description: Mapped[str] = mapped_column(sa.String(64), default="", info=PHI)

    study: Mapped[Study] = relationship(back_populates="series")


class Instance(Base):
    """One stored DICOM object."""

    __tablename__ = "instances"
    __table_args__ = (
        Index(
            "uq_instances_kept",
            "sop_instance_uid",
            unique=True,
            sqlite_where=sa.text("disposition = 'kept'"),
            postgresql_where=sa.text("disposition = 'kept'"),
        ),
        Index(None, "sop_instance_uid"),
        Index(None, "study_id", "disposition"),
    )

    id: Mapped[str] = mapped_column(Uuid, primary_key=True, default=new_id)
    study_id: Mapped[str] = mapped_column(ForeignKey("studies.id"))
    series_id: Mapped[str] = mapped_column(ForeignKey("series.id"))
    sop_instance_uid: Mapped[str] = mapped_column(sa.String(64), info=PHI)
    sop_class_uid: Mapped[str] = mapped_column(sa.String(64))
    transfer_syntax_uid: Mapped[str] = mapped_column(sa.String(64))
    path: Mapped[str] = mapped_column(sa.String(255), unique=True)  # below the store; made of hashes, never of UIDs
    size_bytes: Mapped[int] = mapped_column(sa.BigInteger)
    sha256: Mapped[str] = mapped_column(sa.String(64))  # of the data set's bytes as received
    revision: Mapped[int]  # of the study when it arrived
    patient_identifier: Mapped[str] = mapped_column(sa.String(130), default="", info=PHI)  # id^issuer; two: failed
    disposition: Mapped[Disposition] = mapped_column(named_enum(Disposition), default=Disposition.KEPT)
    received_at: Mapped[datetime]
    committed_at: Mapped[datetime | None]  # storage commitment given: exempt from retention
    removed_at: Mapped[datetime | None]  # the file went by retention


class Attempt(Base):
    """One try of one stage on one revision of a study."""

    __tablename__ = "attempts"
    __table_args__ = (Index(None, "study_id", "revision", "stage"),)

    token: Mapped[str] = mapped_column(Uuid, primary_key=True, default=new_id)  # the lease that it ran under
    study_id: Mapped[str] = mapped_column(ForeignKey("studies.id"))
    revision: Mapped[int]
    stage: Mapped[Stage] = mapped_column(named_enum(Stage))
    worker: Mapped[str] = mapped_column(sa.String(100))
    started_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    outcome: Mapped[AttemptOutcome] = mapped_column(named_enum(AttemptOutcome), default=AttemptOutcome.RUNNING)
    error: Mapped[str] = mapped_column(sa.String(100), default="")  # class of the error
    reason: Mapped[str] = mapped_column(sa.String(REASON_LENGTH), default="")


class Report(Base):
    """The one report of a study; its texts are its versions."""

    __tablename__ = "reports"

    id: Mapped[str] = mapped_column(Uuid, primary_key=True, default=new_id)
    study_id: Mapped[str] = mapped_column(ForeignKey("studies.id"), unique=True)
    state: Mapped[ReportState] = mapped_column(named_enum(ReportState), default=ReportState.AI_DRAFT)
    created_at: Mapped[datetime]

    study: Mapped[Study] = relationship(back_populates="report")
    versions: Mapped[list["ReportVersion"]] = relationship(back_populates="report", order_by="ReportVersion.number")


class ReportVersion(Base):
    """One text of a report; never changed once signed."""

    __tablename__ = "report_versions"
    __table_args__ = (
        UniqueConstraint("report_id", "number"),
        UniqueConstraint("id", "text_sha256"),
        Index(
            "uq_report_versions_machine",
            "report_id",
            "study_revision",
            unique=True,
            sqlite_where=sa.text("author_kind = 'machine'"),
            postgresql_where=sa.text("author_kind = 'machine'"),
        ),
    )

    id: Mapped[str] = mapped_column(Uuid, primary_key=True, default=new_id)
    report_id: Mapped[str] = mapped_column(ForeignKey("reports.id"))
    number: Mapped[int]
    study_revision: Mapped[int]
    state: Mapped[ReportState] = mapped_column(named_enum(ReportState))
    author_kind: Mapped[AuthorKind] = mapped_column(named_enum(AuthorKind))
    author_id: Mapped[str | None] = mapped_column(ForeignKey("users.id"))
    created_at: Mapped[datetime]
    status_time: Mapped[datetime]  # OBR-22; at least one second after the version before
    text_sha256: Mapped[str] = mapped_column(sa.String(64))
    provenance: Mapped[dict[str, Any] | None]  # of a machine's draft
    reason: Mapped[str] = mapped_column(sa.String(REASON_LENGTH), default="", info=PHI)  # of a rejection or retraction

    report: Mapped[Report] = relationship(back_populates="versions")
    sentences: Mapped[list["Sentence"]] = relationship(
        back_populates="version", order_by="Sentence.ordinal", cascade="all"
    )
    signature: Mapped["Signature | None"] = relationship(back_populates="version")
    author: Mapped["User | None"] = relationship()


class Sentence(Base):
    """One sentence of a version."""

    __tablename__ = "sentences"
    __table_args__ = (UniqueConstraint("version_id", "ordinal"),)

    id: Mapped[str] = mapped_column(Uuid, primary_key=True, default=new_id)
    version_id: Mapped[str] = mapped_column(ForeignKey("report_versions.id"))
    ordinal: Mapped[int]  # from 0 over the whole version
    section: Mapped[Section] = mapped_column(named_enum(Section))
    region: Mapped[str] = mapped_column(sa.String(32), default="")
    text: Mapped[str] = mapped_column(sa.Text, info=PHI)
    confidence: Mapped[float | None]
    support: Mapped[float | None]
    evidence: Mapped[str | None] = mapped_column(sa.String(255))  # path below the store of its heat volume
    origin: Mapped[Origin] = mapped_column(named_enum(Origin), default=Origin.MACHINE)
    assessment: Mapped[Assessment] = mapped_column(named_enum(Assessment), default=Assessment.UNTOUCHED)
    assessed_by: Mapped[str | None] = mapped_column(ForeignKey("users.id"))
    assessed_at: Mapped[datetime | None]
    # Of a machine's draft: a `report.BestSlice`; added later, so it stands last.
    best_slice: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON(none_as_null=True))

    version: Mapped[ReportVersion] = relationship(back_populates="sentences")


class User(Base):
    """A person who may log in to the review page."""

    __tablename__ = "users"
    __table_args__ = (Index("uq_users_oidc_subject", "oidc_subject", unique=True),)

    id: Mapped[str] = mapped_column(Uuid, primary_key=True, default=new_id)
    username: Mapped[str] = mapped_column(sa.String(100), unique=True)
    family_name: Mapped[str] = mapped_column(sa.String(100), default="")
    given_name: Mapped[str] = mapped_column(sa.String(100), default="")
    role: Mapped[Role] = mapped_column(named_enum(Role))
    password_hash: Mapped[str | None] = mapped_column(sa.String(255))  # argon2; None for an OIDC account
    created_at: Mapped[datetime]
    disabled_at: Mapped[datetime | None]
    oidc_subject: Mapped[str | None] = mapped_column(sa.String(255))  # the provider's `sub`, bound at the first login
    failed_logins: Mapped[int] = mapped_column(default=0)  # in a row
    locked_until: Mapped[datetime | None]  # too many of them


class Signature(Base):
    """A person's signature on the text of one version."""

    __tablename__ = "signatures"
    __table_args__ = (
        ForeignKeyConstraint(["version_id", "text_sha256"], ["report_versions.id", "report_versions.text_sha256"]),
        UniqueConstraint("version_id", "text_sha256"),
    )

    id: Mapped[str] = mapped_column(Uuid, primary_key=True, default=new_id)
    version_id: Mapped[str] = mapped_column(Uuid, unique=True)
    text_sha256: Mapped[str] = mapped_column(sa.String(64))
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id"))
    signed_at: Mapped[datetime]

    version: Mapped[ReportVersion] = relationship(back_populates="signature")
    user: Mapped[User] = relationship()


class Message(Base):
    """An outbox row: one report version for one destination, with the very bytes that are sent.

    A refused one may be superseded by another of the same version; one of them at most is not superseded.
    """

    __tablename__ = "messages"
    __table_args__ = (
        Index(  # a message that another took the place of is never accepted
            "uq_messages_version_id_destination",
            "version_id",
            "destination",
            unique=True,
            sqlite_where=sa.text("state <> 'superseded'"),
            postgresql_where=sa.text("state <> 'superseded'"),
        ),
        ForeignKeyConstraint(
            ["signature_version_id", "text_sha256"], ["signatures.version_id", "signatures.text_sha256"]
        ),
        CheckConstraint("result_status NOT IN ('F', 'C') OR signature_version_id IS NOT NULL", name="signed"),
        CheckConstraint("(lease_token IS NULL) = (lease_until IS NULL)", name="lease"),
        Index(None, "destination", "state", "due_at"),
        Index(None, "destination", "order_key"),
    )

    id: Mapped[int] = mapped_column(BigId, primary_key=True)  # running number: the order of sending
    version_id: Mapped[str] = mapped_column(ForeignKey("report_versions.id"))
    destination: Mapped[str] = mapped_column(sa.String(32))
    order_key: Mapped[str] = mapped_column(sa.String(64), info=PHI)  # accession, or the study id without one
    priority: Mapped[int] = mapped_column(sa.SmallInteger, default=Priority.ROUTINE)
    control_id: Mapped[str] = mapped_column(sa.String(20), unique=True)  # MSH-10, the same on every retry
    result_status: Mapped[str] = mapped_column(sa.String(1))  # OBR-25
    text_sha256: Mapped[str] = mapped_column(sa.String(64))
    signature_version_id: Mapped[str | None] = mapped_column(Uuid)
    payload: Mapped[bytes] = mapped_column(sa.LargeBinary, info=PHI)
    state: Mapped[MessageState] = mapped_column(named_enum(MessageState), default=MessageState.PENDING)
    attempts: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime]
    due_at: Mapped[datetime | None]
    lease_token: Mapped[str | None] = mapped_column(Uuid)
    lease_until: Mapped[datetime | None]
    sent_at: Mapped[datetime | None]  # of the last try
    acknowledged_at: Mapped[datetime | None]
    acknowledgement: Mapped[str] = mapped_column(sa.String(2), default="")  # MSA-1 of the last answer
    answer_text: Mapped[str] = mapped_column(sa.String(REASON_LENGTH), default="", info=PHI)  # MSA-3 may quote us
    error: Mapped[str] = mapped_column(sa.String(REASON_LENGTH), default="")  # ours, without patient data
    in_doubt: Mapped[bool] = mapped_column(default=False)  # a try was not answered: the destination may have it

    version: Mapped[ReportVersion] = relationship()


class AuditEvent(Base):
    """Who did what to which study; append-only and hash-chained."""

    __tablename__ = "audit_events"
    __table_args__ = (Index(None, "study_id"),)

    id: Mapped[int] = mapped_column(BigId, primary_key=True, autoincrement=False)
    at: Mapped[datetime]
    actor: Mapped[str] = mapped_column(sa.String(100))
    action: Mapped[str] = mapped_column(sa.String(50))
    study_id: Mapped[str | None] = mapped_column(Uuid)
    origin: Mapped[str] = mapped_column(sa.String(64), default="")  # address it came from
    outcome: Mapped[str] = mapped_column(sa.String(16))
    detail: Mapped[dict[str, Any]]
    previous_sha256: Mapped[str] = mapped_column(sa.String(64), unique=True)
    sha256: Mapped[str] = mapped_column(sa.String(64), unique=True)


class Commitment(Base):
    """A storage commitment request and whether its answer is out."""

    __tablename__ = "commitments"

    id: Mapped[str] = mapped_column(Uuid, primary_key=True, default=new_id)
    transaction_uid: Mapped[str] = mapped_column(sa.String(64))
    calling_ae: Mapped[str] = mapped_column(sa.String(16))
    address: Mapped[str] = mapped_column(sa.String(64))
    items: Mapped[list[Any]]  # [[sop class uid, sop instance uid], ...]
    state: Mapped[CommitmentState] = mapped_column(named_enum(CommitmentState), default=CommitmentState.WAITING)
    requested_at: Mapped[datetime]
    due_at: Mapped[datetime | None]
    attempts: Mapped[int] = mapped_column(default=0)


class Lease(Base):
    """A named job that one process at a time does, the sweep for one."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    owner: Mapped[str] = mapped_column(sa.String(100))
    until: Mapped[datetime]


class Heartbeat(Base):
    """A process that is alive, and when it last claimed something: alive but deaf shows here."""

    __tablename__ = "heartbeats"

    owner: Mapped[str] = mapped_column(sa.String(100), primary_key=True)  # host, process number, start
    service: Mapped[str] = mapped_column(sa.String(16))
    queues: Mapped[str] = mapped_column(sa.String(100), default="")
    started_at: Mapped[datetime]
    beat_at: Mapped[datetime]
    claimed_at: Mapped[datetime | None]
