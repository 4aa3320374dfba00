"""Shared by all requests: settings, database, open websockets, signs of life."""

from __future__ import annotations

from dataclasses import dataclass, field

from flask import Flask, current_app

from cachix_protocol import TERMINAL
from cachix_workspace import fleet
from cachix_workspace.audit import Refusals
from cachix_workspace.database import Database
from cachix_workspace.deployments import DeploymentRow
from cachix_workspace.feed import Feed
from cachix_workspace.fleet import Brief
from cachix_workspace.hub import Hub
from cachix_workspace.life import Signs
from cachix_workspace.orders import Order
from cachix_workspace.settings import Settings
from cachix_workspace.uploads import Uploads

KEY = "workspace"  # in the application's extensions


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
        self.hub.wake_agent(row.agent_id)
        self.note_deployments(row)

    def note_order(self, order: Order) -> None:
        """Let everybody know what was ordered."""
        for row in order.rows.values():
            self.hub.wake_agent(row.agent_id)
        self.hub.wake_viewers(*order.replaced)
        owners = {f"agent:{row.agent_id}" for row in order.rows.values()}
        replaced = (f"deployment:{each}" for each in order.replaced)
        self.feed.publish("agents", "runs", *owners, *replaced)

    def note_deployments(self, *rows: DeploymentRow) -> None:
        """Let viewers and pages know that these deployments have changed."""
        self.hub.wake_viewers(*(row.id for row in rows))
        runs = {f"run:{row.run_id}" for row in rows if row.run_id is not None}
        ids = [f"deployment:{row.id}" for row in rows] + [f"agent:{row.agent_id}" for row in rows]
        self.feed.publish("agents", "runs", *runs, *ids)

    def note_log(self, deployment_id: str) -> None:
        """Let viewers and pages know that a log has grown."""
        self.hub.wake_viewers(deployment_id)
        self.feed.publish(f"log:{deployment_id}")

    def dismiss(self, agent_id: str) -> None:
        """Close the socket of an agent whose name or token has changed, and let pages know."""
        self.hub.dismiss(agent_id)
        self.feed.publish("agents", f"agent:{agent_id}")

    def note_agents(self, *agent_ids: str) -> None:
        """Let the sockets of these agents look again, and pages too."""
        for agent_id in agent_ids:
            self.hub.wake_agent(agent_id)
        self.feed.publish("agents", *(f"agent:{agent_id}" for agent_id in agent_ids))


def workspace_of(app: Flask) -> Workspace:
    """The workspace of an application."""
    workspace: Workspace = app.extensions[KEY]
    return workspace


def current_workspace() -> Workspace:
    """The workspace of the request that this thread is answering."""
    return workspace_of(current_app)
