"""NixOS: `test` first, the profile and the boot loader only after the checks.

So a machine that is lost in between boots the previous system.
"""

from __future__ import annotations

import os
import re
from typing import Optional

from activate import nix, operation
from activate.kinds import verdict
from activate.kinds.change import Change, Lasting, restore_profile
from activate.kinds.verdict import Policy, Verdict
from activate.process import CommandFailed, Run, checked

NAME = "NixOS"
NEEDS_PREVIOUS = True
MAY_REMOVE_FILES = True
LOCK_FILES: tuple[str, ...] = ("/run/nixos/switch-to-configuration.lock",)
PROGRAM = "bin/switch-to-configuration"
OPERATIONS: tuple[str, ...] = operation.OPERATIONS
REFUSAL = re.compile(
    r"Could not (acquire|open) lock|Pre-switch checks failed|This is not a NixOS installation!"
)
BEGUN = re.compile(r"(stopping|activating|setting up|restarting|reloading|starting) ")
BOOTLOADER_FAILED = "Failed to install bootloader"


def detect(path: str) -> bool:
    """Whether `path` is a NixOS system."""
    return os.path.lexists(f"{path}/nixos-version")


def profile_path(name: Optional[str]) -> str:
    """The system profile, or one of the named ones that the boot loader lists too."""
    if name in (None, "system"):
        return f"{nix.PROFILES}/system"
    return f"{nix.PROFILES}/system-profiles/{name}"


def running_path(profile: str) -> Optional[str]:
    """The system that runs; the profile may point at another one."""
    return nix.target("/run/current-system")


def activate(change: Change, run: Run) -> int:
    """Run the new system, but do not let it boot yet."""
    return nix.switch_to_configuration(change.new, "test", run)


def judge(status: int, new_runs: bool, output: str, policy: Policy) -> Verdict:
    """Judge `switch-to-configuration test`.

    It ends with 2 if the activation script failed and with 4 if units failed, both with the new
    system running, and with 100 before doing anything if only a reboot can bring the system up.
    """
    if BOOTLOADER_FAILED in output:
        return Verdict(verdict.UNDO, "the boot loader could not be installed")
    if status == 100:
        reason = "the new system can only be booted, not switched to (status 100)"
        if policy.on_reboot_needed == "boot":
            note = f"{reason}: it runs after the next reboot and was not checked"
            return Verdict(verdict.BOOT, note)
        hint = "nothing was changed; reboot, or run the agent with --on-reboot-needed=boot"
        return Verdict(verdict.UNTOUCHED, f"{reason}: {hint}")
    if status == 4 and new_runs:
        move = verdict.GO if policy.on_unit_failure == "tolerate" else verdict.RECHECK
        return Verdict(move, "some units failed (status 4)")
    if status == 2 and new_runs:
        return Verdict(verdict.UNDO, "the activation script of the new system failed (status 2)")
    return verdict.judge(status, new_runs, output, policy)


def commit(change: Change, run: Run) -> None:
    """Set the profile to the new system, and let it boot. Raises CommandFailed."""
    nix.set_profile(change.profile, change.new, run)
    checked(run, [f"{change.new}/{PROGRAM}", "boot"])


def dry_activate(change: Change, run: Run) -> int:
    """Print what an activation would do."""
    return nix.switch_to_configuration(change.new, operation.DRY_ACTIVATE, run)


def rollback(change: Change, run: Run) -> list[str]:
    """Undo `commit` if it had begun, then `activate`; a message for each failure."""
    problems = restore_boot(change, run)
    if not change.activated and running_path(change.profile) == change.previous_running:
        return problems
    try:
        status = nix.switch_to_configuration(str(change.previous_running), "test", run)
        if status not in (0, 4):  # 4: the previous system runs, some of its units do not
            activation = f"the activation of {change.previous_running}"
            problems.append(f"{activation} ended with status {status}")
    except CommandFailed as error:
        problems.append(str(error))
    return problems


def restore_boot(change: Change, run: Run) -> list[str]:
    """Undo `commit` if it had begun; a message for each failure."""
    problems, restored = [], True
    try:
        restored = restore_profile(change, run)
    except OSError as error:
        problems.append(f"the profile could not be restored ({error})")
    try:
        previous = change.previous_profile or change.previous_running
        if previous is not None and (restored or change.committed):
            checked(run, [f"{previous}/{PROGRAM}", "boot"])
    except CommandFailed as error:
        problems.append(Lasting(f"the boot loader could not be restored ({error})"))
    return problems
