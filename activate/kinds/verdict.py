"""The meaning of an activation's end: pure functions of exit status, output and running path."""

from __future__ import annotations

import re
from typing import Any

from activate.text import clean
from activate.values import dataclass

GO, RECHECK, BOOT, UNTOUCHED, UNDO = "go", "recheck", "boot", "untouched", "undo"
NEVER = re.compile(r"(?!)")  # matches no output
FAILED_UNITS = re.compile(r"the following units failed: (.*)")


@dataclass(frozen=True)
class Policy:
    """An operator's decisions for an agent. Times are in seconds."""

    confirm_timeout: float = 120.0
    activation_timeout: float = 3600.0
    on_unit_failure: str = "rollback"
    on_reboot_needed: str = "fail"
    unit_recheck: float = 10.0
    retry: float = 2.0  # before the second attempt at a rollback
    reboot_window: str = ""  # see `window`; empty if none was given

    def changes(self) -> dict[str, Any]:
        """The decisions that differ from the defaults: a program of any version knows those."""
        default = Policy()
        return {name: value for name, value in vars(self).items() if value != vars(default)[name]}


@dataclass(frozen=True)
class Verdict:
    """The next move after an activation, with a reason, or a note for the report."""

    move: str
    reason: str = ""


def judge(status: int, new_runs: bool, output: str, policy: Policy) -> Verdict:
    """Judge an activation by its exit status, and by whether the new path is the running one."""
    if status:
        return Verdict(UNDO, f"the activation ended with status {status}")
    if not new_runs:
        return Verdict(UNDO, "the activation ended with status 0, but the new system does not run")
    return Verdict(GO)


def refusal(output: str, refuses: re.Pattern[str], begins: re.Pattern[str]) -> str:
    """The line by which an activation says that it refuses to begin; empty if there is none.

    It is not believed if another line says that the activation had begun.
    """
    lines = [clean(line).strip() for line in output.splitlines()]
    if any(begins.match(line) for line in lines):
        return ""
    return next((line for line in lines if refuses.search(line)), "")


def failed_units(output: str) -> list[str]:
    """The units that `switch-to-configuration` names as failed."""
    lines = FAILED_UNITS.findall(output)
    return [name for line in lines for name in re.split(r"[,\s]+", line) if name]


def recovered(names: list[str], states: list[str]) -> bool:
    """Whether all units have recovered, by their states from `systemctl is-active`.

    A unit that restarts again and again has not.
    """
    return len(states) == len(names) > 0 and set(states) <= {"active", "inactive"}
