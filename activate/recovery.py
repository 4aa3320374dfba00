"""The next action for a deployment that was interrupted: a pure function of journal and facts."""

from __future__ import annotations

from typing import Optional

from activate import journal, outcomes
from activate.operation import BOOT
from activate.values import dataclass

# actions of a switch process
START, ACTIVATE, COMMIT, ROLL_BACK = "deploy", "activate", "commit", "roll-back"
REBOOT, CONFIRM = "reboot", "confirm"
# actions of the agent alone
ADOPT, END, REPORT, WAIT = "adopt", "end", "report", "wait"
ATTEMPTS = 3


@dataclass(frozen=True)
class Facts:
    """The present state of the machine.

    `is_led` says that another process leads this deployment. `target` is the path that the profile
    points at, `running` the path that runs: None soon after a boot, when it is not known.
    `confirmed` is the deployment that was confirmed last, empty if that is not known.
    `window_is_open` says that the machine may be rebooted now, `no_reboot` why it must not be.
    """

    is_led: bool = False
    boot_id: str = ""
    running: Optional[str] = None
    target: Optional[str] = None
    confirmed: str = ""
    window_is_open: bool = True
    no_reboot: str = ""


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
        # who began it by hand may not want it any more, and its cache is known to him alone
        return _start_again(record, spent or (record.by_hand is not None and record.attempts > 0))
    runs = facts.running or facts.target
    if runs not in (record.store_path, record.previous_running, record.previous_profile):
        now = f"{runs} runs now"
        reason = f"it was interrupted, and {now}: somebody else has deployed, it is left alone"
        return Action(END, journal.FAILED, reason, outcomes.CHANGED_BY_OTHERS)
    if is_settled_elsewhere(record, facts.confirmed):
        reason = "it was interrupted, and another deployment was confirmed since: it is left alone"
        return Action(END, journal.FAILED, reason, outcomes.CHANGED_BY_OTHERS)
    if record.step in (journal.AWAITING_REBOOT, journal.REBOOTING):
        return _reboot(record, facts, runs, spent)
    event = "it was interrupted" if facts.boot_id == record.boot_id else "the machine restarted"
    if record.step == journal.COMMITTING and not spent:
        if facts.running == record.store_path or record.operation == BOOT:
            return Action(COMMIT, reason=f"{event} while it was committed")
        return Action(ACTIVATE, reason=f"{event} before the new system was the one that boots")
    if record.step == journal.ROLLING_BACK and spent:
        reason = record.reason or "it was interrupted"
        reason = f"{reason}; the rollback was interrupted {ATTEMPTS} times"
        return Action(END, journal.ROLLBACK_FAILED, reason)
    return Action(ROLL_BACK, reason=record.reason or f"{event} before it was confirmed")


def _reboot(record: journal.Record, facts: Facts, runs: Optional[str], spent: bool) -> Action:
    """The next action for a deployment that is committed, and waits for its reboot."""
    if facts.boot_id != record.boot_id:
        if runs == record.store_path and not spent:
            return Action(
                CONFIRM, reason="the machine restarted, the new system is to be confirmed"
            )
        wrong = f"{runs} runs after the reboot instead of the new system"
        twice = f"it was interrupted {ATTEMPTS} times before the new system was confirmed"
        return Action(ROLL_BACK, reason=twice if runs == record.store_path else wrong)
    if record.step == journal.AWAITING_REBOOT and facts.no_reboot:
        reason = f"{facts.no_reboot}, so that the machine was not rebooted"
        return Action(END, journal.SUCCEEDED, reason, outcomes.REBOOT_NEEDED)
    if spent:
        return Action(ROLL_BACK, reason="the machine could not be rebooted")
    is_asked = record.step == journal.REBOOTING
    return Action(REBOOT if is_asked or facts.window_is_open else WAIT)


def _start_again(record: journal.Record, spent: bool) -> Action:
    """The next action while nothing was changed."""
    interrupted = "it was interrupted before anything was changed"
    if spent:
        reason = f"it was interrupted {ATTEMPTS} times before anything was changed"
        return Action(END, journal.FAILED, interrupted if record.by_hand else reason)
    return Action(START, reason=interrupted if record.attempts else "")


def is_settled_elsewhere(record: journal.Record, confirmed: str) -> bool:
    """Whether a deployment that this state directory does not know was confirmed after this one."""
    return record.confirmed is not None and confirmed not in ("", record.confirmed, record.id)
