"""The steps of a deployment, from `activating` on: activate, check, commit or roll back.

This process does not depend on the agent that started it. Only SIGTERM and a shutdown end it early;
recovery then goes on from the step on disk.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Callable

from activate import history, holder, journal, kinds, machine, outcomes, recovery
from activate.kinds import verdict
from activate.kinds.change import Change
from activate.pipe import BEGIN, Reach
from activate.process import Error, say
from activate.switch import checks, others, previous, rollback
from activate.switch.progress import Progress, Withdrawn

BEGIN_TIMEOUT = 30.0  # seconds for the agent's answer, which takes much less


class Untouched(Error):
    """The deployment ends as failed, and there is nothing to undo."""

    def __init__(self, reason: str, outcome: str = outcomes.NOTHING_CHANGED) -> None:
        super().__init__(reason)
        self.outcome = outcome


class Switch:
    """One deployment on its way through the steps."""

    kind: kinds.Kind

    def __init__(self, progress: Progress, reach: Reach, load: Callable[[], None]) -> None:
        """`reach` looks at the workspace; `load` loads all that it needs."""
        self.progress, self.reach, self.load = progress, reach, load
        self.log, self.policy, self.run = progress.log, progress.policy, progress.run
        self.began = time.time()

    @property
    def record(self) -> journal.Record:
        """The content of the journal."""
        return self.progress.journal.record

    @property
    def change(self) -> Change:
        """The change of the machine, with the state before it."""
        return previous.change(self.record)

    def perform(self, action: str = recovery.START) -> None:
        """Lead the deployment to its end, by recovery's decision. Raises Stopping."""
        try:
            if action == recovery.START:
                self.begin()
            else:
                self.resume()
        except Withdrawn:
            self.progress.check_stopping()
            return
        except (Error, OSError) as error:
            say(self.log, str(error))
            if action == recovery.START:  # else the machine has been changed, and the agent retries
                self.progress.finish(journal.FAILED, str(error), outcomes.NOTHING_CHANGED)
            return
        try:
            if action == recovery.ROLL_BACK:
                raise Error(str(self.record.reason))
            self.forward(activate_first=action != recovery.COMMIT)
        except Untouched as error:
            self.progress.finish(journal.FAILED, str(error), error.outcome)
        except Exception as error:  # a bug of ours must not leave the machine unconfirmed
            if not isinstance(error, (Error, OSError)):
                import traceback

                say(self.log, traceback.format_exc())
            rollback.roll_back(self.progress, self.kind, str(error))

    def begin(self) -> None:
        """Lock the machine, record the previous system, and enter `activating`.

        Raises Error or OSError, before anything is changed; Withdrawn if the agent refuses.
        """
        record = self.record
        self.kind = kinds.detect(record.store_path)
        profile = self.kind.profile_path(record.profile_name)
        self.progress.lock_machine(profile, wanted=self.progress.agent.is_alive)
        self.check_unchanged()
        others.wait_untouched(self.progress, self.kind, self.progress.agent.is_alive)
        before = self.record_previous(profile)
        if self.progress.agent.ask(BEGIN, BEGIN_TIMEOUT) != "":
            raise Withdrawn
        self.progress.enter(journal.ACTIVATING, boot_id=machine.boot_id())
        others.wait_untouched(self.progress, self.kind)
        if previous.observe(self.kind, profile) != before:  # another tool was faster
            self.record_previous(profile)
            self.progress.enter(journal.ACTIVATING)

    def record_previous(self, profile: str) -> previous.State:
        """Prepare the facts of the next entry; the present state of the machine. Raises Error."""
        entry, timeout = self.progress.journal, self.policy.activation_timeout
        state = previous.observe(self.kind, profile)
        facts = previous.facts(entry, self.kind, profile, self.log, timeout)
        entry.record = replace(self.record, **facts)
        return state

    def resume(self) -> None:
        """Lock the machine to go on with an interrupted deployment. Raises Error."""
        kind = kinds.find(self.record.kind)
        if kind is None:
            raise Error(f"this version does not know the kind {self.record.kind!r}")
        self.kind = kind
        self.progress.lock_machine(str(self.record.profile))
        self.check_unchanged()
        entry = self.progress.journal
        sequence = history.next_sequence([*history.load_all(entry.state)[0], entry])
        entry.record = replace(self.record, sequence=sequence)

    def check_unchanged(self) -> None:
        """Raise Withdrawn if others have gone on with this deployment, or settled the machine.

        They held the machine lock, and the agent must decide anew.
        """
        entry = self.progress.journal
        revision, confirmed = self.record.revision, holder.last_confirmed(self.record.profile)
        entry.reload()
        if self.record.revision != revision:
            raise Withdrawn
        if recovery.is_settled_elsewhere(self.record, confirmed):
            raise Withdrawn

    def forward(self, activate_first: bool) -> None:
        """Activate, check, commit. Raises an exception for whatever fails."""
        note, outcome = "", None
        if activate_first:
            others.wait(self.progress, self.kind)
            decision = self.activate()
            note = decision.reason
            if decision.move == verdict.BOOT:
                outcome = outcomes.REBOOT_NEEDED
            else:
                self.check()
        others.wait(self.progress, self.kind)
        if foreign := previous.foreign_deployment(self.change, self.kind):
            raise Untouched(foreign, outcomes.CHANGED_BY_OTHERS)
        self.progress.enter(journal.COMMITTING)
        self.kind.commit(self.change, self.run)
        self.progress.finish(journal.SUCCEEDED, note or None, outcome)

    def activate(self) -> verdict.Verdict:
        """Activate, and judge the result. Raises Error unless the deployment may go on."""
        if self.kind.MAY_REMOVE_FILES:
            self.load()
        self.began = time.time()
        start = self.log.position()
        status = self.kind.activate(self.change, self.run)
        output = self.log.since(start)
        new_runs = self.kind.running_path(self.change.profile) == self.change.new
        decision = self.kind.judge(status, new_runs, output, self.policy)
        if decision.move == verdict.RECHECK:
            units, pause = verdict.failed_units(output), self.policy.unit_recheck
            if checks.units_recovered(units, pause, self.progress.stop, self.log):
                return verdict.Verdict(verdict.GO)
        if decision.move in (verdict.RECHECK, verdict.UNDO):
            self.accept_refusal(status, output)
            raise Error(decision.reason)
        if decision.move == verdict.UNTOUCHED:
            raise Untouched(decision.reason, outcomes.REBOOT_NEEDED)
        return decision

    def accept_refusal(self, status: int, output: str) -> None:
        """Raise Untouched if the activation has refused to begin, and its words are true.

        That the same paths are there is not enough: it may have stopped units before it failed.
        """
        words = verdict.refusal(output, self.kind.REFUSAL, self.kind.BEGUN)
        if status > 0 and words and not previous.differences(self.change, self.kind):
            raise Untouched(f"the activation was refused ({words}); nothing was changed")

    def check(self) -> None:
        """Check the new system. Raises Error if a check fails."""
        self.progress.enter(journal.CHECKING)
        checks.run_script(self.record.rollback_script, self.run)
        checks.confirm(self.progress, self.reach, self.began)
