"""The next action for a deployment that was interrupted: a pure function of journal and facts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from activate import journal, outcomes

# actions of a switch process
START, ACTIVATE, COMMIT, ROLL_BACK = "deploy", "activate", "commit", "roll-back"
# actions of the agent alone
ADOPT, END, REPORT = "adopt", "end", "report"
ATTEMPTS = 3


@dataclass(frozen=True)
class Facts:
    """The present state of the machine.

    `is_led` says that another process leads this deployment. `target` is the path that the profile
    points at, `running` the path that runs: None soon after a boot, when it is not known.
    `confirmed` is the deployment that was confirmed last, empty if that is not known.
    """

    is_led: bool = False
    boot_id: str = ""
    running: Optional[str] = None
    target: Optional[str] = None
    confirmed: str = ""


@dataclass(frozen=True)
class Action:
    """An action. For END all else is the end; otherwise `reason` is for the operator."""

    do: str
    step: str = ""
    reason: str = ""
    outcome: Optional[str] = None


def next_action(record: journal.Record, facts: Facts) -> Action:
    """The only way on from here: design.md, section 5."""
    if facts.is_led:
        return Action(ADOPT)
    if record.step in journal.FINAL:
        return Action(REPORT)
    spent = record.attempts >= ATTEMPTS
    if record.step in journal.HARMLESS:
        return _start_again(record, spent)
    runs = facts.running or facts.target
    if runs not in (record.store_path, record.previous_running, record.previous_profile):
        now = f"{runs} runs now"
        reason = f"it was interrupted, and {now}: somebody else has deployed, it is left alone"
        return Action(END, journal.FAILED, reason, outcomes.CHANGED_BY_OTHERS)
    if is_settled_elsewhere(record, facts.confirmed):
        reason = "it was interrupted, and another deployment was confirmed since: it is left alone"
        return Action(END, journal.FAILED, reason, outcomes.CHANGED_BY_OTHERS)
    event = "it was interrupted" if facts.boot_id == record.boot_id else "the machine restarted"
    if record.step == journal.COMMITTING and not spent:
        if facts.running == record.store_path:
            return Action(COMMIT, reason=f"{event} while it was committed")
        return Action(ACTIVATE, reason=f"{event} before the new system was the one that boots")
    if record.step == journal.ROLLING_BACK and spent:
        reason = record.reason or "it was interrupted"
        reason = f"{reason}; the rollback was interrupted {ATTEMPTS} times"
        return Action(END, journal.ROLLBACK_FAILED, reason)
    return Action(ROLL_BACK, reason=record.reason or f"{event} before it was confirmed")


def _start_again(record: journal.Record, spent: bool) -> Action:
    """The next action while nothing was changed."""
    if spent:
        reason = f"it was interrupted {ATTEMPTS} times before anything was changed"
        return Action(END, journal.FAILED, reason)
    interrupted = "it was interrupted before anything was changed"
    return Action(START, reason=interrupted if record.attempts else "")


def is_settled_elsewhere(record: journal.Record, confirmed: str) -> bool:
    """Whether a deployment that this state directory does not know was confirmed after this one."""
    return record.confirmed is not None and confirmed not in ("", record.confirmed, record.id)
