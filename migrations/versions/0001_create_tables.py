"""Create the tables, and the triggers that keep signed texts and the audit as they are."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


_SIGNED = "EXISTS (SELECT 1 FROM signatures WHERE signatures.version_id = {version})"
_SIGNED_TEXT = "a signed text cannot be changed; correct it in a new version"
_AUDIT_TEXT = "audit events are only ever appended"


def _sqlite_trigger(name: str, event: str, table: str, when: str, message: str) -> str:
    condition = f" WHEN {when}" if when else ""
    return f"CREATE TRIGGER {name} BEFORE {event} ON {table}{condition} BEGIN SELECT RAISE(ABORT, '{message}'); END"


def _sqlite_triggers() -> list[str]:
    old, new = _SIGNED.format(version="OLD.version_id"), _SIGNED.format(version="NEW.version_id")
    own = _SIGNED.format(version="OLD.id")
    return [
        _sqlite_trigger("sentences_signed_insert", "INSERT", "sentences", new, _SIGNED_TEXT),
        _sqlite_trigger("sentences_signed_update", "UPDATE", "sentences", f"{old} OR {new}", _SIGNED_TEXT),
        _sqlite_trigger("sentences_signed_delete", "DELETE", "sentences", old, _SIGNED_TEXT),
        _sqlite_trigger("versions_signed_update", "UPDATE", "report_versions", own, _SIGNED_TEXT),
        _sqlite_trigger("versions_signed_delete", "DELETE", "report_versions", own, _SIGNED_TEXT),
        _sqlite_trigger("signatures_update", "UPDATE", "signatures", "", "a signature cannot be changed"),
        _sqlite_trigger("signatures_delete", "DELETE", "signatures", "", "a signature cannot be removed"),
        _sqlite_trigger("audit_update", "UPDATE", "audit_events", "", _AUDIT_TEXT),
        _sqlite_trigger("audit_delete", "DELETE", "audit_events", "", _AUDIT_TEXT),
    ]


def _postgresql_function(name: str, condition: str, message: str, last: str = "COALESCE(NEW, OLD)") -> str:
    return (
        f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF {condition} THEN RAISE EXCEPTION '{message}' USING ERRCODE = 'integrity_constraint_violation'; END IF; "
        f"RETURN {last}; END $$"
    )


def _postgresql_triggers() -> list[str]:
    old, new = _SIGNED.format(version="OLD.version_id"), _SIGNED.format(version="NEW.version_id")
    sentences = f"(TG_OP <> 'INSERT' AND {old}) OR (TG_OP <> 'DELETE' AND {new})"
    functions = {
        "keep_signed_sentences": ("sentences", "INSERT OR UPDATE OR DELETE", sentences, _SIGNED_TEXT),
        "keep_signed_versions": (
            "report_versions",
            "UPDATE OR DELETE",
            _SIGNED.format(version="OLD.id"),
            _SIGNED_TEXT,
        ),
        "keep_signatures": ("signatures", "UPDATE OR DELETE", "true", "a signature cannot be changed or removed"),
        "keep_audit": ("audit_events", "UPDATE OR DELETE", "true", _AUDIT_TEXT),
    }
    statements = []
    for name, (table, events, condition, message) in functions.items():
        statements.append(_postgresql_function(name, condition, message))
        statements.append(f"CREATE TRIGGER {name} BEFORE {events} ON {table} FOR EACH ROW EXECUTE FUNCTION {name}()")
    statements.append(_postgresql_function("keep_audit_whole", "true", _AUDIT_TEXT, "NULL"))
    statements.append(
        "CREATE TRIGGER keep_audit_whole BEFORE TRUNCATE ON audit_events EXECUTE FUNCTION keep_audit_whole()"
    )
    return statements


_TRIGGERS = {"sqlite": _sqlite_triggers(), "postgresql": _postgresql_triggers()}


def upgrade() -> None:
    _create_audit_events()
    _create_commitments()
    _create_heartbeats()
    _create_leases()
    _create_studies()
    _create_users()
    _create_attempts()
    _create_reports()
    _create_series()
    _create_instances()
    _create_report_versions()
    _create_sentences()
    _create_signatures()
    _create_messages()
    for statement in _TRIGGERS[op.get_bind().dialect.name]:
        op.execute(sa.DDL(statement.replace("%", "%%")))


def downgrade() -> None:
    raise RuntimeError("0001 is the first revision: restore a backup instead of dropping every report")


def _create_audit_events() -> None:
    op.create_table(
        "audit_events",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("actor", sa.String(length=100), nullable=False),
        sa.Column("action", sa.String(length=50), nullable=False),
        sa.Column("study_id", sa.Uuid(as_uuid=False), nullable=True),
        sa.Column("origin", sa.String(length=64), nullable=False),
        sa.Column("outcome", sa.String(length=16), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.Column("previous_sha256", sa.String(length=64), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_events")),
        sa.UniqueConstraint("previous_sha256", name=op.f("uq_audit_events_previous_sha256")),
        sa.UniqueConstraint("sha256", name=op.f("uq_audit_events_sha256")),
    )
    op.create_index(op.f("ix_audit_events_study_id"), "audit_events", ["study_id"], unique=False)


def _create_commitments() -> None:
    op.create_table(
        "commitments",
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("transaction_uid", sa.String(length=64), nullable=False),
        sa.Column("calling_ae", sa.String(length=16), nullable=False),
        sa.Column("address", sa.String(length=64), nullable=False),
        sa.Column("items", sa.JSON(), nullable=False),
        sa.Column(
            "state",
            sa.Enum(
                "waiting",
                "reported",
                "failed",
                name="commitmentstate",
                native_enum=False,
                create_constraint=True,
                length=16,
            ),
            nullable=False,
        ),
        sa.Column("requested_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_commitments")),
    )


def _create_heartbeats() -> None:
    op.create_table(
        "heartbeats",
        sa.Column("owner", sa.String(length=100), nullable=False),
        sa.Column("service", sa.String(length=16), nullable=False),
        sa.Column("queues", sa.String(length=100), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("beat_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("claimed_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("owner", name=op.f("pk_heartbeats")),
    )


def _create_leases() -> None:
    op.create_table(
        "leases",
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("owner", sa.String(length=100), nullable=False),
        sa.Column("until", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_leases")),
    )


def _create_studies() -> None:
    op.create_table(
        "studies",
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("study_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column(
            "status",
            sa.Enum(
                "receiving",
                "complete",
                "preparing",
                "prepared",
                "drafting",
                "drafted",
                "skipped",
                "failed",
                name="studystatus",
                native_enum=False,
                create_constraint=True,
                length=16,
            ),
            nullable=False,
        ),
        sa.Column("priority", sa.SmallInteger(), nullable=False),
        sa.Column("patient_identifier", sa.String(length=64), nullable=False),
        sa.Column("patient_authority", sa.String(length=64), nullable=False),
        sa.Column("patient_name", sa.String(length=324), nullable=False),
        sa.Column("patient_birth_date", sa.Date(), nullable=True),
        sa.Column("patient_sex", sa.String(length=16), nullable=False),
        sa.Column("accession", sa.String(length=64), nullable=False),
        sa.Column("placer", sa.String(length=64), nullable=False),
        sa.Column("filler", sa.String(length=64), nullable=False),
        sa.Column("referring_physician", sa.String(length=324), nullable=False),
        sa.Column("study_time", sa.DateTime(), nullable=True),
        sa.Column("description", sa.String(length=64), nullable=False),
        sa.Column("calling_ae", sa.String(length=16), nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_arrival_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("completed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("status_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("lease_token", sa.Uuid(as_uuid=False), nullable=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("crashes", sa.Integer(), nullable=False),
        sa.Column("failed_stage", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.String(length=500), nullable=False),
        sa.Column("choice", sa.JSON(), nullable=True),
        sa.Column("model_input", sa.String(length=255), nullable=True),
        sa.CheckConstraint("(lease_token IS NULL) = (lease_until IS NULL)", name=op.f("ck_studies_lease")),
        sa.CheckConstraint("revision >= 1", name=op.f("ck_studies_revision")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_studies")),
        sa.UniqueConstraint("study_instance_uid", name=op.f("uq_studies_study_instance_uid")),
    )
    op.create_index(
        op.f("ix_studies_status_priority_due_at"), "studies", ["status", "priority", "due_at"], unique=False
    )


def _create_users() -> None:
    op.create_table(
        "users",
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("username", sa.String(length=100), nullable=False),
        sa.Column("family_name", sa.String(length=100), nullable=False),
        sa.Column("given_name", sa.String(length=100), nullable=False),
        sa.Column(
            "role",
            sa.Enum(
                "viewer",
                "radiologist",
                "admin",
                "auditor",
                name="role",
                native_enum=False,
                create_constraint=True,
                length=16,
            ),
            nullable=False,
        ),
        sa.Column("password_hash", sa.String(length=255), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("disabled_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_users")),
        sa.UniqueConstraint("username", name=op.f("uq_users_username")),
    )


def _create_attempts() -> None:
    op.create_table(
        "attempts",
        sa.Column("token", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("study_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column(
            "stage",
            sa.Enum("prepare", "draft", name="stage", native_enum=False, create_constraint=True, length=16),
            nullable=False,
        ),
        sa.Column("worker", sa.String(length=100), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "outcome",
            sa.Enum(
                "running",
                "done",
                "skipped",
                "retry",
                "failed",
                "lost",
                "superseded",
                name="attemptoutcome",
                native_enum=False,
                create_constraint=True,
                length=16,
            ),
            nullable=False,
        ),
        sa.Column("error", sa.String(length=100), nullable=False),
        sa.Column("reason", sa.String(length=500), nullable=False),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name=op.f("fk_attempts_study_id")),
        sa.PrimaryKeyConstraint("token", name=op.f("pk_attempts")),
    )
    op.create_index(
        op.f("ix_attempts_study_id_revision_stage"), "attempts", ["study_id", "revision", "stage"], unique=False
    )


def _create_reports() -> None:
    op.create_table(
        "reports",
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("study_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column(
            "state",
            sa.Enum(
                "ai_draft",
                "preliminary",
                "final",
                "corrected",
                "addended",
                "rejected",
                "retracted",
                name="reportstate",
                native_enum=False,
                create_constraint=True,
                length=16,
            ),
            nullable=False,
        ),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name=op.f("fk_reports_study_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_reports")),
        sa.UniqueConstraint("study_id", name=op.f("uq_reports_study_id")),
    )


def _create_series() -> None:
    op.create_table(
        "series",
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("study_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("series_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("modality", sa.String(length=16), nullable=False),
        sa.Column("number", sa.Integer(), nullable=True),
        sa.Column("description", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name=op.f("fk_series_study_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_series")),
        sa.UniqueConstraint("study_id", "series_instance_uid", name=op.f("uq_series_study_id_series_instance_uid")),
    )


def _create_instances() -> None:
    op.create_table(
        "instances",
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("study_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("series_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("sop_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("sop_class_uid", sa.String(length=64), nullable=False),
        sa.Column("transfer_syntax_uid", sa.String(length=64), nullable=False),
        sa.Column("path", sa.String(length=255), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("patient_identifier", sa.String(length=64), nullable=False),
        sa.Column(
            "disposition",
            sa.Enum(
                "kept", "variant", "conflict", name="disposition", native_enum=False, create_constraint=True, length=16
            ),
            nullable=False,
        ),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("committed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("removed_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["series_id"], ["series.id"], name=op.f("fk_instances_series_id")),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name=op.f("fk_instances_study_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_instances")),
        sa.UniqueConstraint("path", name=op.f("uq_instances_path")),
    )
    op.create_index(op.f("ix_instances_sop_instance_uid"), "instances", ["sop_instance_uid"], unique=False)
    op.create_index(op.f("ix_instances_study_id_disposition"), "instances", ["study_id", "disposition"], unique=False)
    op.create_index(
        "uq_instances_kept",
        "instances",
        ["sop_instance_uid"],
        unique=True,
        sqlite_where=sa.text("disposition = 'kept'"),
        postgresql_where=sa.text("disposition = 'kept'"),
    )


def _create_report_versions() -> None:
    op.create_table(
        "report_versions",
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("report_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("study_revision", sa.Integer(), nullable=False),
        sa.Column(
            "state",
            sa.Enum(
                "ai_draft",
                "preliminary",
                "final",
                "corrected",
                "addended",
                "rejected",
                "retracted",
                name="reportstate",
                native_enum=False,
                create_constraint=True,
                length=16,
            ),
            nullable=False,
        ),
        sa.Column(
            "author_kind",
            sa.Enum("machine", "person", name="authorkind", native_enum=False, create_constraint=True, length=16),
            nullable=False,
        ),
        sa.Column("author_id", sa.Uuid(as_uuid=False), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("status_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("text_sha256", sa.String(length=64), nullable=False),
        sa.Column("provenance", sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(["author_id"], ["users.id"], name=op.f("fk_report_versions_author_id")),
        sa.ForeignKeyConstraint(["report_id"], ["reports.id"], name=op.f("fk_report_versions_report_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_report_versions")),
        sa.UniqueConstraint("id", "text_sha256", name=op.f("uq_report_versions_id_text_sha256")),
        sa.UniqueConstraint("report_id", "number", name=op.f("uq_report_versions_report_id_number")),
    )
    op.create_index(
        "uq_report_versions_machine",
        "report_versions",
        ["report_id", "study_revision"],
        unique=True,
        sqlite_where=sa.text("author_kind = 'machine'"),
        postgresql_where=sa.text("author_kind = 'machine'"),
    )


def _create_sentences() -> None:
    op.create_table(
        "sentences",
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("version_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("ordinal", sa.Integer(), nullable=False),
        sa.Column(
            "section",
            sa.Enum(
                "findings",
                "impression",
                "recommendations",
                "addendum",
                name="section",
                native_enum=False,
                create_constraint=True,
                length=16,
            ),
            nullable=False,
        ),
        sa.Column("region", sa.String(length=32), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("confidence", sa.Double(), nullable=True),
        sa.Column("support", sa.Double(), nullable=True),
        sa.Column("evidence", sa.String(length=255), nullable=True),
        sa.Column(
            "origin",
            sa.Enum("machine", "edited", "person", name="origin", native_enum=False, create_constraint=True, length=16),
            nullable=False,
        ),
        sa.Column(
            "assessment",
            sa.Enum(
                "untouched",
                "accepted",
                "edited",
                "rejected",
                name="assessment",
                native_enum=False,
                create_constraint=True,
                length=16,
            ),
            nullable=False,
        ),
        sa.Column("assessed_by", sa.Uuid(as_uuid=False), nullable=True),
        sa.Column("assessed_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["assessed_by"], ["users.id"], name=op.f("fk_sentences_assessed_by")),
        sa.ForeignKeyConstraint(["version_id"], ["report_versions.id"], name=op.f("fk_sentences_version_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sentences")),
        sa.UniqueConstraint("version_id", "ordinal", name=op.f("uq_sentences_version_id_ordinal")),
    )


def _create_signatures() -> None:
    op.create_table(
        "signatures",
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("version_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("text_sha256", sa.String(length=64), nullable=False),
        sa.Column("user_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("signed_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_signatures_user_id")),
        sa.ForeignKeyConstraint(
            ["version_id", "text_sha256"],
            ["report_versions.id", "report_versions.text_sha256"],
            name=op.f("fk_signatures_version_id_text_sha256"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_signatures")),
        sa.UniqueConstraint("version_id", "text_sha256", name=op.f("uq_signatures_version_id_text_sha256")),
        sa.UniqueConstraint("version_id", name=op.f("uq_signatures_version_id")),
    )


def _create_messages() -> None:
    op.create_table(
        "messages",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("version_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("destination", sa.String(length=32), nullable=False),
        sa.Column("order_key", sa.String(length=64), nullable=False),
        sa.Column("priority", sa.SmallInteger(), nullable=False),
        sa.Column("control_id", sa.String(length=20), nullable=False),
        sa.Column("result_status", sa.String(length=1), nullable=False),
        sa.Column("text_sha256", sa.String(length=64), nullable=False),
        sa.Column("signature_version_id", sa.Uuid(as_uuid=False), nullable=True),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.Column(
            "state",
            sa.Enum(
                "pending",
                "sent",
                "acknowledged",
                "refused",
                "parked",
                "superseded",
                name="messagestate",
                native_enum=False,
                create_constraint=True,
                length=16,
            ),
            nullable=False,
        ),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("lease_token", sa.Uuid(as_uuid=False), nullable=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("sent_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("acknowledged_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("acknowledgement", sa.String(length=2), nullable=False),
        sa.Column("answer_text", sa.String(length=500), nullable=False),
        sa.Column("error", sa.String(length=500), nullable=False),
        sa.CheckConstraint(
            "result_status NOT IN ('F', 'C') OR signature_version_id IS NOT NULL", name=op.f("ck_messages_signed")
        ),
        sa.CheckConstraint("(lease_token IS NULL) = (lease_until IS NULL)", name=op.f("ck_messages_lease")),
        sa.ForeignKeyConstraint(
            ["signature_version_id", "text_sha256"],
            ["signatures.version_id", "signatures.text_sha256"],
            name=op.f("fk_messages_signature_version_id_text_sha256"),
        ),
        sa.ForeignKeyConstraint(["version_id"], ["report_versions.id"], name=op.f("fk_messages_version_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_messages")),
        sa.UniqueConstraint("control_id", name=op.f("uq_messages_control_id")),
        sa.UniqueConstraint("version_id", "destination", name=op.f("uq_messages_version_id_destination")),
    )
    op.create_index(op.f("ix_messages_destination_order_key"), "messages", ["destination", "order_key"], unique=False)
    op.create_index(
        op.f("ix_messages_destination_state_due_at"), "messages", ["destination", "state", "due_at"], unique=False
    )
