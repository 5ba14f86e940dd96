"""Keep what DICOM says about the order: the procedure's code, why and by whom it was asked for, the visit."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_LENGTHS = {
    "requesting_physician": 324,
    "procedure_code": 64,
    "procedure_text": 64,
    "procedure_system": 16,
    "procedure_reason": 64,
    "visit": 64,
}


def upgrade() -> None:
    # The default stays: taking it away would make SQLite write the table anew, to which all others refer.
    for name, length in _LENGTHS.items():
        op.add_column("studies", sa.Column(name, sa.String(length), nullable=False, server_default=""))


def downgrade() -> None:
    for name in _LENGTHS:
        op.drop_column("studies", name)
