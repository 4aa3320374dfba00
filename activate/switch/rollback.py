"""The rollback: attempts at restoring the previous system, and how they ended.

The machine decides that, not the words of the rollback: if the paths that ran before are there,
nothing failed to roll back.
"""

from __future__ import annotations

import time

from activate import journal, kinds, outcomes, recovery
from activate.kinds import verdict
from activate.kinds.change import Change
from activate.process import Error, say
from activate.switch import others, previous, reboot
from activate.switch.progress import Progress

LONGER = 2.5  # the factor from one pause between attempts to the next


def roll_back(progress: Progress, kind: kinds.Kind, reason: str) -> None:
    """Restore the previous system, without the network, and record the end."""
    progress.check_stopping(journal.ROLLING_BACK)
    give_up = time.monotonic() + progress.policy.activation_timeout
    wait_for_others(progress, kind, give_up)
    change = previous.change(progress.journal.record)
    if obstacle := previous.nothing_to_undo(change, kind):
        foreign = obstacle == previous.foreign_deployment(change, kind)
        outcome = outcomes.CHANGED_BY_OTHERS if foreign else None
        progress.finish(journal.FAILED, f"{reason}; {obstacle}", outcome)
        return

    def enter() -> None:
        if progress.journal.record.step != journal.ROLLING_BACK:
            progress.enter_rollback(attempts=1, reason=reason)

    reboot.go_back(progress, kind, change, enter)
    enter()
    progress.agent.report(journal.ROLLING_BACK)
    say(progress.log, f"rolling back: {reason}")
    problems = restore(progress, kind, change, give_up)
    if problems:
        # a shutdown ends commands, so that their failure says nothing
        progress.check_stopping(journal.ROLLING_BACK)
    finish(progress, kind, change, reason, problems)


def wait_for_others(progress: Progress, kind: kinds.Kind, give_up: float) -> None:
    """Wait for other tools that switch the system, but not for one that hangs."""
    try:
        others.wait(progress, kind, deadline=give_up)
    except Error as error:
        say(progress.log, str(error))


def restore(progress: Progress, kind: kinds.Kind, change: Change, give_up: float) -> list[str]:
    """Roll back, with retries; a message for each problem of the last attempt.

    Other tools are waited for until `give_up`, a monotonic time.
    """
    problems = attempt(progress, kind, change)
    pause = progress.policy.retry
    while problems and previous.can_restore(change, kind):
        attempts = progress.journal.record.attempts
        if attempts >= recovery.ATTEMPTS:
            break
        say(progress.log, f"the rollback failed, trying again: {'; '.join(problems)}")
        progress.stop.wait(pause)
        pause *= LONGER
        progress.enter_rollback(attempts=attempts + 1)
        wait_for_others(progress, kind, give_up)
        if previous.foreign_deployment(change, kind):
            break
        problems = attempt(progress, kind, change)
    return problems


def attempt(progress: Progress, kind: kinds.Kind, change: Change) -> list[str]:
    """Roll back once; a message for each problem, with the words of a refusal."""
    start = progress.log.position()
    problems = previous.restore(change, kind, progress.run)
    if problems:
        output = progress.log.since(start)
        words = verdict.refusal(output, kind.REFUSAL, kind.BEGUN)
        problems += [f"it was refused ({words})"] if words else []
    return problems


def finish(
    progress: Progress, kind: kinds.Kind, change: Change, reason: str, problems: list[str]
) -> None:
    """Record the end of a rollback, by what runs now."""
    if foreign := previous.foreign_deployment(change, kind):
        progress.finish(journal.FAILED, f"{reason}; {foreign}", outcomes.CHANGED_BY_OTHERS)
        return
    restored = change.previous_running or "no profile, as before"
    ended = reboot.describe_end(progress.journal.record, restored)
    words = "; ".join(problems)
    if not problems:
        progress.finish(journal.ROLLED_BACK, f"{reason}; {ended}")
    elif not previous.is_back(change, kind, problems):
        progress.finish(journal.ROLLBACK_FAILED, f"{reason}; the rollback failed: {words}")
    elif previous.can_restore(change, kind):
        progress.finish(journal.ROLLED_BACK, f"{reason}; {ended}, but {words}")
    else:
        progress.finish(journal.FAILED, f"{reason}; the new system does not run, and {words}")
