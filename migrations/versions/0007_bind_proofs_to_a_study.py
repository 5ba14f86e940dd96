"""Bind a proof of identity to the study it was made for, and a change of a sentence to the page that sent it.

From here on the database refuses a signature whose proof was made for another study. What a used proof signed says which
study that was; a proof that was not used lives for two minutes and goes.
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_PROVEN = (
    "EXISTS (SELECT 1 FROM authentications JOIN users ON users.id = authentications.user_id "
    "JOIN report_versions ON report_versions.id = authentications.version_id "
    "JOIN reports ON reports.id = report_versions.report_id "
    "WHERE authentications.version_id = NEW.version_id AND authentications.user_id = NEW.user_id "
    "AND authentications.study_id = reports.study_id "
    "AND users.role = 'radiologist' AND users.disabled_at IS NULL)"
)
_PROVEN_TEXT = "a signature needs a fresh proof of identity, made for this study by the radiologist who signs"
_USED_TEXT = "a proof of identity that was used cannot be changed"

_UNGUARD = {
    "sqlite": [
        "DROP TRIGGER signatures_proven",
        "DROP TRIGGER authentications_used_update",
        "DROP TRIGGER authentications_used_delete",
    ],
    "postgresql": ["DROP TRIGGER keep_used_authentications ON authentications"],
}
_GUARD = {
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
        "CREATE OR REPLACE FUNCTION keep_signatures_proven() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF NOT {_PROVEN} THEN RAISE EXCEPTION '{_PROVEN_TEXT}' USING ERRCODE = 'integrity_constraint_violation'; "
        "END IF; RETURN NEW; END $$",
        "CREATE TRIGGER keep_used_authentications BEFORE UPDATE OR DELETE ON authentications "
        "FOR EACH ROW EXECUTE FUNCTION keep_used_authentications()",
    ],
}
_SIGNED_STUDY = (
    "UPDATE authentications SET study_id = (SELECT reports.study_id FROM report_versions "
    "JOIN reports ON reports.id = report_versions.report_id WHERE report_versions.id = authentications.version_id)"
)


def upgrade() -> None:
    dialect = op.get_bind().dialect.name
    for statement in _UNGUARD[dialect]:
        op.execute(statement)
    op.add_column("authentications", sa.Column("study_id", sa.Uuid(as_uuid=False), nullable=True))
    op.execute(_SIGNED_STUDY)
    op.execute("DELETE FROM authentications WHERE study_id IS NULL")
    with op.batch_alter_table("authentications") as batch:
        batch.alter_column("study_id", nullable=False, existing_type=sa.Uuid(as_uuid=False))
        batch.create_foreign_key("fk_authentications_study_id", "studies", ["study_id"], ["id"])
    for statement in _GUARD[dialect]:
        op.execute(statement)
    op.add_column("oidc_flows", sa.Column("study_id", sa.Uuid(as_uuid=False), nullable=True))
    op.add_column("sentence_edits", sa.Column("page", sa.String(length=32), nullable=False, server_default=""))
    op.add_column("sentence_edits", sa.Column("sequence", sa.Integer(), nullable=False, server_default="0"))


def downgrade() -> None:
    raise RuntimeError("a proof that signs any study proves too little: restore a backup instead")
