"""Signatures of orders."""

from alembic import op
from sqlalchemy import Column, Text

revision = "5"
down_revision = "4"


def upgrade() -> None:
    """Add a column that may be null."""
    op.add_column("deployments", Column("signature", Text))
