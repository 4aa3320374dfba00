"""Nodes that share a database: which one an agent is connected to, and by which connection."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import TEXT

revision = "10"
down_revision = "9"


def upgrade() -> None:
    """Make the table, add columns that may be null, and the sequence where there can be one."""
    string = sa.String().with_variant(TEXT(collation="C"), "postgresql")
    op.create_table(
        "nodes",
        sa.Column("id", string, primary_key=True),
        sa.Column("host", string, nullable=False),
        sa.Column("start", sa.BigInteger, nullable=False),
        sa.Column("started_on", string, nullable=False),
        sa.Column("seen_on", string, nullable=False),
        sa.Column("shared", sa.Boolean, nullable=False),
    )
    op.add_column("agents", sa.Column("node_id", string))
    op.add_column("agents", sa.Column("connection", sa.BigInteger))
    op.create_index("agents_by_node", "agents", ["node_id", "connected"])
    op.add_column("deployments", sa.Column("sent_to", sa.BigInteger))
    if op.get_bind().dialect.name == "postgresql":
        op.execute("CREATE SEQUENCE connection_numbers")
