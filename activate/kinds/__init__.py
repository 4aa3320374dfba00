"""The kinds of store paths, in order of detection.

A kind is a module with the names of `Kind`, in which each do stands beside its undo.
"""

from __future__ import annotations

import os
import re
from typing import Optional, Protocol

from activate.kinds import darwin, home_manager, nixos, plain
from activate.kinds.change import Change
from activate.kinds.verdict import Policy, Verdict
from activate.process import Error, Run


class Kind(Protocol):
    """The names that a module of a kind has."""

    NAME: str
    NEEDS_PREVIOUS: bool  # it can't be rolled back without a previous path
    MAY_REMOVE_FILES: bool  # its activation may end the agent, or remove files of the agent
    LOCK_FILES: tuple[str, ...]  # locked by whatever switches the system, with flock(2)
    PROGRAM: str  # the program that activates, below the store path; empty if there is none
    OPERATIONS: tuple[str, ...]  # that it knows
    REFUSAL: re.Pattern[str]  # in a line of an activation that refuses to begin
    BEGUN: re.Pattern[str]  # at the start of a line of an activation that has begun

    def detect(self, path: str) -> bool: ...
    def profile_path(self, name: Optional[str]) -> str: ...
    def running_path(self, profile: str) -> Optional[str]: ...
    def activate(self, change: Change, run: Run) -> int: ...
    def judge(self, status: int, new_runs: bool, output: str, policy: Policy) -> Verdict: ...
    def dry_activate(self, change: Change, run: Run) -> int: ...
    def commit(self, change: Change, run: Run) -> None: ...
    def rollback(self, change: Change, run: Run) -> list[str]: ...


KINDS: tuple[Kind, ...] = (nixos, darwin, home_manager, plain)


def detect(path: str) -> Kind:
    """The kind of a store path, by the markers in it. Raises Error if the path does not exist."""
    if not os.path.lexists(path):
        raise Error(f"{path} does not exist: Nix takes it for valid, but it is gone from the disk")
    return next(kind for kind in KINDS if kind.detect(path))


def find(name: Optional[str]) -> Optional[Kind]:
    """The kind of this name; None if this version does not know it."""
    return next((kind for kind in KINDS if name == kind.NAME), None)
