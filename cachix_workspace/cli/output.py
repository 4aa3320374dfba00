"""Results on stdout."""

from __future__ import annotations

import json
import os
from typing import Any

from cachix_console import Screen, align
from cachix_protocol import Error


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


def write_secret(text: str, path: str) -> None:
    """Write a secret into a new file that only this user can read. Raises Error."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(file, "w", encoding="ascii") as stream:
            stream.write(text + "\n")
    except OSError as error:
        raise Error(f"{path} can't be written: {error.strerror}; name a new file") from None
