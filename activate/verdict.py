"""What the end of an activation means: pure functions of exit status, output and the running path."""

from __future__ import annotations

import re
from dataclasses import dataclass

GO, RECHECK, BOOT, UNTOUCHED, UNDO = "go", "recheck", "boot", "untouched", "undo"
BOOTLOADER_FAILED = "Failed to install bootloader"
FAILED_UNITS = re.compile(r"the following units failed: (.*)")


@dataclass(frozen=True)
class Settings:
    """What the operator of an agent decides; times in seconds."""

    confirm_timeout: float = 120.0
    activation_timeout: float = 3600.0
    on_unit_failure: str = "rollback"
    on_reboot_needed: str = "fail"
    unit_recheck: float = 10.0


def judge(kind: str, status: int, new_runs: bool, said: str, settings: Settings) -> tuple[str, str]:
    """The next move after an activation, and a reason or note.

    NixOS' `switch-to-configuration` ends with 2 where the activation script failed and with 4 where units failed, both
    with the new system running, and with 100 before anything was done where only a reboot can bring the system up.
    """
    if BOOTLOADER_FAILED in said:
        return UNDO, "the boot loader could not be installed"
    if kind == "NixOS":
        if status == 100:
            reason = "the new system can only be booted, not switched to (status 100)"
            if settings.on_reboot_needed == "boot":
                return BOOT, f"{reason}: it runs after the next reboot and was not checked"
            return UNTOUCHED, f"{reason}: nothing was changed; reboot, or run the agent with --on-reboot-needed=boot"
        if status == 4 and new_runs:
            tolerated = settings.on_unit_failure == "tolerate"
            return GO if tolerated else RECHECK, "some units failed (status 4)"
        if status == 2 and new_runs:
            return UNDO, "the activation script of the new system failed (status 2)"
    if status:
        return UNDO, f"the activation ended with status {status}"
    return (GO, "") if new_runs else (UNDO, "the activation ended with status 0, but the new system does not run")


def failed_units(said: str) -> list[str]:
    """The units that `switch-to-configuration` names as failed."""
    return [name for line in FAILED_UNITS.findall(said) for name in re.split(r"[,\s]+", line) if name]


def recovered(names: list[str], states: list[str]) -> bool:
    """Whether each of these units is well by now (`systemctl is-active`): one that restarts again and again is not."""
    return len(states) == len(names) > 0 and set(states) <= {"active", "inactive"}
