"""The API for binary caches."""

from __future__ import annotations

from cachix_workspace import audit, cache, collect, holdings, recent, upkeep
from cachix_workspace.cache import CacheRow
from cachix_workspace.context import current_workspace
from cachix_workspace.management import cache_shapes as shapes
from cachix_workspace.management.access import admins, allows_cache, by, operations, operators
from cachix_workspace.management.shapes import Json
from cachix_workspace.refusal import Refusal

blueprint = operations("caches", "Binary caches")


def _shown(row: CacheRow, secret: str | None = None) -> Json:
    return shapes.cache(row, cache.url(current_workspace().settings, row.name), secret)


@blueprint.get("/caches")
@blueprint.response(200, shapes.Caches)
@operators
def list_caches() -> Json:
    """List caches, the one that agents use by default first"""
    with current_workspace().database.read() as connection:
        rows = cache.list_all(connection)
    return {"caches": [_shown(row) for row in rows if allows_cache(row.id)]}


@blueprint.post("/caches")
@blueprint.arguments(shapes.NewCache)
@blueprint.response(201, shapes.CacheWithKey)
@admins
def create_cache(new: Json) -> Json:
    """Create a cache; the answer has its secret key"""
    workspace = current_workspace()
    with workspace.database.write() as connection:
        row, secret = upkeep.create_cache(
            connection, new["name"], new["public"], workspace.settings, by()
        )
    workspace.publish("all")
    return _shown(row, secret)


@blueprint.get("/caches/<name>")
@blueprint.response(200, shapes.CacheDetail)
@operators
def show_cache(name: str) -> Json:
    """Show a cache, what was pushed to it of late, and what no key of it has signed"""
    settings = current_workspace().settings
    with current_workspace().database.read() as connection:
        row = cache.find_named(connection, name)
        pins = collect.pins(connection, row)
    if not allows_cache(row.id):
        raise Refusal(403, "this token is for another cache")
    pushed = [shapes.pushed(one) for one in recent.recent(settings, row)]
    facts = {"recent": pushed, "pins": pins, "unsigned": holdings.unsigned(settings, row)}
    return {**_shown(row), **facts}


@blueprint.post("/caches/<name>/gc")
@blueprint.arguments(shapes.Collection)
@blueprint.response(200, shapes.Collected)
@admins
def collect_garbage(terms: Json, name: str) -> Json:
    """Remove from a cache what no deployment, pin or late push needs"""
    settings, who = current_workspace().settings, by()
    with current_workspace().database.read() as connection:
        row = cache.find_named(connection, name)
        needed = collect.roots(connection, terms["keepDeployments"])
        needed.update(collect.pins(connection, row))
    plan = collect.plan(settings, row, needed, terms["keepDays"])
    size = plan.size if terms["dryRun"] else collect.carry_out(settings, row, plan)
    if not terms["dryRun"]:
        detail = f"{name}: {len(plan.removed)} store paths, {size} bytes"
        with current_workspace().database.write() as connection:
            audit.record(connection, who.name, "cache gc", detail, who.address)
    facts = {"removed": plan.removed, "kept": plan.kept, "dryRun": terms["dryRun"]}
    return {**facts, "bytes": size}


@blueprint.post("/caches/<name>/pins")
@blueprint.arguments(shapes.Pin)
@blueprint.response(201, shapes.Pins)
@admins
def pin_path(new: Json, name: str) -> Json:
    """Keep a store path with its closure in a cache"""
    workspace = current_workspace()
    with workspace.database.write() as connection:
        row = cache.find_named(connection, name)
        path = new["storePath"]
        return {"pins": upkeep.pin(connection, workspace.settings, row, path, by())}


@blueprint.delete("/caches/<name>/pins")
@blueprint.arguments(shapes.Pin, location="query")
@blueprint.response(200, shapes.Pins)
@admins
def unpin_path(query: Json, name: str) -> Json:
    """Let go of a store path in a cache"""
    with current_workspace().database.write() as connection:
        row = cache.find_named(connection, name)
        return {"pins": upkeep.unpin(connection, row, query["storePath"], by())}


@blueprint.post("/caches/<name>/rotate")
@blueprint.response(201, shapes.CacheWithKey)
@admins
def rotate_cache_key(name: str) -> Json:
    """Make a new key for a cache; the answer has the secret one"""
    with current_workspace().database.write() as connection:
        row, secret = upkeep.rotate_cache(connection, name, by())
    return _shown(row, secret)


@blueprint.post("/caches/<name>/retire")
@blueprint.response(200, shapes.Cache)
@admins
def retire_cache_key(name: str) -> Json:
    """Drop the former key of a cache"""
    with current_workspace().database.write() as connection:
        return _shown(upkeep.retire_cache(connection, name, by()))
