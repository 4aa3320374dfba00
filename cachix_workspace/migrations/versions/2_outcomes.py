"""Reports of our agents, and requests to cancel."""

from alembic import op
from sqlalchemy import Column, String

revision = "2"
down_revision = "1"


def upgrade() -> None:
    """Add columns that may be null."""
    op.add_column("agents", Column("client", String))
    for name in ("step", "outcome", "cancel_requested", "cancel_refused"):
        op.add_column("deployments", Column(name, String))
