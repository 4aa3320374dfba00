"""Results on stdout."""

from __future__ import annotations

import json
from typing import Any

from cachix_console import Screen, align


def show(text: str) -> None:
    """Print a result. Raises BrokenPipeError if stdout can't take it.

    Screen has reported the reason, unless the reader just left.
    """
    screen = Screen()
    screen.print(text)
    if screen.broken:
        raise BrokenPipeError("stdout")


def show_json(value: Any) -> None:
    """Print a result as JSON."""
    show(json.dumps(value, indent=2))


def show_table(rows: list[list[str]]) -> None:
    """Print rows as columns."""
    show("\n".join("  ".join(row).rstrip() for row in align(rows)))
