"""The journal, the locks and the reasons to stop, as the steps of a deployment use them."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Any, Callable, Optional

from activate import files, holder, journal, leftovers, lock, machine, nix
from activate.kinds.verdict import Policy
from activate.operation import DRY_ACTIVATE
from activate.pipe import SwitchEnd
from activate.process import Error, run, say
from activate.switch.output import Output


class Stopping(BaseException):
    """The system or this process is being stopped: no further step. Not an error."""


class Withdrawn(Exception):
    """Nothing was changed, and nothing must be: the agent has ended, or refuses."""


class Progress:
    """One deployment's way from step to step, under the machine lock."""

    machine_lock = lock.Lock("", -1)  # none yet

    def __init__(
        self, entry: journal.Journal, log: Output, policy: Policy, agent: SwitchEnd
    ) -> None:
        self.journal, self.log, self.policy, self.agent = entry, log, policy, agent
        self.stop = threading.Event()
        self.is_synced = False  # no command was run since the last sync

    def lock_machine(self, profile: str, wanted: Callable[[], bool] = lambda: True) -> None:
        """Lock the profile, and end a command that the last holder of the lock left running.

        The lock is held until everything has ended. Raises Error or OSError; Withdrawn on
        SIGTERM, or when the deployment is not `wanted` any more.
        """
        files.make_public(os.path.dirname(profile))
        path, timeout = lock.machine_path(profile), lock.DEPLOYMENT_TIMEOUT
        if lock.held(path):
            say(self.log, f"waiting for another deployment of {profile} to end")
        taken = lock.take(path, timeout, wanted=lambda: wanted() and not self.stop.is_set())
        if taken is None and (self.stop.is_set() or not wanted()):
            raise Withdrawn
        if taken is None:
            hours = f"{timeout / 3600:.0f} hours"
            raise Error(f"another deployment of {profile} did not end within {hours}")
        leftovers.end_marked(taken.fd, self.log, self.policy.activation_timeout)
        leftovers.clear(taken.fd)
        holder.note_holder(taken.fd, self.journal.record.id)
        self.machine_lock = taken

    def run(self, argv: list[str]) -> int:
        """Run a command that changes the machine, and return its exit status.

        Its PID is noted in the lock file, so that a successor can stop it if we die. Raises
        Stopping instead, if it is too late for commands: recovery repeats the step.
        """
        self.check_stopping()
        self.is_synced = False
        fd, timeout = self.machine_lock.fd, self.policy.activation_timeout
        try:
            return run(argv, self.log, timeout, before=leftovers.marker(fd))
        finally:
            leftovers.clear(fd)

    def enter_rollback(self, **facts: Any) -> None:
        """Enter `rolling-back`. A full disk must not prevent the rollback."""
        self.check_stopping(journal.ROLLING_BACK)
        with contextlib.suppress(OSError):
            self.journal.enter(journal.ROLLING_BACK, **facts)

    def enter(self, step: str, **facts: Any) -> None:
        """Make all effects so far durable, then record that `step` is starting."""
        self.check_stopping(step)
        if step != journal.COMMITTING or not self.is_synced:  # the checks may have run nothing
            self.sync()
        self.journal.enter(step, **facts)
        self.agent.report(step)

    def finish(
        self, step: str, reason: Optional[str] = None, outcome: Optional[str] = None
    ) -> None:
        """Record the end. The log ends here too, even if a service goes on writing into it."""
        # the size comes last: the log may say at any time what is missing
        facts = {"outcome": outcome, "detail": self.log.missing() or None}
        size, is_good = self.log.size(), step == journal.SUCCEEDED
        try:
            with contextlib.suppress(*([] if is_good else [Error])):
                self.sync(log_only=is_good and self.is_synced)
            if is_good and self.journal.record.operation != DRY_ACTIVATE:
                holder.note_confirmed(self.machine_lock.fd, self.journal.record.id)
            self.journal.enter(step, reason=reason, log_size=size, **facts)
        except (Error, OSError) as error:
            if is_good:
                raise
            say(self.log, f"the end of the deployment could not be written: {error}")
            self.log.settle()  # the agent takes the log's end for itself
        self.agent.report(step, reason or "")

    def uncount(self) -> None:
        """Do not count this attempt, which a shutdown ends, unless another process went on."""
        entry, revision = self.journal, self.journal.record.revision
        entry.reload()
        if entry.record.revision == revision:
            with contextlib.suppress(OSError):
                entry.enter(entry.record.step, attempts=max(0, entry.record.attempts - 1))

    def check_stopping(self, step: str = "") -> None:
        """Raise Stopping if there must be no further step."""
        if self.stop.is_set() or (step in journal.EFFECTS and machine.is_stopping()):
            raise Stopping

    def sync(self, log_only: bool = False) -> None:
        """Make all effects durable. Raises Error if that takes too long."""
        if log_only:
            with contextlib.suppress(OSError):  # it may be /dev/null
                os.fsync(self.log.log)
            return
        profile = os.path.dirname(str(self.journal.record.profile))
        files.sync([nix.STORE, profile, self.journal.directory])
        self.is_synced = True
