"""The commands `agent list` and `agent move`."""

from __future__ import annotations

from typing import Any

from cachix_console import tell
from cachix_protocol import Error
from cachix_workspace import agents, audit, owners, tokens
from cachix_workspace.agents import AgentRow
from cachix_workspace.cli.output import show_json, show_table
from cachix_workspace.cli.place import open_workspace, operator
from cachix_workspace.refusal import Refusal

JSON_FIELDS = ("id", "name", "system", "version", "created_on", "seen_on", "connected", "client")


def run(options: dict[str, Any]) -> None:
    """Run one of the commands. Raises Error."""
    if options["move"]:
        move(options)
    else:
        list_all(options)


def move(options: dict[str, Any]) -> None:
    """Let another machine have a name."""
    name = options["NAME"]
    database, _ = open_workspace(options)
    with database.write() as connection:
        try:
            moved = owners.move(connection, name)
        except Refusal:
            hint = "see `cachix-workspace agent list`"
            raise Error(f"there is no agent {name[:128]!r}: {hint}") from None
        if moved:
            audit.record(connection, operator(), "agent move", name)
    if not moved:
        tell(f"{name} is not bound to a machine: any that has a token for it can connect")
        return
    tell(f"{name} is free: the next machine that connects with an enrolment token has it")


def list_all(options: dict[str, Any]) -> None:
    """List the agents."""
    database, _ = open_workspace(options)
    with database.read() as connection:
        rows = agents.list_all(connection)
        bound = {token.id: token for token in tokens.list_all(connection)}
    if options["--json"]:
        show_json(
            [
                {field: getattr(agent, field) for field in JSON_FIELDS}
                | {"bound": binding(agent, bound) is not None, "token": agent.token_id}
                for agent in rows
            ]
        )
        return
    some = any(agent.enrolled_by is not None for agent in rows)  # else none can be bound
    table = [["NAME", "STATE", "SYSTEM", "VERSION", "SINCE", *["TOKEN"] * some]]
    for agent in rows:
        state = "online" if agent.connected else "offline"
        program = f"cachix-deploy {agent.client}" if agent.is_ours else agent.version or "-"
        token = [binding(agent, bound) or "not bound to a machine"] * some
        table.append([agent.name, state, agent.system or "-", program, agent.seen_on, *token])
    show_table(table)


def binding(agent: AgentRow, by_id: dict[int, tokens.Token]) -> str | None:
    """Why nobody else can use an agent's name; None if others can."""
    if agent.owner_id is not None:
        return "its own"
    token = by_id.get(agent.token_id or 0)
    return f"token {token.id}" if token is not None and token.agents == agent.name else None
