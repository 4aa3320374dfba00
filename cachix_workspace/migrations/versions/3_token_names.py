"""The agents that a token is for. Tokens that exist are for any agent, as they were."""

from alembic import op
from sqlalchemy import Column, String

revision = "3"
down_revision = "2"


def upgrade() -> None:
    """Add a column that may be null."""
    op.add_column("tokens", Column("agents", String))
