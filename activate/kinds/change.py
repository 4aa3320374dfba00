"""A change of the machine, and the undo of a profile."""

from __future__ import annotations

import contextlib
import os
from typing import Optional

from activate import byhand, nix
from activate.process import CommandFailed, Error, Run
from activate.values import dataclass


@dataclass(frozen=True)
class Change:
    """The change that a deployment makes, and the machine's state before it.

    `committed` says that the commit may have begun, `activated` that the activation may have.
    """

    new: str
    profile: str
    previous_running: Optional[str] = None
    previous_profile: Optional[str] = None
    previous_generation: Optional[int] = None
    committed: bool = False
    activated: bool = True


def no_dry_run(change: Change, run: Run) -> int:
    """Raise Error: a kind has no dry run."""
    raise Error(f"there is no dry run of {change.new}")


class Lasting(str):
    """A problem of a rollback that neither the running path nor the profile shows."""


def restore_profile(change: Change, run: Run) -> bool:
    """Undo `nix.set_profile`: back to the recorded generation; whether the profile had changed.

    A profile that did not exist is removed again, with its generation. If Nix can't do it, the
    links are made without Nix. Raises OSError.
    """
    if nix.target(change.profile) == change.previous_profile:
        return False
    if change.previous_profile is None:
        link = os.path.join(os.path.dirname(change.profile), os.readlink(change.profile))
        os.unlink(change.profile)
        if link.endswith("-link") and os.path.islink(link):
            os.unlink(link)
        return True
    if change.previous_generation is not None:
        with contextlib.suppress(CommandFailed):
            nix.switch_generation(change.profile, change.previous_generation, run)
    if nix.target(change.profile) != change.previous_profile:
        with contextlib.suppress(CommandFailed, OSError):
            nix.set_profile(change.profile, change.previous_profile, run)
    if nix.target(change.profile) != change.previous_profile:
        byhand.set_profile(change.profile, change.previous_profile, change.previous_generation)
    return True
