"""Starting a deployment by hand: choose agents, choose a path, see what changes, confirm."""

from __future__ import annotations

from dataclasses import dataclass

from flask import Blueprint, Response, request

from cachix_protocol import is_store_path
from cachix_workspace import agents, blocks, cache, difference, orders, recent
from cachix_workspace.cache import CacheRow
from cachix_workspace.context import Workspace, current_workspace
from cachix_workspace.difference import Difference
from cachix_workspace.fleet import Brief, Filter
from cachix_workspace.pages import show
from cachix_workspace.pages.access import actor, page, to
from cachix_workspace.pages.enrol import url
from cachix_workspace.people import OPERATOR
from cachix_workspace.recent import Recent
from cachix_workspace.refusal import Refusal

start_pages = Blueprint("start_pages", __name__)

MOST_SHOWN = 200  # agents to choose among
MOST_DIFFERENCES = 5  # agents whose packages are compared


@dataclass(frozen=True)
class Offer:
    """A path that may be deployed; `reason` says why it does not fit the chosen agents."""

    recent: Recent
    cache: str
    reason: str


@dataclass(frozen=True)
class Step:
    """The change on an agent that a deployment would make."""

    agent: Brief
    then: str
    reason: str
    difference: Difference | None


def _chosen(workspace: Workspace) -> tuple[list[Brief], list[Brief]]:
    """All agents, and those that the request chooses: by name, or by label."""
    briefs = sorted(workspace.briefs(), key=lambda brief: brief.name)
    names, label = set(request.values.getlist("name")), request.values.get("label", "")
    chosen = [b for b in briefs if b.name in names or (label and label in b.labels)]
    return briefs, chosen


@page(start_pages, "/start", role=OPERATOR)
def get_start() -> Response:
    """Agents, and the paths that were pushed of late."""
    workspace = current_workspace()
    briefs, chosen = _chosen(workspace)
    with workspace.database.read() as connection:
        rows = cache.list_all(connection)
    offers = [
        Offer(one, row.name, _misfit(one, chosen))
        for row in rows
        for one in recent.recent(workspace.settings, row)
    ]
    offers.sort(key=lambda offer: -offer.recent.pushed)
    labels = sorted({label for brief in briefs for label in brief.labels})
    text = request.args.get("q", "").strip()[:200]
    names = {brief.name for brief in chosen}
    choices = [b for b in briefs if b.name in names or Filter(text).matches(b)]
    choices.sort(key=lambda brief: brief.name not in names)  # what is chosen is never left out
    return show.page(
        "start.html",
        total=len(briefs),
        briefs=choices[:MOST_SHOWN],
        left_out=max(0, len(choices) - MOST_SHOWN),
        text=text,
        chosen=names,
        offers=offers[:60],
        labels=labels,
        label=request.args.get("label", ""),
        path=request.args.get("path", "").strip(),
        push=blocks.push_line(url(), "./result") if rows else "",
    )


def _misfit(one: Recent, chosen: list[Brief]) -> str:
    """Why a path can't be for the chosen agents; empty if it may be."""
    if not one.is_signed:
        return "it has no signature by the cache's key"
    systems = {brief.system for brief in chosen if brief.system}
    if one.system and systems and one.system not in systems:
        return f"it is for {one.system}"
    kinds = {brief.kind for brief in chosen if brief.kind}
    if kinds and one.kind != "profile" and one.kind not in kinds:
        return f"it is a {one.kind} system"
    return ""


@page(start_pages, "/start/confirm", role=OPERATOR)
def get_confirm() -> Response:
    """The page that shows the changes, and asks."""
    workspace, path = current_workspace(), _path()
    _, chosen = _chosen(workspace)
    if not chosen:
        raise Refusal(400, "choose the agents to deploy to")
    with workspace.database.read() as connection:
        rows = cache.list_all(connection)
        signed = orders.signed_only(connection, [brief.name for brief in chosen])
    info = recent.find(workspace.settings, rows, path)
    steps = [
        Step(brief, path, _why_not(brief, path), _difference(workspace, rows, brief, path, number))
        for number, brief in enumerate(chosen)
    ]
    return show.page(
        "confirm.html",
        path=path,
        kind=recent.kind_of(path),
        steps=steps,
        signed=signed,
        info=info,
        push=blocks.push_line(url(), path) if rows else "",
        url=workspace.settings.link_by(request.host),
    )


def _path() -> str:
    """The path that the request names: pasted, or chosen. Raises Refusal (400)."""
    path = request.values.get("path", "").strip() or request.values.get("recent", "").strip()
    if not path:
        raise Refusal(400, "choose a store path, or paste one")
    if not is_store_path(path):
        raise Refusal(400, f"{path[:200]} is no store path such as /nix/store/HASH-NAME")
    return path


def _why_not(brief: Brief, path: str) -> str:
    kind = recent.kind_of(path)
    if brief.running == path:
        return "runs it already"
    if brief.kind and kind != "profile" and brief.kind != kind:
        return f"the path is a {kind} system, and this agent deploys {brief.kind}"
    return ""


def _difference(
    workspace: Workspace, rows: list[CacheRow], brief: Brief, path: str, number: int
) -> Difference | None:
    if number >= MOST_DIFFERENCES:
        return None
    return difference.between(workspace.settings, rows, brief.running, path)


@page(start_pages, "/start", role=OPERATOR, methods=("POST",))
def post_start() -> Response:
    """Order the path for the agents."""
    workspace, path, names = current_workspace(), _path(), request.form.getlist("name")
    if not names:
        raise Refusal(400, "choose the agents to deploy to")
    with workspace.database.write() as connection:
        agents.find_all(connection, names)
        order = orders.deploy_path(connection, names, path, actor())
    workspace.note_order(order)
    return to(f"/runs/{order.run_id}")
