"""Shared by all requests: the settings, the database and the open websockets."""

from __future__ import annotations

from dataclasses import dataclass

from flask import Flask, current_app

from cachix_workspace.database import Database
from cachix_workspace.hub import Hub
from cachix_workspace.settings import Settings

KEY = "workspace"  # in the application's extensions


@dataclass(frozen=True)
class Workspace:
    """The workspace that an application serves."""

    settings: Settings
    database: Database
    hub: Hub


def workspace_of(app: Flask) -> Workspace:
    """The workspace of an application."""
    workspace: Workspace = app.extensions[KEY]
    return workspace


def current_workspace() -> Workspace:
    """The workspace of the request that this thread is answering."""
    return workspace_of(current_app)
