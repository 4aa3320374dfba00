"""The switch process: whatever changes the machine. It activates, checks, and commits or rolls back.

It does not depend on the agent that starts it. It ends early only by SIGTERM or when the system stops; the step on disk
then stands.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import replace
from typing import Any, Callable, Optional

import activate
from activate import before, durable, journal, lock, logfile, machine, nix, recovery, verdict, watch
from activate.process import Error, run, say

BEGIN_TIMEOUT = 30.0  # seconds for the agent's last look, which takes much less


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
        self.began = time.time()

    def run(self, argv: list[str]) -> int:
        """Run what changes the machine; the machine lock tells of it, should this process not live to see its end.
        Raises Stopping: the step is taken anew after that, so that it need not come to its end now."""
        assert self.machine_lock is not None
        self.look_whether_stopping()
        try:
            return run(argv, self.log, self.settings.activation_timeout, machine.marker(self.machine_lock.fd))
        finally:
            machine.clear(self.machine_lock.fd)

    @property
    def change(self) -> nix.Change:
        """What is changed, and what ran before."""
        return before.change(self.journal.record)

    def perform(self, action: str = recovery.START) -> None:
        """Take the deployment to its end, from the start or as recovery decided. Raises Stopping."""
        try:
            self.prepare(anew=action == recovery.START)
        except before.Withdrawn:
            self.look_whether_stopping()
            return
        except (Error, OSError) as error:
            say(self.log, str(error))
            if action == recovery.START:  # else the machine has been changed: the next attempt may succeed
                self.finish(journal.FAILED, error)
            return
        try:
            if action == recovery.ROLL_BACK:
                raise Error(str(self.journal.record.reason))
            self.forward(activate_first=action != recovery.COMMIT)
        except Untouched as error:
            self.finish(journal.FAILED, error)
        except Exception as error:  # a mistake of this program is no reason to leave the machine unconfirmed
            if not isinstance(error, (Error, OSError)):
                import traceback

                say(self.log, traceback.format_exc())
            self.roll_back(error)

    def prepare(self, anew: bool) -> None:
        """Lock the machine and, for a new deployment, enter `activating`. Raises Error where nothing was changed."""
        record, timeout = self.journal.record, self.settings.activation_timeout
        if anew:
            self.kind = activate.detect(record.store_path)
            profile = self.kind.profile_path(record.profile_name)
            wanted = self.agent.is_there
            self.machine_lock = before.lock_machine(profile, self.log, timeout, self.stop, wanted)
            facts = before.facts(self.journal, self.kind, profile, self.log, timeout)
            self.journal.record = replace(record, **facts)
            if self.agent.asks(watch.BEGIN, BEGIN_TIMEOUT) != "":
                raise before.Withdrawn
            self.enter(journal.ACTIVATING, boot_id=machine.boot_id())
            return
        try:
            self.kind = activate.kind_named(str(record.kind))
        except KeyError:
            raise Error(f"this version does not know the kind {record.kind!r}") from None
        self.machine_lock = before.lock_machine(str(record.profile), self.log, timeout, self.stop)

    def forward(self, activate_first: bool) -> None:
        """Activate, check, commit; whatever goes wrong is raised."""
        note = None
        if activate_first:
            note, boots_only = self.activate()
            if not boots_only:
                self.enter(journal.CHECKING)
                watch.run_script(self.journal.record.rollback_script, self.run)
                timeout = self.settings.confirm_timeout
                watch.confirm(self.journal, self.agent, self.reach, timeout, self.stop, self.log, self.began)
                if stranger := before.stranger(self.change, self.kind):
                    raise Untouched(stranger)
        self.enter(journal.COMMITTING)
        self.kind.commit(self.change, self.run)
        self.finish(journal.SUCCEEDED, Error(note) if note else None)

    def activate(self) -> tuple[str, bool]:
        """Activate, and judge how that went: a note for the report, and whether the system can only be booted."""
        if self.kind is not activate.profile:  # to set a link takes nothing away, which any other activation may do
            self.load()
        self.began = time.time()
        start = os.fstat(self.log).st_size
        status = self.kind.activate(self.change, self.run)
        said = logfile.tail(self.log, start)
        new_runs = self.kind.running_path(self.change.profile) == self.change.new
        move, reason = verdict.judge(self.kind.NAME, status, new_runs, said, self.settings)
        if move == verdict.RECHECK:
            units, pause = verdict.failed_units(said), self.settings.unit_recheck
            if watch.units_recovered(units, pause, self.stop, self.log):
                return "", False
        if move in (verdict.RECHECK, verdict.UNDO):
            raise Error(reason)
        if move == verdict.UNTOUCHED:
            raise Untouched(reason)
        return reason, move == verdict.BOOT

    def roll_back(self, why: Exception) -> None:
        """Restore what ran before, by no more than what is on this machine."""
        change, reason = self.change, str(why)
        self.look_whether_stopping(journal.ROLLING_BACK)
        left = before.nothing_to_undo(change, self.kind)
        if left:
            self.finish(journal.FAILED, Error(f"{reason}; {left}"))
            return
        if self.journal.record.step != journal.ROLLING_BACK:
            self.note_rollback(attempts=1, reason=reason)
        self.agent.tell(journal.ROLLING_BACK)
        say(self.log, f"rolling back: {reason}")
        problems = before.restore(change, self.kind, self.run)
        while problems and before.has_previous(change, self.kind) and self.journal.record.attempts < recovery.ATTEMPTS:
            say(self.log, f"the rollback failed, and is tried again: {'; '.join(problems)}")
            self.note_rollback(attempts=self.journal.record.attempts + 1)
            problems = before.restore(change, self.kind, self.run)
        if problems:
            self.look_whether_stopping(journal.ROLLING_BACK)  # the system's end has ended the commands: no verdict
            self.finish(journal.ROLLBACK_FAILED, Error(f"{reason}; the rollback failed: {'; '.join(problems)}"))
        else:
            back = change.previous_running or "no profile, as before"
            self.finish(journal.ROLLED_BACK, Error(f"{reason}; rolled back to {back}"))

    def note_rollback(self, **facts: Any) -> None:
        """Enter `rolling-back`. What can't be written is no reason to leave the machine as it is."""
        self.look_whether_stopping(journal.ROLLING_BACK)
        with contextlib.suppress(OSError):
            self.journal.enter(journal.ROLLING_BACK, **facts)

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
        self.agent.tell(" ".join([step, *(reason or "").split()]))

    def look_whether_stopping(self, step: str = "") -> None:
        """Raises Stopping where there must be no further step."""
        effect = step in (journal.ACTIVATING, journal.COMMITTING, journal.ROLLING_BACK)
        if self.stop.is_set() or (effect and machine.is_stopping()):
            raise Stopping

    def sync(self) -> None:
        durable.sync([nix.STORE, os.path.dirname(self.change.profile), self.journal.directory])
