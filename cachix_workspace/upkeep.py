"""What operators do with agents, tokens and the workspace: each change is audited with it."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Connection, delete, select, update

from cachix_protocol import IN_PROGRESS, is_agent_name, listed, utc_now
from cachix_workspace import agents, audit, owners, tokens
from cachix_workspace import tables as t
from cachix_workspace.agents import AgentRow
from cachix_workspace.database import put_meta
from cachix_workspace.orders import Actor
from cachix_workspace.refusal import Refusal
from cachix_workspace.tokens import Token

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
    agent = agents.find_all(connection, [name])[0]
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


def revoke_token(connection: Connection, number: int, and_agents: bool, by: Actor) -> int:
    """Revoke a token, and perhaps those that agents got for it; how many of these there were.

    Raises Refusal (404).
    """
    if not tokens.revoke(connection, number):
        raise Refusal(404, f"there is no token {number}: see `cachix-workspace token list`")
    issued = tokens.revoke_issued(connection, number) if and_agents else 0
    also = f" and {issued} of its agents" if and_agents else ""
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
