"""A plain store path: its activation only sets the profile."""

from __future__ import annotations

from typing import Optional

from activate import nix, operation
from activate.kinds import verdict
from activate.kinds.change import Change, no_dry_run, restore_profile
from activate.process import Run

NAME = "plain path"
NEEDS_PREVIOUS = False
MAY_REMOVE_FILES = False  # setting a link takes nothing away
LOCK_FILES: tuple[str, ...] = ()
PROGRAM = ""
OPERATIONS: tuple[str, ...] = (operation.SWITCH,)
REFUSAL, BEGUN = verdict.NEVER, verdict.NEVER
judge = verdict.judge
dry_activate = no_dry_run


def detect(path: str) -> bool:
    """True: a path that is of no other kind is a plain path."""
    return True


def profile_path(name: Optional[str]) -> str:
    """The named profile, by default `system`."""
    return f"{nix.PROFILES}/{name or 'system'}"


def running_path(profile: str) -> Optional[str]:
    """The path that the profile points at."""
    return nix.target(profile)


def activate(change: Change, run: Run) -> int:
    """Set the profile. Raises CommandFailed."""
    nix.set_profile(change.profile, change.new, run)
    return 0


def commit(change: Change, run: Run) -> None:
    """Do nothing: `activate` has set the profile."""


def rollback(change: Change, run: Run) -> list[str]:
    """Undo `activate`; a message for each failure."""
    try:
        restore_profile(change, run)
    except OSError as error:
        return [f"the profile could not be restored ({error})"]
    return []
