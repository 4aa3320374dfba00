"""nix-darwin: it has no boot loader, so that the commit only sets the profile."""

from __future__ import annotations

import os
import re

from activate import nix, operation
from activate.kinds import nixos, verdict
from activate.kinds.change import Change, no_dry_run, restore_profile
from activate.process import CommandFailed, Run

NAME = "nix-darwin"
NEEDS_PREVIOUS = True
MAY_REMOVE_FILES = True
LOCK_FILES: tuple[str, ...] = ()
PROGRAM = "sw/bin/darwin-rebuild"
OPERATIONS: tuple[str, ...] = (operation.SWITCH,)
REFUSAL = re.compile(r"aborting activation")
BEGUN = re.compile(r"(setting up|configuring|reloading|restarting) |(user|system) defaults")
MARKERS = ("darwin-version", "darwin-version.json")  # the name changed over the years
profile_path = nixos.profile_path
running_path = nixos.running_path
judge = verdict.judge
dry_activate = no_dry_run


def detect(path: str) -> bool:
    """Whether `path` is a nix-darwin system."""
    return any(os.path.lexists(f"{path}/{marker}") for marker in MARKERS)


def activate(change: Change, run: Run) -> int:
    """Run the new system."""
    return run([f"{change.new}/{PROGRAM}", "activate"])


def commit(change: Change, run: Run) -> None:
    """Set the profile to the new system. Raises CommandFailed."""
    nix.set_profile(change.profile, change.new, run)


def rollback(change: Change, run: Run) -> list[str]:
    """Undo `commit` if it had begun, then `activate`; a message for each failure."""
    problems = []
    try:
        restore_profile(change, run)
    except OSError as error:
        problems.append(f"the profile could not be restored ({error})")
    try:
        status = run([f"{change.previous_running}/{PROGRAM}", "activate"])
        if status:
            activation = f"the activation of {change.previous_running}"
            problems.append(f"{activation} ended with status {status}")
    except CommandFailed as error:
        problems.append(str(error))
    return problems
