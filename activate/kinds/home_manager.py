"""home-manager: a generation's own `activate` sets its profile early and `current-home` last, so there is no commit."""

from __future__ import annotations

import os
from typing import Optional

from activate import nix
from activate.kinds import verdict
from activate.kinds.change import Change
from activate.process import CommandFailed, Run, checked, user, xdg

NAME = "home-manager"
NEEDS_PREVIOUS = True
MAY_REMOVE_FILES = True
judge = verdict.judge


def detect(path: str) -> bool:
    """Whether `path` is a home-manager generation."""
    return os.path.lexists(f"{path}/hm-version")


def profile_path(name: Optional[str]) -> str:
    """Where the generation's own activation keeps its profile; a name given to the agent does not change it."""
    own = os.path.join(xdg("XDG_STATE_HOME", ".local/state"), "nix", "profiles")
    shared = f"{nix.PROFILES}/per-user/{user()}"
    return os.path.join(
        shared if os.path.isdir(shared) and not os.path.isdir(own) else own, "home-manager"
    )


def current_home() -> str:
    """The link that `activate` sets last."""
    return os.path.join(
        xdg("XDG_STATE_HOME", ".local/state"), "home-manager", "gcroots", "current-home"
    )


def running_path(profile: str) -> Optional[str]:
    """The generation whose activation went through to its end last."""
    return nix.target(current_home())


def activate(change: Change, run: Run) -> int:
    """Run the new generation."""
    return run([f"{change.new}/activate"])


def commit(change: Change, run: Run) -> None:
    """Nothing: `activate` has done it all."""


def rollback(change: Change, run: Run) -> list[str]:
    """Undo `activate`; what could not be restored, a sentence each.

    `current-home` is pointed at the new generation first: where an activation broke off before it did that itself,
    the previous one would see no change, leave the profile and the new files as they are, and say that all is well.
    """
    problems = []
    try:
        checked(
            run, ["nix-store", "--realise", change.new, "--add-root", current_home(), "--indirect"]
        )
        checked(run, [f"{change.previous_running}/activate"])
    except CommandFailed as error:
        problems.append(str(error))
    return problems
