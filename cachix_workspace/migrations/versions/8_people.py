"""People and their sessions, runs, webhooks; what agents say of their machines; labels, pauses."""

import sqlalchemy as sa
from alembic import op

revision = "8"
down_revision = "7"

AGENTS = (
    *("description", "labels", "paused_on", "paused_by", "deployed", "deployed_on", "state_on"),
    *("running", "running_since", "profile", "kind", "reboot_since"),
)


def upgrade() -> None:
    """Make tables, add columns that may be null, and note what succeeded last."""
    _make_tables()
    for name in AGENTS:
        op.add_column("agents", sa.Column(name, sa.Text if name == "description" else sa.String))
    op.add_column("deployments", sa.Column("run_id", sa.Integer))
    op.add_column("deployments", sa.Column("retry_of", sa.Integer))
    for name in ("actor", "before"):
        op.add_column("deployments", sa.Column(name, sa.String))
    for name in ("steps", "rollback_scripts"):
        op.add_column("deployments", sa.Column(name, sa.Text))
    op.create_index("deployments_by_run", "deployments", ["run_id", "status", "outcome"])
    op.create_index("deployments_by_state", "deployments", ["status", "agent_id"])
    op.create_index("deployments_by_time", "deployments", ["created_on"])
    for column, value in (("deployed", "store_path"), ("deployed_on", "finished_on")):
        op.execute(
            f"UPDATE agents SET {column} = (SELECT d.{value} FROM deployments AS d WHERE d.agent_id"
            " = agents.id AND d.status = 'Succeeded' ORDER BY d.\"index\" DESC LIMIT 1)"
        )


def _make_tables() -> None:
    op.create_table(
        "runs",
        sa.Column("id", sa.Integer, primary_key=True),
        *_texts("created_on", "actor", "action"),
        sa.Column("source", sa.Text),
        sa.Column("of_run", sa.Integer),
    )
    op.create_table(
        "people",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String, nullable=False, unique=True),
        *_texts("role", "created_on"),
    )
    person = sa.ForeignKey("people.id", ondelete="CASCADE")
    op.create_table(
        "links",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("hash", sa.String, nullable=False, unique=True),
        sa.Column("person_id", sa.Integer, person, nullable=False),
        *_texts("created_on", "expires_on"),
        sa.Column("used_on", sa.String),
    )
    person = sa.ForeignKey("people.id", ondelete="CASCADE")
    op.create_table(
        "sessions",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("hash", sa.String, nullable=False, unique=True),
        sa.Column("person_id", sa.Integer, person),
        sa.Column("token_id", sa.Integer, sa.ForeignKey("tokens.id")),
        *_texts("created_on", "expires_on", "seen_on", "address", "browser"),
    )
    _make_webhooks()


def _make_webhooks() -> None:
    op.create_table(
        "webhooks",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("url", sa.Text, nullable=False),
        *_texts("format", "events", "key", "created_on"),
        sa.Column("label", sa.String),
    )
    webhook = sa.ForeignKey("webhooks.id", ondelete="CASCADE")
    op.create_table(
        "webhook_messages",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("webhook_id", sa.Integer, webhook, nullable=False),
        *_texts("created_on"),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("due_on", sa.String),
        sa.Column("tries", sa.Integer, nullable=False),
        sa.Column("answer", sa.Text),
        sa.Column("delivered_on", sa.String),
    )
    op.create_index("webhook_messages_due", "webhook_messages", ["due_on"])


def _texts(*names: str) -> list[sa.Column[str]]:
    """Columns of text that are never null."""
    return [sa.Column(name, sa.String, nullable=False) for name in names]
