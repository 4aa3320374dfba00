"""The command `agent list`."""

from __future__ import annotations

from typing import Any

from cachix_workspace import agents
from cachix_workspace.cli.output import show_json, show_table
from cachix_workspace.cli.place import open_workspace

JSON_FIELDS = ("id", "name", "system", "version", "created_on", "seen_on", "connected", "client")


def run(options: dict[str, Any]) -> None:
    """List the agents. Raises Error."""
    database, _ = open_workspace(options)
    with database.read() as connection:
        rows = agents.list_all(connection)
    if options["--json"]:
        show_json([{field: getattr(agent, field) for field in JSON_FIELDS} for agent in rows])
        return
    table = [["NAME", "STATE", "SYSTEM", "VERSION", "SINCE"]]
    for agent in rows:
        state = "online" if agent.connected else "offline"
        program = f"cachix-deploy {agent.client}" if agent.is_ours else agent.version or "-"
        table.append([agent.name, state, agent.system or "-", program, agent.seen_on])
    show_table(table)
