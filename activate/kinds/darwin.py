"""nix-darwin: no boot loader, so the commit is the profile alone."""

from __future__ import annotations

import os

from activate import nix
from activate.kinds import nixos, verdict
from activate.kinds.change import Change, restore_profile
from activate.process import CommandFailed, Run

NAME = "nix-darwin"
NEEDS_PREVIOUS = True
MAY_REMOVE_FILES = True
profile_path = nixos.profile_path
running_path = nixos.running_path
judge = verdict.judge


def detect(path: str) -> bool:
    """Whether `path` is a nix-darwin system; the marker's name changed over the years."""
    return any(
        os.path.lexists(f"{path}/{marker}") for marker in ("darwin-version", "darwin-version.json")
    )


def activate(change: Change, run: Run) -> int:
    """Run the new system."""
    return run([f"{change.new}/sw/bin/darwin-rebuild", "activate"])


def commit(change: Change, run: Run) -> None:
    """Make the new system the profile's. Raises CommandFailed."""
    nix.set_profile(change.profile, change.new, run)


def rollback(change: Change, run: Run) -> list[str]:
    """Undo `commit` where it began, then `activate`; what could not be restored, a sentence each."""
    problems = []
    try:
        restore_profile(change, run)
    except (CommandFailed, OSError) as error:
        problems.append(f"the profile could not be restored ({error})")
    try:
        status = run([f"{change.previous_running}/sw/bin/darwin-rebuild", "activate"])
        if status:
            problems.append(
                f"the activation of {change.previous_running} ended with status {status}"
            )
    except CommandFailed as error:
        problems.append(str(error))
    return problems
