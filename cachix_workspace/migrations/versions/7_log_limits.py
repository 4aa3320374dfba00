"""How large a log is, what was dropped of it, and when a deployment ended by the server's clock."""

from alembic import op
from sqlalchemy import BigInteger, Column, Integer, String

revision = "7"
down_revision = "6"


def upgrade() -> None:
    """Add columns that may be null."""
    op.add_column("deployments", Column("log_size", BigInteger))
    op.add_column("deployments", Column("log_dropped", Integer))
    op.add_column("deployments", Column("ended_on", String))
