"""home-manager: a generation's own `activate` does everything, so that there is no commit.

It sets its profile early, and the link `current-home` last.
"""

from __future__ import annotations

import os
from typing import Optional

from activate import nix
from activate.environment import state_home, user
from activate.kinds import verdict
from activate.kinds.change import Change
from activate.process import CommandFailed, Run, checked

NAME = "home-manager"
NEEDS_PREVIOUS = True
MAY_REMOVE_FILES = True
judge = verdict.judge


def detect(path: str) -> bool:
    """Whether `path` is a home-manager generation."""
    return os.path.lexists(f"{path}/hm-version")


def profile_path(name: Optional[str]) -> str:
    """The profile of the generation's own `activate`, which takes no name."""
    own = os.path.join(state_home(), "nix", "profiles")
    shared = f"{nix.PROFILES}/per-user/{user()}"
    directory = shared if os.path.isdir(shared) and not os.path.isdir(own) else own
    return os.path.join(directory, "home-manager")


def current_home() -> str:
    """The link that `activate` sets last."""
    return os.path.join(state_home(), "home-manager", "gcroots", "current-home")


def running_path(profile: str) -> Optional[str]:
    """The last generation whose activation was complete."""
    return nix.target(current_home())


def activate(change: Change, run: Run) -> int:
    """Run the new generation."""
    return run([f"{change.new}/activate"])


def commit(change: Change, run: Run) -> None:
    """Do nothing: `activate` has set the profile."""


def rollback(change: Change, run: Run) -> list[str]:
    """Undo `activate`; a message for each failure.

    `current-home` is pointed at the new generation first. If an activation broke off before it did
    that itself, the previous generation would see no change, and leave its profile and the new
    files as they are.
    """
    try:
        nix.add_roots([change.new], current_home(), run)
        checked(run, [f"{change.previous_running}/activate"])
    except CommandFailed as error:
        return [str(error)]
    return []
