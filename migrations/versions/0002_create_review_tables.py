"""Add what the review page keeps: sessions, proofs of identity, working copies, communications, requests for evidence.

From here on the database itself refuses a signature that no radiologist's own, used-up proof of identity stands behind.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_PROVEN = (
    "EXISTS (SELECT 1 FROM authentications JOIN users ON users.id = authentications.user_id "
    "WHERE authentications.version_id = NEW.version_id AND authentications.user_id = NEW.user_id "
    "AND users.role = 'radiologist' AND users.disabled_at IS NULL)"
)
_PROVEN_TEXT = "a signature needs the fresh proof of identity of the radiologist who signs"
_USED_TEXT = "a proof of identity that was used cannot be changed"

_TRIGGERS = {
    "sqlite": [
        f"CREATE TRIGGER signatures_proven BEFORE INSERT ON signatures WHEN NOT {_PROVEN} "
        f"BEGIN SELECT RAISE(ABORT, '{_PROVEN_TEXT}'); END",
        *(
            f"CREATE TRIGGER authentications_used_{event.lower()} BEFORE {event} ON authentications "
            f"WHEN OLD.used_at IS NOT NULL BEGIN SELECT RAISE(ABORT, '{_USED_TEXT}'); END"
            for event in ("UPDATE", "DELETE")
        ),
    ],
    "postgresql": [
        "CREATE FUNCTION keep_signatures_proven() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF NOT {_PROVEN} THEN RAISE EXCEPTION '{_PROVEN_TEXT}' USING ERRCODE = 'integrity_constraint_violation'; "
        "END IF; RETURN NEW; END $$",
        "CREATE TRIGGER keep_signatures_proven BEFORE INSERT ON signatures "
        "FOR EACH ROW EXECUTE FUNCTION keep_signatures_proven()",
        "CREATE FUNCTION keep_used_authentications() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF OLD.used_at IS NOT NULL THEN RAISE EXCEPTION '{_USED_TEXT}' "
        "USING ERRCODE = 'integrity_constraint_violation'; END IF; RETURN COALESCE(NEW, OLD); END $$",
        "CREATE TRIGGER keep_used_authentications BEFORE UPDATE OR DELETE ON authentications "
        "FOR EACH ROW EXECUTE FUNCTION keep_used_authentications()",
    ],
}


def upgrade() -> None:
    _create_oidc_flows()
    _create_presences()
    _create_sessions()
    _create_communications()
    _create_authentications()
    _create_evidence_requests()
    _create_working_copies()
    _create_working_sentences()
    _create_sentence_edits()
    op.add_column("report_versions", sa.Column("reason", sa.String(length=500), nullable=False, server_default=""))
    op.add_column("users", sa.Column("oidc_subject", sa.String(length=255), nullable=True))
    op.add_column("users", sa.Column("failed_logins", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("users", sa.Column("locked_until", sa.DateTime(timezone=True), nullable=True))
    op.create_index("uq_users_oidc_subject", "users", ["oidc_subject"], unique=True)
    for statement in _TRIGGERS[op.get_bind().dialect.name]:
        op.execute(statement)


def downgrade() -> None:
    raise RuntimeError("the review tables hold proofs behind signatures: restore a backup instead of dropping them")


def _create_oidc_flows() -> None:
    op.create_table(
        "oidc_flows",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("browser_sha256", sa.String(length=64), nullable=False),
        sa.Column("nonce", sa.String(length=64), nullable=False),
        sa.Column("code_verifier", sa.String(length=128), nullable=False),
        sa.Column("session_id", sa.String(length=64), nullable=True),
        sa.Column("return_to", sa.String(length=200), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_oidc_flows")),
    )


def _create_presences() -> None:
    op.create_table(
        "presences",
        sa.Column("study_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("user_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name=op.f("fk_presences_study_id")),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_presences_user_id")),
        sa.PrimaryKeyConstraint("study_id", "user_id", name=op.f("pk_presences")),
    )


def _create_sessions() -> None:
    op.create_table(
        "sessions",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("user_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("csrf_token", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("active_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("locked_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_sessions_user_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sessions")),
    )
    op.create_index(op.f("ix_sessions_user_id"), "sessions", ["user_id"], unique=False)


def _create_communications() -> None:
    op.create_table(
        "communications",
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("report_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("told", sa.String(length=200), nullable=False),
        sa.Column("means", sa.String(length=50), nullable=False),
        sa.Column("told_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("recorded_by", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("recorded_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["recorded_by"], ["users.id"], name=op.f("fk_communications_recorded_by")),
        sa.ForeignKeyConstraint(["report_id"], ["reports.id"], name=op.f("fk_communications_report_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_communications")),
    )
    op.create_index(op.f("ix_communications_report_id"), "communications", ["report_id"], unique=False)


def _create_authentications() -> None:
    op.create_table(
        "authentications",
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("user_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column(
            "method",
            sa.Enum(
                "password", "oidc", name="authenticationmethod", native_enum=False, create_constraint=True, length=16
            ),
            nullable=False,
        ),
        sa.Column("session_id", sa.String(length=64), nullable=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("used_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("version_id", sa.Uuid(as_uuid=False), nullable=True),
        sa.CheckConstraint("(used_at IS NULL) = (version_id IS NULL)", name=op.f("ck_authentications_used")),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_authentications_user_id")),
        sa.ForeignKeyConstraint(["version_id"], ["report_versions.id"], name=op.f("fk_authentications_version_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_authentications")),
        sa.UniqueConstraint("version_id", name=op.f("uq_authentications_version_id")),
    )


def _create_evidence_requests() -> None:
    op.create_table(
        "evidence_requests",
        sa.Column("version_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("requested_by", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("requested_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("done_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("reason", sa.String(length=500), nullable=False),
        sa.ForeignKeyConstraint(["requested_by"], ["users.id"], name=op.f("fk_evidence_requests_requested_by")),
        sa.ForeignKeyConstraint(["version_id"], ["report_versions.id"], name=op.f("fk_evidence_requests_version_id")),
        sa.PrimaryKeyConstraint("version_id", name=op.f("pk_evidence_requests")),
    )


def _create_working_copies() -> None:
    op.create_table(
        "working_copies",
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("report_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("base_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("opened_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("changed_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("closed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("version_id", sa.Uuid(as_uuid=False), nullable=True),
        sa.Column("words_drafted", sa.Integer(), nullable=True),
        sa.Column("words_changed", sa.Integer(), nullable=True),
        sa.ForeignKeyConstraint(["base_id"], ["report_versions.id"], name=op.f("fk_working_copies_base_id")),
        sa.ForeignKeyConstraint(["report_id"], ["reports.id"], name=op.f("fk_working_copies_report_id")),
        sa.ForeignKeyConstraint(["version_id"], ["report_versions.id"], name=op.f("fk_working_copies_version_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_working_copies")),
    )
    op.create_index(
        "uq_working_copies_open",
        "working_copies",
        ["report_id"],
        unique=True,
        sqlite_where=sa.text("closed_at IS NULL"),
        postgresql_where=sa.text("closed_at IS NULL"),
    )


def _create_working_sentences() -> None:
    op.create_table(
        "working_sentences",
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("copy_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("source_id", sa.Uuid(as_uuid=False), nullable=True),
        sa.Column("position", sa.Double(), nullable=False),
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
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("assessed_by", sa.Uuid(as_uuid=False), nullable=True),
        sa.Column("assessed_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["assessed_by"], ["users.id"], name=op.f("fk_working_sentences_assessed_by")),
        sa.ForeignKeyConstraint(["copy_id"], ["working_copies.id"], name=op.f("fk_working_sentences_copy_id")),
        sa.ForeignKeyConstraint(["source_id"], ["sentences.id"], name=op.f("fk_working_sentences_source_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_working_sentences")),
        sa.UniqueConstraint("copy_id", "position", name=op.f("uq_working_sentences_copy_id_position")),
    )


def _create_sentence_edits() -> None:
    op.create_table(
        "sentence_edits",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("sentence_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
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
        sa.Column("user_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column(
            "outcome",
            sa.Enum("applied", "conflict", name="editoutcome", native_enum=False, create_constraint=True, length=16),
            nullable=False,
        ),
        sa.Column("settled_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["sentence_id"], ["working_sentences.id"], name=op.f("fk_sentence_edits_sentence_id")),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_sentence_edits_user_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sentence_edits")),
    )
    op.create_index(op.f("ix_sentence_edits_sentence_id"), "sentence_edits", ["sentence_id"], unique=False)
