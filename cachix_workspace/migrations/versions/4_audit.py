"""The audit, and the last use of tokens."""

from alembic import op
from sqlalchemy import Column, Integer, String, Text

revision = "4"
down_revision = "3"


def upgrade() -> None:
    """Add a table, and a column that may be null."""
    op.add_column("tokens", Column("used_on", String))
    op.create_table(
        "audit",
        Column("id", Integer, primary_key=True),
        Column("time", String, nullable=False),
        Column("actor", String, nullable=False),
        Column("address", String, nullable=False),
        Column("action", String, nullable=False),
        Column("detail", Text, nullable=False),
    )
