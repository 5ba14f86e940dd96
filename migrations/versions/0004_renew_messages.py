"""Let a refused message be written again: one message a version and destination that no other took the place of."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_LIVE = sa.text("state <> 'superseded'")
_FIXED = "version_id, destination, control_id, result_status, text_sha256, signature_version_id, payload"
_TEXT = "what a message says cannot be changed; write another"


def upgrade() -> None:
    with op.batch_alter_table("messages") as batch:
        batch.add_column(sa.Column("in_doubt", sa.Boolean(), nullable=False, server_default=sa.false()))
        batch.drop_constraint("uq_messages_version_id_destination", type_="unique")
    # of what was sent before, nobody knows whether every try was answered
    op.execute(sa.text("UPDATE messages SET in_doubt = (sent_at IS NOT NULL)"))
    with op.batch_alter_table("messages") as batch:
        batch.alter_column("in_doubt", server_default=None)
    op.create_index(
        "uq_messages_version_id_destination",
        "messages",
        ["version_id", "destination"],
        unique=True,
        sqlite_where=_LIVE,
        postgresql_where=_LIVE,
    )
    if op.get_bind().dialect.name == "sqlite":  # went with the table that the batch replaced
        trigger = f"BEFORE UPDATE OF {_FIXED} ON messages BEGIN SELECT RAISE(ABORT, '{_TEXT}'); END"
        op.execute(sa.DDL(f"CREATE TRIGGER messages_fixed {trigger}"))


def downgrade() -> None:
    raise RuntimeError("a message that was renewed has two rows, the older table allows one: restore a backup instead")
