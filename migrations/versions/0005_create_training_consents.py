"""Keep for each study whether it may train a model."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "training_consents",
        sa.Column("study_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column(
            "decision",
            sa.Enum("given", "refused", name="decision", native_enum=False, length=16, create_constraint=True),
            nullable=False,
        ),
        sa.Column("recorded_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("recorded_by", sa.String(length=100), nullable=False),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name="fk_training_consents_study_id"),
        sa.PrimaryKeyConstraint("study_id", name="pk_training_consents"),
    )


def downgrade() -> None:
    raise RuntimeError("a recorded refusal must not be forgotten: restore a backup instead")
