"""The schema.

Times are text as the protocol writes them (RFC 3339, UTC): they sort, and need no conversion. Thus
texts are compared by their bytes, in PostgreSQL too, whatever the language of its database.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Sequence,
    Table,
    UniqueConstraint,
)
from sqlalchemy import String as AnyString
from sqlalchemy import Text as AnyText
from sqlalchemy.dialects.postgresql import TEXT

BY_BYTES = TEXT(collation="C")
String = AnyString().with_variant(BY_BYTES, "postgresql")
Text = AnyText().with_variant(BY_BYTES, "postgresql")

metadata = MetaData()

# a number for each connection of an agent, and each start of a node, where there are sequences
connection_numbers = Sequence("connection_numbers", metadata=metadata)

nodes = Table(
    "nodes",
    metadata,
    Column("id", String, primary_key=True),
    Column("host", String, nullable=False),
    Column("start", BigInteger, nullable=False),
    Column("started_on", String, nullable=False),  # by the database's clock, as the next one
    Column("seen_on", String, nullable=False),
    Column("shared", Boolean, nullable=False),  # whether its cache's directory is
)

meta = Table(
    "meta",
    metadata,
    Column("key", String, primary_key=True),
    Column("value", Text, nullable=False),
)

caches = Table(
    "caches",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String, nullable=False, unique=True),
    Column("public", Boolean, nullable=False),
    Column("key_name", String, nullable=False),
    Column("public_key", String, nullable=False),  # base64, without the name
    Column("created_on", String, nullable=False),
    Column("old_key_name", String),  # the former key, until it is retired
    Column("old_public_key", String),
)

tokens = Table(
    "tokens",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("kind", String, nullable=False),
    Column("hash", String, nullable=False, unique=True),  # SHA-256 of the secret, in hexadecimal
    Column("description", Text, nullable=False),
    Column("cache_id", ForeignKey("caches.id")),
    Column("created_on", String, nullable=False),
    Column("expires_on", String),
    Column("revoked_on", String),
    Column("used_on", String),  # within some minutes
    # patterns of names, separated by commas; null for any, empty before the first one connects
    Column("agents", String),
    Column("issued_by", Integer),  # the enrolment token that an agent got this one for
    Column("most", Integer),  # agents that may enrol
    Column("replaces", Integer),  # the token that this one is the successor of
)

agents = Table(
    "agents",
    metadata,
    Column("id", String, primary_key=True),
    Column("name", String, nullable=False, unique=True),
    Column("system", String, nullable=False),
    Column("version", String, nullable=False),  # the release of Cachix whose protocol it speaks
    Column("created_on", String, nullable=False),
    Column("seen_on", String, nullable=False),
    Column("connected", Boolean, nullable=False),
    Column("last_index", Integer, nullable=False),
    Column("client", String),  # the version of cachix-deploy; null for any other agent
    Column("owner_id", Integer),  # the token of its own that the name is bound to
    Column("token_id", Integer),  # that it connected with last
    Column("token_since", String),
    Column("enrolled_by", Integer),  # the token that counts it
    Column("description", Text),
    Column("labels", String),  # sorted, each between two commas: `,db,prod,`
    Column("paused_on", String),
    Column("paused_by", String),
    Column("deployed", String),  # the store path that succeeded last
    Column("deployed_on", String),
    # what the agent itself says, see docs/protocol.rst; null for agents that say nothing
    Column("state_on", String),
    Column("running", String),  # a store path
    Column("running_since", String),
    Column("profile", String),
    Column("kind", String),  # nixos, darwin, home-manager or profile
    Column("node_id", String),  # that it connected to last
    Column("connection", BigInteger),  # the number of that connection
    Column("reboot_since", String),  # since when it needs a reboot
    Column("by_hand", String),  # rollback or activation, if the path was run at the machine
    Column("abilities", String),  # words of its last handshake, see docs/protocol.rst
    Index("agents_by_node", "node_id", "connected"),
)

deployments = Table(
    "deployments",
    metadata,
    Column("id", String, primary_key=True),
    Column("agent_id", ForeignKey("agents.id"), nullable=False),
    Column("index", Integer, nullable=False),
    Column("store_path", String, nullable=False),
    Column("rollback_script", String),
    Column("status", String, nullable=False),
    Column("reason", Text),
    Column("closure_size", BigInteger),  # bytes
    Column("created_on", String, nullable=False),
    Column("started_on", String),
    Column("finished_on", String),
    Column("log_next", Integer, nullable=False),  # the number of log lines that are stored
    Column("step", String),  # that the agent reported last
    Column("outcome", String),
    Column("cancel_requested", String),  # when, while the agent has not answered
    Column("cancel_refused", String),  # when the agent said that it was too late
    Column("signature", Text),  # of CI, as JSON
    Column("log_size", BigInteger),  # bytes; null for 0
    # lines that the agent has sent, less those that are stored; null as long as none is dropped
    Column("log_dropped", Integer),
    Column("ended_on", String),  # by the server's clock; `finished_on` is by the agent's
    Column("run_id", ForeignKey("runs.id")),
    Column("actor", String),  # who ordered it
    Column("retry_of", Integer),  # the index of the deployment that this one repeats
    Column("before", String),  # the store path that ran when it was ordered
    Column("steps", Text),  # when each step was reported, as JSON: [[step, time], ...]
    # by system, as JSON, while the system of the agent is not known yet
    Column("rollback_scripts", Text),
    Column("sent_to", BigInteger),  # the number of the connection that it was sent on last
    Column("operation", String),  # null for switch
    Column("reboot", String),  # null for never
    UniqueConstraint("agent_id", "index"),
    Index("deployments_by_status", "agent_id", "status"),
    Index("deployments_by_run", "run_id", "status", "outcome"),  # counted from this alone
    Index("deployments_by_state", "status", "agent_id"),
    Index("deployments_by_time", "created_on"),
)

runs = Table(
    "runs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("created_on", String, nullable=False),
    Column("actor", String, nullable=False),
    Column("action", String, nullable=False),  # deploy, retry or roll back
    Column("source", Text),  # what CI said about itself, as JSON: see docs/protocol.rst
    Column("of_run", Integer),  # the run that this one retries or rolls back
)

log_chunks = Table(
    "log_chunks",
    metadata,
    Column("deployment_id", ForeignKey("deployments.id"), primary_key=True),
    Column("first", Integer, primary_key=True),  # index of the first line
    Column("count", Integer, nullable=False),
    Column("body", Text, nullable=False),  # the lines' JSON objects, joined by newlines
)

audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("time", String, nullable=False),
    Column("actor", String, nullable=False),
    Column("address", String, nullable=False),
    Column("action", String, nullable=False),
    Column("detail", Text, nullable=False),
)

people = Table(
    "people",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String, nullable=False, unique=True),
    Column("role", String, nullable=False),
    Column("created_on", String, nullable=False),
)

links = Table(
    "links",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("hash", String, nullable=False, unique=True),  # as in `tokens`
    Column("person_id", ForeignKey("people.id", ondelete="CASCADE"), nullable=False),
    Column("created_on", String, nullable=False),
    Column("expires_on", String, nullable=False),
    Column("used_on", String),
)

sessions = Table(
    "sessions",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("hash", String, nullable=False, unique=True),  # of the cookie's value
    Column("person_id", ForeignKey("people.id", ondelete="CASCADE")),
    Column("token_id", ForeignKey("tokens.id")),  # instead of a person
    Column("created_on", String, nullable=False),
    Column("expires_on", String, nullable=False),
    Column("seen_on", String, nullable=False),  # within some minutes
    Column("address", String, nullable=False),
    Column("browser", String, nullable=False),
)

webhooks = Table(
    "webhooks",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("url", Text, nullable=False),
    Column("format", String, nullable=False),  # json, slack or ntfy
    Column("events", String, nullable=False),  # separated by commas
    Column("label", String),  # of the agents that it is about; null for all
    Column("key", String, nullable=False),  # of the HMAC
    Column("created_on", String, nullable=False),
)

webhook_messages = Table(
    "webhook_messages",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("webhook_id", ForeignKey("webhooks.id", ondelete="CASCADE"), nullable=False),
    Column("created_on", String, nullable=False),
    Column("body", Text, nullable=False),  # the events, as JSON
    Column("due_on", String),  # when it is sent next; null once that has ended
    Column("tries", Integer, nullable=False),
    Column("answer", Text),  # to the last try
    Column("delivered_on", String),
    Index("webhook_messages_due", "due_on"),
)
