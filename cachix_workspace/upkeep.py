"""Changes of agents, tokens and the workspace by operators: each is audited with it."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Connection, delete, select, update

from cachix_protocol import IN_PROGRESS, is_agent_name, listed, utc_now
from cachix_workspace import (
    agents,
    audit,
    cache,
    collect,
    deployments,
    freeze,
    owners,
    people,
    tokens,
    webhooks,
)
from cachix_workspace import tables as t
from cachix_workspace.agents import AgentRow
from cachix_workspace.cache import CacheRow
from cachix_workspace.database import put_meta
from cachix_workspace.deployments import DeploymentRow
from cachix_workspace.freeze import Frozen
from cachix_workspace.orders import Actor
from cachix_workspace.people import INVITATION_LASTS, Person
from cachix_workspace.refusal import Refusal
from cachix_workspace.settings import Settings
from cachix_workspace.tokens import Token
from cachix_workspace.webhooks import Webhook

MAX_NAME = 60  # characters of the workspace's name


def _note(connection: Connection, by: Actor, action: str, detail: str) -> None:
    audit.record(connection, by.name, action, detail, by.address)


# --- agents ---------------------------------------------------------------------------------------


def pause(connection: Connection, names: Collection[str], by: Actor) -> list[AgentRow]:
    """Let deployments of these agents wait. Raises Refusal (404)."""
    agents.find_all(connection, names)
    agents.pause(connection, names, by.name)
    _note(connection, by, "agent pause", listed(sorted(names)))
    return agents.find_all(connection, names)


def resume(connection: Connection, names: Collection[str], by: Actor) -> list[AgentRow]:
    """Let these agents have what waits for them. Raises Refusal (404)."""
    agents.find_all(connection, names)
    agents.resume(connection, names)
    _note(connection, by, "agent resume", listed(sorted(names)))
    return agents.find_all(connection, names)


def set_labels(
    connection: Connection, names: Collection[str], text: str, by: Actor
) -> list[AgentRow]:
    """Give these agents the labels in `text` instead of theirs. Raises Refusal (400 or 404)."""
    labels = agents.checked_labels(text)
    agents.find_all(connection, names)
    agents.set_labels(connection, names, labels)
    _note(connection, by, "agent labels", f"{listed(sorted(names))}: {', '.join(labels) or 'none'}")
    return agents.find_all(connection, names)


def describe(connection: Connection, name: str, text: str, by: Actor) -> AgentRow:
    """Say what an agent is. Raises Refusal (404)."""
    agents.find_all(connection, [name])
    agents.describe(connection, name, text)
    _note(connection, by, "agent description", name)
    return agents.find(connection, name)


def rename(connection: Connection, name: str, new: str, by: Actor) -> AgentRow:
    """Give an agent another name, and the tokens that are for it alone. Raises Refusal.

    The secret that its machine keeps is for the former name, and ends: the machine comes again
    with its enrolment token.
    """
    agent = agents.find_all(connection, [name])[0]
    check_name(new)
    if agents.find_known(connection, new) is not None:
        raise Refusal(409, f"there is an agent {new} already")
    if agent.owner_id is not None:
        owners.move(connection, name)
    theirs = (t.tokens.c.agents == name) & t.tokens.c.revoked_on.is_(None)
    connection.execute(update(t.tokens).where(theirs).values(agents=new))
    connection.execute(update(t.agents).where(t.agents.c.name == name).values(name=new))
    _note(connection, by, "agent rename", f"{name}, now {new}")
    return agents.find(connection, new)


def check_name(name: str) -> None:
    """Raises Refusal (400) if this can't be an agent's name."""
    if not is_agent_name(name):
        allowed = "letters, digits, `.`, `_` and `-`, at most 128"
        raise Refusal(400, f"an agent's name has {allowed}, not {name[:80]!r}")


def move(connection: Connection, name: str, by: Actor) -> bool:
    """Let another machine have a name; False if it was not bound to one. Raises Refusal (404)."""
    agents.find_all(connection, [name])
    moved = owners.move(connection, name)
    if moved:
        _note(connection, by, "agent move", name)
    return moved


def remove(connection: Connection, name: str, by: Actor) -> AgentRow:
    """Forget an agent with its deployments and logs, and end the tokens that are for it alone.

    Raises Refusal (404, or 409 while a deployment runs).
    """
    agents.find_all(connection, [name])
    agent = agents.find(connection, name, lock=True)
    mine = t.deployments.c.agent_id == agent.id
    running = select(t.deployments.c.index).where(mine & (t.deployments.c.status == IN_PROGRESS))
    if connection.execute(running.limit(1)).one_or_none() is not None:
        raise Refusal(409, f"a deployment runs on {name}: remove it once that has ended")
    theirs = (t.tokens.c.agents == name) & t.tokens.c.revoked_on.is_(None)
    connection.execute(update(t.tokens).where(theirs).values(revoked_on=utc_now()))
    ids = select(t.deployments.c.id).where(mine)
    connection.execute(delete(t.log_chunks).where(t.log_chunks.c.deployment_id.in_(ids)))
    connection.execute(delete(t.deployments).where(mine))
    connection.execute(delete(t.agents).where(t.agents.c.id == agent.id))
    _note(connection, by, "agent remove", name)
    return agent


# --- tokens ---------------------------------------------------------------------------------------


def rotate_token(connection: Connection, number: int, by: Actor) -> tuple[Token, int, str]:
    """Make the successor of a token; the former one, and number and secret of the new one.

    Raises Refusal (404 or 409).
    """
    token = tokens.get(connection, number)
    if token is None or token.state(utc_now()) != "valid":
        hint = "see `cachix-workspace token list`"
        raise Refusal(404, f"there is no valid token {number}: {hint}")
    if token.issued_by is not None:
        move = f"`cachix-workspace agent move {token.agents}`"
        text = f"token {number} is kept by the agent itself: {move} lets it get another"
        raise Refusal(409, text)
    if tokens.successor(connection, number) is not None:
        hint = "see `cachix-workspace token list`"
        raise Refusal(409, f"token {number} has a successor already: {hint}")
    successor, secret = tokens.rotate(connection, token)
    _note(connection, by, "token rotate", f"{number}, now {successor}")
    return token, successor, secret


def revoke_token(connection: Connection, number: int, and_agents: bool, by: Actor) -> list[int]:
    """Revoke a token, and perhaps those that agents got for it; the numbers of these.

    Raises Refusal (404).
    """
    if not tokens.revoke(connection, number):
        raise Refusal(404, f"there is no token {number}: see `cachix-workspace token list`")
    issued = tokens.revoke_issued(connection, number) if and_agents else []
    also = f" and {len(issued)} of its agents" if and_agents else ""
    _note(connection, by, "token revoke", f"{number}{also}")
    return issued


# --- the workspace --------------------------------------------------------------------------------


def name_workspace(connection: Connection, name: str, by: Actor) -> None:
    """Name the workspace. Raises Refusal (400)."""
    name = " ".join(name.split())[:MAX_NAME].rstrip()
    if not name or not name.isprintable():
        raise Refusal(400, "the workspace's name has letters that one can see")
    put_meta(connection, "name", name)
    _note(connection, by, "workspace name", name)


def cancel(connection: Connection, deployment_id: str, by: Actor) -> tuple[DeploymentRow, bool]:
    """Cancel a deployment, or ask its agent to; it, and False if it has ended already."""
    row, is_cancelled = deployments.cancel(connection, deployment_id)
    name = agents.get(connection, row.agent_id).name
    _note(connection, by, "cancel", f"{name}, deployment {row.index}: now {row.status}")
    return row, is_cancelled


# --- caches ---------------------------------------------------------------------------------------


def create_cache(
    connection: Connection, name: str, is_public: bool, settings: Settings, by: Actor
) -> tuple[CacheRow, str]:
    """Create a cache; it, and its secret key. Raises Refusal (400 or 409)."""
    row, secret = cache.create(connection, name, is_public, settings)
    _note(connection, by, "cache create", f"{name} ({'public' if is_public else 'private'})")
    return row, secret


def rotate_cache(connection: Connection, name: str, by: Actor) -> tuple[CacheRow, str]:
    """Make a new key for a cache; the cache, and the secret key. Raises Refusal (404 or 409)."""
    row, secret = cache.rotate(connection, name)
    _note(connection, by, "cache key rotate", f"{name}, now {row.key}")
    return row, secret


def retire_cache(connection: Connection, name: str, by: Actor) -> CacheRow:
    """Drop the former key of a cache. Raises Refusal (404 or 409)."""
    row = cache.retire(connection, name)
    _note(connection, by, "cache key retire", f"{name}, left {row.key}")
    return row


def pin(
    connection: Connection, settings: Settings, row: CacheRow, path: str, by: Actor
) -> list[str]:
    """Keep a store path in a cache; all pins. Raises Refusal (400, 404 or 409)."""
    paths = collect.pin(connection, settings, row, path)
    _note(connection, by, "cache pin", f"{row.name}: {path}")
    return paths


def unpin(connection: Connection, row: CacheRow, path: str, by: Actor) -> list[str]:
    """Let go of a store path in a cache; all pins. Raises Refusal (404)."""
    paths = collect.unpin(connection, row, path)
    _note(connection, by, "cache unpin", f"{row.name}: {path}")
    return paths


# --- people ---------------------------------------------------------------------------------------


def add_person(connection: Connection, name: str, role: str, by: Actor) -> tuple[Person, str]:
    """Add a person; him, and the secret of his invitation. Raises Refusal (400 or 409)."""
    person = people.add(connection, name, role)
    _note(connection, by, "person add", f"{name} ({role})")
    return person, people.make_link(connection, person, INVITATION_LASTS)


def make_link(connection: Connection, name: str, by: Actor) -> tuple[Person, str]:
    """Make a link that signs a person in; him, and its secret. Raises Refusal (404)."""
    person = people.get(connection, name)
    _note(connection, by, "login link", name)
    return person, people.make_link(connection, person)


def change_role(connection: Connection, name: str, role: str, by: Actor) -> Person:
    """Give a person another role. Raises Refusal (400, 404 or 409)."""
    person = people.change_role(connection, name, role)
    _note(connection, by, "person role", f"{name}: {person.role}")
    return person


def remove_person(connection: Connection, name: str, by: Actor) -> None:
    """Remove a person, who is signed out by that. Raises Refusal (404 or 409)."""
    people.remove(connection, name)
    _note(connection, by, "person remove", name)


def end_session(connection: Connection, number: int, by: Actor) -> None:
    """Sign a browser out. Raises Refusal (404)."""
    people.end(connection, number)
    _note(connection, by, "session end", str(number))


# --- webhooks and the freeze ----------------------------------------------------------------------


def create_webhook(
    connection: Connection, url: str, format: str, events: list[str], label: str, by: Actor
) -> Webhook:
    """Create a webhook; an empty label is for all agents. Raises Refusal (400)."""
    hook = webhooks.create(connection, url, format, events, label or None)
    _note(connection, by, "webhook create", f"{hook.id} ({hook.format}) {hook.shown_url}")
    return hook


def remove_webhook(connection: Connection, number: int, by: Actor) -> None:
    """Remove a webhook. Raises Refusal (404)."""
    hook = webhooks.remove(connection, number)
    _note(connection, by, "webhook remove", f"{hook.id} {hook.shown_url}")


def stop_orders(connection: Connection, reason: str, by: Actor) -> Frozen:
    """Freeze the workspace. Raises Refusal (400)."""
    frozen = freeze.freeze(connection, reason, by.name)
    _note(connection, by, "freeze", frozen.reason)
    return frozen


def take_orders(connection: Connection, by: Actor) -> None:
    """Thaw the workspace, if it is frozen."""
    if freeze.thaw(connection):
        _note(connection, by, "thaw", "")
