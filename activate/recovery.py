"""What to do with a deployment that did not come to its end: a pure function of its journal and the facts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from activate import journal

START, ACTIVATE, COMMIT, ROLL_BACK = (
    "deploy",
    "activate",
    "commit",
    "roll-back",
)  # what a switch process does
ADOPT, END, REPORT = "adopt", "end", "report"
ATTEMPTS = 3


@dataclass(frozen=True)
class Facts:
    """What is true now: which deployment holds the deployment lock, this boot of the machine, what runs, and what the
    profile points at. What runs may be unknown: soon after a boot nothing says so yet."""

    holder: Optional[str] = None
    boot_id: str = ""
    running: Optional[str] = None
    target: Optional[str] = None


@dataclass(frozen=True)
class Action:
    """What to do. For END: the final step and its reason; for the others `reason` is for the log."""

    do: str
    step: str = ""
    reason: str = ""


def next_action(record: journal.Record, facts: Facts) -> Action:
    """The only way on from here: design.md, section 5."""
    if facts.holder == record.id:
        return Action(ADOPT)
    if record.step in journal.FINAL:
        return Action(REPORT)
    spent = record.attempts >= ATTEMPTS
    if record.step in journal.HARMLESS:
        if spent:
            return Action(
                END,
                journal.FAILED,
                f"it was interrupted {ATTEMPTS} times before anything was changed",
            )
        return Action(
            START,
            reason="it was interrupted before anything was changed" if record.attempts else "",
        )
    runs = facts.running or facts.target
    if runs not in (record.store_path, record.previous_running, record.previous_profile):
        other = (
            f"it was interrupted, and {runs} runs now: somebody else has deployed, it is left alone"
        )
        return Action(END, journal.FAILED, other)
    what = "it was interrupted" if facts.boot_id == record.boot_id else "the machine restarted"
    if record.step == journal.COMMITTING and not spent:
        if facts.running == record.store_path:
            return Action(COMMIT, reason=f"{what} while it was committed")
        return Action(ACTIVATE, reason=f"{what} before the new system was the one that boots")
    if record.step == journal.ROLLING_BACK and spent:
        reason = f"{record.reason or 'it was interrupted'}; the rollback was interrupted {ATTEMPTS} times"
        return Action(END, journal.ROLLBACK_FAILED, reason)
    return Action(ROLL_BACK, reason=record.reason or f"{what} before it was confirmed")
