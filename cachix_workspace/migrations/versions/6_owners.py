"""Whose token is whose, and successors of tokens and keys."""

from alembic import op
from sqlalchemy import Column, Integer, String

revision = "6"
down_revision = "5"


def upgrade() -> None:
    """Add columns that may be null."""
    for name in ("issued_by", "most", "replaces"):
        op.add_column("tokens", Column(name, Integer))
    for name in ("owner_id", "token_id", "enrolled_by"):
        op.add_column("agents", Column(name, Integer))
    op.add_column("agents", Column("token_since", String))
    for name in ("old_key_name", "old_public_key"):
        op.add_column("caches", Column(name, String))
