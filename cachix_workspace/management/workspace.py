"""The API for the workspace itself: its name and state, the audit, the freeze."""

from __future__ import annotations

from collections import Counter

from cachix_protocol import __version__
from cachix_workspace import audit, fleet, freeze, upkeep
from cachix_workspace.context import current_workspace
from cachix_workspace.database import get_meta
from cachix_workspace.management import key_shapes
from cachix_workspace.management.access import admins, allows, by, operations, operators
from cachix_workspace.management.shapes import Json, offset, paged

blueprint = operations("workspace", "The workspace itself: name, state, audit, freeze")


def _state() -> Json:
    workspace = current_workspace()
    with workspace.database.read() as connection:
        name = get_meta(connection, "name")
        lost_after = workspace.settings.lost_after
        briefs = fleet.brief_of_all(connection, workspace.signs, lost_after)
        frozen = freeze.get(connection)
    mine = [one for one in briefs if allows(one.name)]
    return {
        "name": name,
        "url": workspace.settings.public_url,
        "version": __version__,
        "agents": len(mine),
        "states": dict(Counter(one.state.key for one in mine)),
        "paused": sum(one.paused_on is not None for one in mine),
        "freeze": key_shapes.freeze(frozen),
    }


@blueprint.get("/workspace")
@blueprint.response(200, key_shapes.Workspace)
@operators
def show_workspace() -> Json:
    """Show how the workspace stands"""
    return _state()


@blueprint.patch("/workspace")
@blueprint.arguments(key_shapes.WorkspaceChange)
@blueprint.response(200, key_shapes.Workspace)
@admins
def change_workspace(change: Json) -> Json:
    """Name the workspace"""
    with current_workspace().database.write() as connection:
        upkeep.name_workspace(connection, change["name"], by())
    return _state()


@blueprint.get("/audit")
@blueprint.arguments(key_shapes.AuditQuery, location="query")
@blueprint.response(200, key_shapes.Entries)
@admins
def list_audit(query: Json) -> Json:
    """Show who did what when, the newest first"""
    page, limit = query["page"], query["limit"]
    with current_workspace().database.read() as connection:
        entries = audit.list_page(connection, query["text"], limit + 1, offset(query))
    return paged([key_shapes.entry(one) for one in entries], page, limit, "entries")


@blueprint.get("/freeze")
@blueprint.response(200, key_shapes.Freeze)
@operators
def show_freeze() -> Json:
    """Show whether the workspace takes orders"""
    with current_workspace().database.read() as connection:
        return key_shapes.freeze(freeze.get(connection))


@blueprint.put("/freeze")
@blueprint.arguments(key_shapes.Reason)
@blueprint.response(200, key_shapes.Freeze)
@admins
def freeze_workspace(new: Json) -> Json:
    """Take no more orders"""
    with current_workspace().database.write() as connection:
        frozen = upkeep.stop_orders(connection, new["reason"], by())
    current_workspace().publish("all")
    return key_shapes.freeze(frozen)


@blueprint.delete("/freeze")
@blueprint.response(200, key_shapes.Freeze)
@admins
def thaw_workspace() -> Json:
    """Take orders again"""
    with current_workspace().database.write() as connection:
        upkeep.take_orders(connection, by())
    current_workspace().publish("all")
    return key_shapes.freeze(None)
