"""An activation, and its dry run: the command of the kind, and the verdict about its end."""

from __future__ import annotations

from activate import journal, kinds, outcomes
from activate.kinds import boot, verdict
from activate.kinds.change import Change
from activate.operation import NEVER, TEST
from activate.process import Error, say
from activate.switch import checks, previous
from activate.switch.progress import Progress
from activate.values import replace


class Untouched(Error):
    """The deployment ends as failed, and there is nothing to undo."""

    def __init__(self, reason: str, outcome: str = outcomes.NOTHING_CHANGED) -> None:
        super().__init__(reason)
        self.outcome = outcome


def activate(progress: Progress, kind: kinds.Kind, change: Change) -> verdict.Verdict:
    """Activate, and judge the result. Raises Error unless the deployment may go on."""
    start = progress.log.position()
    status = kind.activate(change, progress.run)
    output = progress.log.since(start)
    new_runs = kind.running_path(change.profile) == change.new
    policy = policy_for(progress.journal.record, progress.policy)
    decision = kind.judge(status, new_runs, output, policy)
    if decision.move == verdict.RECHECK:
        units, pause = verdict.failed_units(output), policy.unit_recheck
        if checks.units_recovered(units, pause, progress.stop, progress.log):
            return verdict.Verdict(verdict.GO)
    if decision.move in (verdict.RECHECK, verdict.UNDO):
        accept_refusal(kind, change, status, output)
        raise Error(decision.reason)
    if decision.move == verdict.UNTOUCHED:
        raise Untouched(decision.reason, outcomes.REBOOT_NEEDED)
    return decision


def policy_for(record: journal.Record, policy: verdict.Policy) -> verdict.Policy:
    """The policy for a deployment, whose own wish for a reboot counts more than the agent's."""
    if record.operation == TEST:
        return replace(policy, on_reboot_needed="fail")
    return policy if record.reboot == NEVER else replace(policy, on_reboot_needed="boot")


def accept_refusal(kind: kinds.Kind, change: Change, status: int, output: str) -> None:
    """Raise Untouched if the activation has refused to begin, and its words are true.

    That the same paths are there is not enough: it may have stopped units before it failed.
    """
    words = verdict.refusal(output, kind.REFUSAL, kind.BEGUN)
    if status > 0 and words and not previous.differences(change, kind):
        raise Untouched(f"the activation was refused ({words}); nothing was changed")


def rehearse(progress: Progress, kind: kinds.Kind, change: Change) -> None:
    """Print what an activation would do, and end the deployment. Raises Untouched.

    Whatever fails, there is nothing to undo; recovery repeats what was interrupted.
    """
    try:
        status = kind.dry_activate(change, progress.run)
        if status:
            raise Error(f"it ended with status {status}")
        progress.finish(journal.SUCCEEDED, None, outcomes.DRY_RUN)
    except Exception as error:
        raise Untouched(f"the dry run failed: {error}; nothing was changed") from None


def look_ahead(progress: Progress, kind: kinds.Kind) -> str:
    """A warning of what will be missing after a reboot; empty if nothing is known to be."""
    words = boot.warning(kind.NAME, progress.journal.record.store_path)
    if words:
        say(progress.log, f"warning: {words}")
    return words
