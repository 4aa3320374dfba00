"""The command `audit`."""

from __future__ import annotations

from typing import Any

from cachix_console import number
from cachix_workspace.cli.backend import backend, every
from cachix_workspace.cli.output import show_json, show_table

MOST = 1_000_000


def run(options: dict[str, Any]) -> None:
    """Show who did what when, the newest last. Raises Error."""
    limit = int(number(options, "--limit", 1, MOST))
    entries = every(backend(options), "/audit", "entries", limit)[::-1]
    if options["--json"]:
        show_json(entries)
        return
    table = [["TIME", "WHO", "FROM", "WHAT", "DETAIL"]]
    table += [
        [one["time"][:19], one["actor"], one["address"] or "-", one["action"], one["detail"]]
        for one in entries
    ]
    show_table(table)
