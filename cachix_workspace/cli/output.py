"""Results on stdout."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cachix_console import Screen, align, tell, write_secret
from cachix_protocol import Error

Json = dict[str, Any]


def show(line: str) -> None:
    """Print a line of a result, cleaned. Raises BrokenPipeError if stdout can't take it.

    Screen has reported the reason, unless the reader just left.
    """
    screen = Screen()
    screen.print(line)
    if screen.broken:
        raise BrokenPipeError("stdout")


def show_json(value: Any) -> None:
    """Print a result as JSON, with names as in `created_on`, where the API has `createdOn`."""
    for line in json.dumps(_renamed(value), indent=2).split("\n"):
        show(line)


def _renamed(value: Any) -> Any:
    """A value whose objects have names in lower case."""
    if isinstance(value, list):
        return [_renamed(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        re.sub("(?<=[a-z])[A-Z]", lambda match: f"_{match[0].lower()}", key): _renamed(each)
        for key, each in value.items()
    }


def show_table(rows: list[list[str]]) -> None:
    """Print rows as columns."""
    for row in align(rows):
        show("  ".join(row).rstrip())


def show_secret(what: str, secret: str, out: str | None) -> None:
    """Print a secret, or say which file has it."""
    tell(f"{what}, which is not shown again: {f'in {out}' if out else ''}".rstrip(" "))
    if not out:
        show(secret)


@contextlib.contextmanager
def new_files(paths: Sequence[str]) -> Iterator[Callable[[Sequence[str]], None]]:
    """New files for secrets, made before the secrets are: what can't be written would be lost.

    The function that it gives writes the secrets, in order. The files are removed if the block
    fails. Raises Error.
    """

    def write(secrets: Sequence[str]) -> None:
        for path, secret in zip(paths, secrets):
            try:
                with open(path, "w", encoding="ascii") as file:
                    file.write(f"{secret}\n")
            except OSError as error:
                lost = "its secret is lost, make another one"
                raise Error(f"{path} can't be written: {error.strerror}; {lost}") from None

    with contextlib.ExitStack() as stack:
        for path in paths:
            write_secret("", path)
            stack.callback(os.unlink, path)
        yield write
        stack.pop_all()
