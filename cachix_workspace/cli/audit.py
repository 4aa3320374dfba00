"""The command `audit`."""

from __future__ import annotations

import dataclasses
from typing import Any

from cachix_console import number
from cachix_workspace import audit
from cachix_workspace.cli.output import show_json, show_table
from cachix_workspace.cli.place import open_workspace

MOST = 1_000_000


def run(options: dict[str, Any]) -> None:
    """Show who did what when. Raises Error."""
    limit = int(number(options, "--limit", 1, MOST))
    database, _ = open_workspace(options)
    with database.read() as connection:
        entries = audit.list_some(connection, limit)
    if options["--json"]:
        show_json([dataclasses.asdict(entry) for entry in entries])
        return
    table = [["TIME", "WHO", "FROM", "WHAT", "DETAIL"]]
    table += [
        [entry.time[:19], entry.actor, entry.address or "-", entry.action, entry.detail]
        for entry in entries
    ]
    show_table(table)
