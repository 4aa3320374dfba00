"""Shared by all requests: settings, database, open websockets, signs of life."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from flask import Flask, current_app

from cachix_protocol import TERMINAL
from cachix_workspace import fleet
from cachix_workspace.audit import Refusals
from cachix_workspace.cache_reads import Known
from cachix_workspace.database import Database
from cachix_workspace.deployments import DeploymentRow
from cachix_workspace.feed import Feed
from cachix_workspace.fleet import Brief
from cachix_workspace.grouped import Grouped
from cachix_workspace.hub import Hub
from cachix_workspace.life import Signs
from cachix_workspace.notify import (
    ALIVE,
    CHANGED,
    DISMISSED,
    DUE,
    GROWN,
    REVOKED,
    InProcess,
    Notifier,
)
from cachix_workspace.orders import Order
from cachix_workspace.parking import Lot
from cachix_workspace.presence import Presence
from cachix_workspace.roster import Roster
from cachix_workspace.settings import Settings
from cachix_workspace.turns import Turns
from cachix_workspace.uploads import Uploads

KEY = "workspace"  # in the application's extensions


@dataclass
class Node:
    """This server among others: its id, the number of its start, whether it has its database.

    `heard` is when the database answered last, by this process' clock.
    """

    id: str = ""
    start: int = 0
    heard: float = 0.0
    is_lost: bool = False


@dataclass(frozen=True)
class Workspace:
    """The workspace that an application serves."""

    settings: Settings
    database: Database
    hub: Hub
    signs: Signs
    uploads: Uploads = field(default_factory=Uploads)
    refusals: Refusals = field(default_factory=Refusals)
    feed: Feed = field(default_factory=Feed)
    shared: fleet.Shared = field(default_factory=fleet.Shared)
    known: Known = field(default_factory=Known)
    lot: Lot = field(default_factory=Lot)
    turns: Turns = field(default_factory=Turns)
    grouped: Grouped = field(default_factory=Grouped)
    presence: Presence = field(default_factory=Presence)
    roster: Roster = field(default_factory=Roster)
    node: Node = field(default_factory=Node)
    news: Notifier = field(default_factory=InProcess)
    revoked: threading.Event = field(default_factory=threading.Event)  # a token was, perhaps
    used: dict[int, str] = field(default_factory=dict)  # tokens, and when; written now and then

    def briefs(self) -> list[Brief]:
        """All agents, sorted: what needs a look first. Nobody may change the list."""
        return self.shared.get(self.feed, self._read_briefs)

    def _read_briefs(self) -> list[Brief]:
        with self.database.read() as connection:
            return fleet.brief_of_all(connection, self.signs, self.settings.lost_after)

    def note_report(self, row: DeploymentRow) -> None:
        """Let everybody know that an agent has reported, and how the deployment stands now."""
        if row.status in TERMINAL:
            self.signs.forget(row.id)
        else:
            self.signs.note(row.id)
        self.news.publish(DUE, [row.agent_id])
        self.note_deployments(row)

    def note_cancel(self, row: DeploymentRow) -> None:
        """Let the agent and pages know that a deployment was cancelled."""
        self.news.publish(DUE, [row.agent_id])
        self.note_deployments(row)

    def note_order(self, order: Order) -> None:
        """Let everybody know what was ordered."""
        self.news.publish(DUE, (row.agent_id for row in order.rows.values()))
        self.news.publish(GROWN, order.replaced)
        owners = {f"agent:{row.agent_id}" for row in order.rows.values()}
        replaced = (f"deployment:{each}" for each in order.replaced)
        self.publish("agents", "runs", *owners, *replaced)

    def note_deployments(self, *rows: DeploymentRow) -> None:
        """Let viewers and pages know that these deployments have changed."""
        self.news.publish(GROWN, (row.id for row in rows))
        runs = {f"run:{row.run_id}" for row in rows if row.run_id is not None}
        ids = [f"deployment:{row.id}" for row in rows] + [f"agent:{row.agent_id}" for row in rows]
        self.publish("agents", "runs", *runs, *ids)

    def note_log(self, deployment_id: str) -> None:
        """Let viewers and pages know that a log has grown."""
        self.news.publish(GROWN, [deployment_id])
        self.publish(f"log:{deployment_id}")

    def dismiss(self, agent_id: str) -> None:
        """Close the socket of an agent whose name or token has changed, and let pages know."""
        self.news.publish(DISMISSED, [agent_id])
        self.news.publish(REVOKED)
        self.publish("agents", f"agent:{agent_id}")

    def note_revoked(self, token_ids: Iterable[int]) -> None:
        """Let all nodes end the sockets and uploads of tokens that were revoked."""
        self.news.publish(REVOKED, map(str, token_ids))

    def note_agents(self, *agent_ids: str) -> None:
        """Let the sockets of these agents look again, and pages too."""
        self.news.publish(DUE, agent_ids)
        self.publish("agents", *(f"agent:{agent_id}" for agent_id in agent_ids))

    def publish(self, *topics: str) -> None:
        """Let pages know that these have changed."""
        self.news.publish(CHANGED, topics)

    def hear(self, kind: str, ids: tuple[str, ...]) -> None:
        """Hear of news, of this node or of another: those whom they concern look."""
        if kind == DUE:
            self.hub.wake_agent(*ids)
        elif kind == GROWN:
            self.hub.wake_viewers(*ids)
        elif kind == CHANGED:
            self.feed.publish(*ids)
        elif kind == DISMISSED:
            self.hub.dismiss(*ids)
        elif kind == ALIVE:
            self.signs.note(*ids)
        elif kind == REVOKED:
            self._end_tokens({int(each) for each in ids})

    def _end_tokens(self, token_ids: set[int]) -> None:
        """Admit nobody by what is remembered of tokens, and end what these are used for.

        Without numbers they are looked up at once, by the thread that does so now and then.
        """
        self.known.tokens.clear()
        self.roster.forget()
        self.hub.revoke(token_ids)
        self.uploads.revoke(token_ids)
        if not token_ids:
            self.revoked.set()


def workspace_of(app: Flask) -> Workspace:
    """The workspace of an application."""
    workspace: Workspace = app.extensions[KEY]
    return workspace


def current_workspace() -> Workspace:
    """The workspace of the request that this thread is answering."""
    return workspace_of(current_app)
