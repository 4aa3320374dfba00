"""Shared by all requests: settings, database, open websockets, signs of life."""

from __future__ import annotations

from dataclasses import dataclass, field

from flask import Flask, current_app

from cachix_protocol import TERMINAL
from cachix_workspace.audit import Refusals
from cachix_workspace.database import Database
from cachix_workspace.deployments import DeploymentRow
from cachix_workspace.hub import Hub
from cachix_workspace.life import Signs
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
    used: dict[int, str] = field(default_factory=dict)  # tokens, and when; written now and then

    def note_report(self, row: DeploymentRow) -> None:
        """Let everybody know that an agent has reported, and how the deployment stands now."""
        if row.status in TERMINAL:
            self.signs.forget(row.id)
        else:
            self.signs.note(row.id)
        self.hub.wake_agent(row.agent_id)
        self.hub.wake_viewers(row.id)


def workspace_of(app: Flask) -> Workspace:
    """The workspace of an application."""
    workspace: Workspace = app.extensions[KEY]
    return workspace


def current_workspace() -> Workspace:
    """The workspace of the request that this thread is answering."""
    return workspace_of(current_app)
