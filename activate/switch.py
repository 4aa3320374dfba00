"""The switch process: whatever changes the machine. It activates, checks, and commits or rolls back.

It does not depend on the agent that starts it. It ends early only by SIGTERM or when the system stops; the step on disk
then stands.
"""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import replace
from typing import Any, Callable, Optional

import activate
from activate import before, durable, journal, lock, logfile, nix, verdict, watch
from activate.process import CommandFailed, Error, ask, run, say, system_is_stopping


class Stopping(BaseException):
    """The system stops, or this process is asked to: no further step. No mistake, so no Exception."""


class Untouched(Error):
    """The deployment ends as failed and there is nothing to undo."""


class Switch:
    """One deployment on its way through the steps."""

    def __init__(
        self, entry: journal.Journal, log: int, settings: verdict.Settings, reach: watch.Reach, agent: watch.Agent,
        load: Callable[[], None],
    ) -> None:  # fmt: skip
        """`reach` raises where the workspace is out of reach; `load` reads all that this needs."""
        self.journal, self.log, self.settings, self.agent = entry, log, settings, agent
        self.reach, self.load = reach, load
        self.stop = threading.Event()
        self.machine_lock: Optional[lock.Lock] = None
        self.kind = activate.profile

    def run(self, argv: list[str]) -> int:
        return run(argv, self.log, self.settings.activation_timeout)

    def change(self) -> nix.Change:
        """What is changed, and what ran before."""
        record = self.journal.record
        return nix.Change(
            record.store_path, str(record.profile), record.previous_running, record.previous_profile,
            record.previous_generation, committed=journal.COMMITTING in record.times,
        )  # fmt: skip

    def perform(self, action: str = "deploy") -> None:
        """Take the deployment to its end, from the start or as recovery decided. Raises Stopping."""
        try:
            self.prepare(anew=action == "deploy")
        except (Error, OSError) as error:
            say(self.log, str(error))
            if action == "deploy":  # else the machine has been changed: the next attempt may succeed
                self.finish(journal.FAILED, error)
            return
        try:
            if action == "roll-back":
                raise Error(self.journal.record.reason or "it was interrupted before it was confirmed")
            self.forward(activate_first=action != "commit")
        except Untouched as error:
            self.finish(journal.FAILED, error)
        except Exception as error:  # a mistake of this program is no reason to leave the machine unconfirmed
            if not isinstance(error, (Error, OSError)):
                import traceback

                say(self.log, traceback.format_exc())
            self.roll_back(error)

    def prepare(self, anew: bool) -> None:
        """Lock the machine and, for a new deployment, enter `activating`. Raises Error where nothing was changed."""
        record = self.journal.record
        if anew:
            self.kind = activate.detect(record.store_path)
            profile = self.kind.profile_path(record.profile_name)
            self.machine_lock = before.lock_machine(profile, self.log)
            facts = before.facts(self.journal, self.kind, profile, self.log)
            self.journal.record = replace(record, **facts)
            self.enter(journal.ACTIVATING, boot_id=journal.boot_id())
            return
        try:
            self.kind = activate.kind_named(str(record.kind))
        except KeyError:
            raise Error(f"this version does not know the kind {record.kind!r}") from None
        self.machine_lock = before.lock_machine(str(record.profile), self.log)

    def forward(self, activate_first: bool) -> None:
        """Activate, check, commit; whatever goes wrong is raised."""
        note = None
        if activate_first:
            note, boots_only = self.activate()
            if not boots_only:
                self.enter(journal.CHECKING)
                self.check()
                if stranger := before.stranger(self.change(), self.kind):
                    raise Untouched(stranger)
        self.enter(journal.COMMITTING)
        self.kind.commit(self.change(), self.run)
        self.finish(journal.SUCCEEDED, Error(note) if note else None)

    def activate(self) -> tuple[str, bool]:
        """Activate, and judge how that went: a note for the report, and whether the system can only be booted."""
        if self.kind is not activate.profile:  # to set a link takes nothing away, which any other activation may do
            self.load()
        start = os.fstat(self.log).st_size
        status = self.kind.activate(self.change(), self.run)
        said = logfile.tail(self.log, start)
        new_runs = self.kind.running_path(self.change().profile) == self.change().new
        move, reason = verdict.judge(self.kind.NAME, status, new_runs, said, self.settings)
        if move == verdict.RECHECK and self.units_recovered(verdict.failed_units(said)):
            return "", False
        if move in (verdict.RECHECK, verdict.UNDO):
            raise Error(reason)
        if move == verdict.UNTOUCHED:
            raise Untouched(reason)
        return reason, move == verdict.BOOT

    def units_recovered(self, names: list[str]) -> bool:
        """Look at failed units once more, after a while: a restart may have brought them up."""
        say(self.log, f"some units failed, looking again in {self.settings.unit_recheck:.0f} s: {' '.join(names)}")
        self.stop.wait(self.settings.unit_recheck)
        with contextlib.suppress(CommandFailed):
            states = ask(["systemctl", "is-active", *names], 30)[1].split() if names else []
            say(self.log, f"they are now: {' '.join(states)}")
            return verdict.recovered(names, states)
        return False

    def check(self) -> None:
        """Is the machine still well? Raises Error where it is not."""
        script = self.journal.record.rollback_script
        if script is not None:
            status = self.run([script])
            if status:
                raise Error(f"the rollback script {script} ended with status {status}")
        watch.confirm(self.journal, self.agent, self.reach, self.settings.confirm_timeout, self.stop, self.log)

    def roll_back(self, why: Exception) -> None:
        """Restore what ran before, by no more than what is on this machine."""
        change, reason = self.change(), str(why)
        self.look_whether_stopping(journal.ROLLING_BACK)
        left = before.nothing_to_undo(change, self.kind)
        if left:
            self.finish(journal.FAILED, Error(f"{reason}; {left}"))
            return
        with contextlib.suppress(OSError):  # a state that can't be written is no reason to leave the machine as it is
            self.journal.enter(journal.ROLLING_BACK, reason=reason)
        self.agent.tell(journal.ROLLING_BACK)
        say(self.log, f"rolling back: {reason}")
        if change.previous_running is None and self.kind is not activate.profile:
            problems = ["there is no previous system to go back to"]
        else:
            problems = before.restore(change, self.kind, self.run)
        if problems:
            self.look_whether_stopping(journal.ROLLING_BACK)  # the system's end has ended the commands: no verdict
            self.finish(journal.ROLLBACK_FAILED, Error(f"{reason}; the rollback failed: {'; '.join(problems)}"))
        else:
            back = change.previous_running or "no profile, as before"
            self.finish(journal.ROLLED_BACK, Error(f"{reason}; rolled back to {back}"))

    def enter(self, step: str, **facts: Any) -> None:
        """Go on to `step`: effects so far are durable, then it is written, then its effect may be had."""
        self.look_whether_stopping(step)
        self.sync()
        self.journal.enter(step, **facts)
        self.agent.tell(step)

    def finish(self, step: str, why: Optional[Exception] = None) -> None:
        """Write how it ended. The log ends here too, whatever a service may still write into it."""
        reason = None if why is None else str(why)
        try:
            with contextlib.suppress(*([] if step == journal.SUCCEEDED else [Error])):
                self.sync()
            self.journal.enter(step, reason=reason, log_size=os.fstat(self.log).st_size)
        except (Error, OSError) as error:
            if step == journal.SUCCEEDED:
                raise
            say(self.log, f"the end of the deployment could not be written: {error}")
        self.agent.tell(step)

    def look_whether_stopping(self, step: str) -> None:
        """Raises Stopping where there must be no further step."""
        effect = step in (journal.ACTIVATING, journal.COMMITTING, journal.ROLLING_BACK)
        if self.stop.is_set() or (effect and system_is_stopping()):
            raise Stopping

    def sync(self) -> None:
        durable.sync([nix.STORE, os.path.dirname(self.change().profile)])
