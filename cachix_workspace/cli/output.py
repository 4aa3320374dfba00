"""Results on stdout."""

from __future__ import annotations

import json
from typing import Any

from cachix_console import Screen, align, tell


def show(line: str) -> None:
    """Print a line of a result, cleaned. Raises BrokenPipeError if stdout can't take it.

    Screen has reported the reason, unless the reader just left.
    """
    screen = Screen()
    screen.print(line)
    if screen.broken:
        raise BrokenPipeError("stdout")


def show_json(value: Any) -> None:
    """Print a result as JSON."""
    for line in json.dumps(value, indent=2).split("\n"):
        show(line)


def show_table(rows: list[list[str]]) -> None:
    """Print rows as columns."""
    for row in align(rows):
        show("  ".join(row).rstrip())


def show_secret(what: str, secret: str, out: str | None) -> None:
    """Print a secret, or say which file has it."""
    tell(f"{what}, which is not shown again: {f'in {out}' if out else ''}".rstrip(" "))
    if not out:
        show(secret)
