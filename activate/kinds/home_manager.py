"""home-manager: a generation's own `activate` does everything, so that there is no commit.

It sets its profile early, and the link `current-home` last.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import Optional

from activate import byhand, nix, operation
from activate.environment import state_home, user
from activate.kinds import verdict
from activate.kinds.change import Change
from activate.process import CommandFailed, Run, checked

NAME = "home-manager"
NEEDS_PREVIOUS = True
MAY_REMOVE_FILES = True
LOCK_FILES: tuple[str, ...] = ()
PROGRAM = "activate"
OPERATIONS: tuple[str, ...] = (operation.SWITCH, operation.DRY_ACTIVATE)
REFUSAL = re.compile(r"would be clobbered|Please (do one of the following|move the above files)")
BEGUN = re.compile(r"Activating (?!check)")  # its checks come first, and change nothing
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


def former_current_home() -> str:
    """The link's place before 22.11. Later generations move it."""
    return f"{byhand.GC_ROOTS}/per-user/{user()}/current-home"


def running_path(profile: str) -> Optional[str]:
    """The last generation whose activation was complete; without the link, that of the profile."""
    return nix.target(current_home()) or nix.target(former_current_home()) or nix.target(profile)


def activate(change: Change, run: Run) -> int:
    """Run the new generation."""
    return run([f"{change.new}/{PROGRAM}"])


def commit(change: Change, run: Run) -> None:
    """Do nothing: `activate` has set the profile."""


def dry_activate(change: Change, run: Run) -> int:
    """Print what an activation would do: Home Manager's `--dry-run` sets the same variable."""
    return run(["env", "DRY_RUN=1", f"{change.new}/{PROGRAM}"])


def rollback(change: Change, run: Run) -> list[str]:
    """Undo `activate`; a message for each failure."""
    problems = []
    before = (change.previous_running, change.previous_profile)
    if (running_path(change.profile), nix.target(change.profile)) != before:
        problems += show_change(change)
    try:
        checked(run, [f"{change.previous_running}/{PROGRAM}"])
    except CommandFailed as error:
        problems.append(str(error))
    align_links(change)
    return problems


def show_change(change: Change) -> list[str]:
    """Point `current-home` at the new generation, without Nix; a message for a failure.

    If an activation broke off before it did that itself, the previous generation would see no
    change, and leave its profile and the new files as they are.
    """
    if os.path.islink(former_current_home()):
        with contextlib.suppress(OSError):
            byhand.point(former_current_home(), change.new)
    try:
        byhand.point(current_home(), change.new)
    except OSError as error:
        return [f"{current_home()} could not be pointed at the new generation ({error})"]
    byhand.add_root(current_home())
    return []


def align_links(change: Change) -> None:
    """Let both places of `current-home` say the same, once the previous generation has set its own.

    The other one would else keep the new generation.
    """
    own, former = current_home(), former_current_home()
    targets = (nix.target(own), nix.target(former))
    with contextlib.suppress(OSError):
        if targets == (change.previous_running, change.new):
            byhand.point(former, str(change.previous_running))
        elif targets == (change.new, change.previous_running):
            os.unlink(own)
