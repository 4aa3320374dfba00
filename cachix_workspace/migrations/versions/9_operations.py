"""Operations and reboots of deployments; what agents know of them; what was done by hand."""

from alembic import op
from sqlalchemy import Column, String

revision = "9"
down_revision = "8"


def upgrade() -> None:
    """Add columns that may be null."""
    for name in ("operation", "reboot"):
        op.add_column("deployments", Column(name, String))
    for name in ("by_hand", "abilities"):
        op.add_column("agents", Column(name, String))
