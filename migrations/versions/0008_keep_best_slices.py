"""Keep the slice that each sentence of a draft leans on most, so that a click finds it without evidence being asked for."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("sentences", sa.Column("best_slice", sa.JSON(none_as_null=True), nullable=True))


def downgrade() -> None:
    op.drop_column("sentences", "best_slice")
