"""Keep what a message says once it is written, and note the issuer of a patient's id with each instance."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_FIXED = "version_id, destination, control_id, result_status, text_sha256, signature_version_id, payload"
_TEXT = "what a message says cannot be changed; write another"

_TRIGGERS = {
    "sqlite": [
        f"CREATE TRIGGER messages_fixed BEFORE UPDATE OF {_FIXED} ON messages "
        f"BEGIN SELECT RAISE(ABORT, '{_TEXT}'); END",
    ],
    "postgresql": [
        "CREATE FUNCTION keep_messages() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"RAISE EXCEPTION '{_TEXT}' USING ERRCODE = 'integrity_constraint_violation'; END $$",
        f"CREATE TRIGGER keep_messages BEFORE UPDATE OF {_FIXED} ON messages "
        "FOR EACH ROW EXECUTE FUNCTION keep_messages()",
    ],
}


def upgrade() -> None:
    with op.batch_alter_table("instances") as batch:
        batch.alter_column("patient_identifier", type_=sa.String(length=130), existing_nullable=False)
    for statement in _TRIGGERS[op.get_bind().dialect.name]:
        op.execute(sa.DDL(statement.replace("%", "%%")))


def downgrade() -> None:
    raise RuntimeError("a message that may be rewritten proves nothing: restore a backup instead")
