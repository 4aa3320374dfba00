"""A closure as it lies on the disk: Nix may take for valid what is not there any more."""

from __future__ import annotations

import os
from typing import Optional

from activate import kinds, nix
from activate.agent import database
from activate.agent.download import replace_contents
from activate.agent.failure import DownloadFailed
from activate.process import Error, say

QUESTION_TIMEOUT = 300.0  # seconds


def missing(paths: list[str]) -> list[str]:
    """The paths in the closures of valid `paths` that are gone. Raises CommandFailed."""
    closure = database.requisites(paths)
    if closure is None:
        closure = nix.requisites(paths, QUESTION_TIMEOUT)
    return [path for path in closure if not os.path.lexists(path)]


def complete(paths: list[str], source: nix.Source, log: int, timeout: float) -> None:
    """Download again whatever is gone from the closures of `paths`.

    Raises DownloadFailed if it can't be had, or CommandFailed if Nix can't be run.
    """
    absent = missing(paths)
    if not absent:
        return
    say(log, f"gone from the disk, downloading again: {' '.join(absent)}")
    cause, output, by_signal = "Nix did not say why", "", False
    try:
        replace_contents(absent, source, log, timeout)
    except DownloadFailed as error:
        cause, output, by_signal = str(error), error.detail, not error.is_clear
    absent = missing(paths)
    if absent:
        raise DownloadFailed(
            f"{absent[0]} is gone from the disk, although Nix takes it for valid, and could not be "
            f"downloaded again ({cause}): push it to the cache, or run as root "
            f"`nix-store --repair-path {absent[0]}`; nothing was changed",
            output,
            by_signal,
        )


def check_programs(path: str, script: Optional[str]) -> None:
    """Raise Error if the program that activates or the rollback script has lost its contents.

    A path that has lost those may have lost more, so that it is not repaired by the way.
    """
    program = kinds.detect(path).PROGRAM
    for file in (script, f"{path}/{program}" if program else None):
        if file is not None and is_empty(file):
            remedy = f"run as root `nix-store --repair-path {nix.store_path_of(file)}`"
            raise Error(f"{file} is empty: {remedy}; nothing was changed")


def is_empty(file: str) -> bool:
    """Whether a file has no contents; False if it is missing."""
    try:
        return os.stat(file).st_size == 0
    except OSError:
        return False
