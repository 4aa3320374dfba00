"""The steps of a deployment, from `activating` on: activate, check, commit or roll back.

This process does not depend on the agent that started it. Only SIGTERM and a shutdown end it early;
recovery then goes on from the step on disk.
"""

from __future__ import annotations

import time

from activate import cancellation, history, holder, journal, kinds, machine, outcomes, recovery
from activate.kinds import verdict
from activate.kinds.change import Change
from activate.operation import BOOT, DRY_ACTIVATE, TEST
from activate.pipe import BEGIN
from activate.process import Error, say
from activate.switch import activation, checks, others, previous, reboot, rollback
from activate.switch.activation import Untouched
from activate.switch.progress import Progress, Withdrawn
from activate.values import replace

BEGIN_TIMEOUT = 30.0  # seconds for the agent's answer, which takes much less


class Switch:
    """One deployment on its way through the steps."""

    kind: kinds.Kind

    def __init__(self, progress: Progress, network: checks.Network) -> None:
        self.progress, self.network, self.reach = progress, network, network.reach
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
            self.take(action)
        except Untouched as error:
            self.progress.finish(journal.FAILED, str(error), error.outcome)
        except Exception as error:  # a bug of ours must not leave the machine unconfirmed
            if not isinstance(error, (Error, OSError)):
                import traceback

                say(self.log, traceback.format_exc())
            reason = str(error)
            if action == recovery.START and cancellation.is_requested(self.progress.journal):
                reason = cancellation.REASON  # a command that was ended for that has other words
            rollback.roll_back(self.progress, self.kind, reason)

    def take(self, action: str) -> None:
        """Do what recovery has decided. Raises an exception for whatever fails."""
        if action == recovery.ROLL_BACK:
            raise Error(str(self.record.reason))
        if action == recovery.START and self.record.operation == DRY_ACTIVATE:
            activation.rehearse(self.progress, self.kind, self.change)
        elif action == recovery.REBOOT:
            reboot.go_forth(self.progress)
        elif action == recovery.CONFIRM:
            self.confirm_boot()
        else:
            self.forward(activate_first=action != recovery.COMMIT)

    def begin(self) -> None:
        """Lock the machine, record the previous system, and enter `activating`.

        Raises Error or OSError, before anything is changed; Withdrawn if the agent refuses.
        """
        record = self.record
        self.kind = kinds.detect(record.store_path)
        reboot.refuse(record, self.kind, self.policy)
        profile = self.kind.profile_path(record.profile_name)
        self.progress.lock_machine(profile, wanted=self.progress.agent.is_alive)
        self.check_unchanged()
        others.wait_untouched(self.progress, self.kind, self.progress.agent.is_alive)
        before = self.record_previous(profile)
        if self.progress.agent.ask(BEGIN, BEGIN_TIMEOUT) != "":
            raise Withdrawn
        if record.operation == DRY_ACTIVATE:
            return  # and no step with effects is entered
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
        if self.record.operation == BOOT:
            activate_first = False
            if self.kind.running_path(self.change.profile) != self.change.new:
                note = f"{self.record.store_path} is what starts next: it was not activated"
                outcome = outcomes.REBOOT_NEEDED
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
        if self.record.step != journal.COMMITTING:
            cancellation.check(self.progress.journal)
        if self.record.operation == TEST:
            self.progress.finish(journal.SUCCEEDED, note or None, outcomes.TESTED)
            return
        self.progress.enter(journal.COMMITTING)
        self.kind.commit(self.change, self.run)
        if reboot.is_needed(self.record, self.kind):
            reboot.await_turn(self.progress, self.kind)
            return
        if outcome == outcomes.REBOOT_NEEDED:  # since this boot
            entry = self.progress.journal
            entry.record = replace(self.record, boot_id=machine.boot_id())
        notes = [note, activation.look_ahead(self.progress, self.kind)]
        self.progress.finish(journal.SUCCEEDED, "; ".join(filter(None, notes)) or None, outcome)

    def confirm_boot(self) -> None:
        """Check that the new system, which was booted, reaches the workspace. Raises Error."""
        if not self.record.reboots:  # somebody else has rebooted the machine
            self.progress.enter(journal.REBOOTING, reboots=reboot.FORTH)
        checks.confirm_boot(self.progress, self.reach)
        notes = ["confirmed after a reboot", activation.look_ahead(self.progress, self.kind)]
        self.progress.finish(journal.SUCCEEDED, "; ".join(filter(None, notes)))

    def activate(self) -> verdict.Verdict:
        """Activate, and judge the result. Raises Error unless the deployment may go on."""
        if self.kind.MAY_REMOVE_FILES:
            self.network.load()
        self.began = time.time()
        return activation.activate(self.progress, self.kind, self.change)

    def check(self) -> None:
        """Check the new system. Raises Error if a check fails."""
        if self.record.rollback_script is None and self.record.needs_workspace:
            self.network.look_ahead(checks.patience(self.policy))  # which changes nothing
        self.progress.enter(journal.CHECKING, boot_id=machine.boot_id())
        checks.run_script(self.record.rollback_script, self.run)
        checks.confirm(self.progress, self.reach, self.began)
