"""A deployment from the agent's side: attempts, as recovery decides, until it has ended."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any, Optional

from activate import (
    cancellation,
    holder,
    journal,
    kinds,
    leftovers,
    lock,
    logfile,
    machine,
    outcomes,
    recovery,
)
from activate.agent import facts, launch, unwritten
from activate.agent.attempt import Attempt
from activate.agent.hooks import AgentHooks, Ended
from activate.process import Error

PAUSE = 5.0  # seconds between attempts to undo something
SIGNAL_DELAY = 0.5  # seconds: systemd may stop our commands a little before it stops us
WINDOW_PAUSE = 2.0  # seconds between two looks whether the machine may be rebooted
ADOPTED_PAUSE = 0.5  # seconds between two looks at a deployment that another process leads


class Conductor:
    """Leads one deployment at a time to its end."""

    def __init__(self, hooks: AgentHooks) -> None:
        self.hooks = hooks
        self.attempt: Optional[Attempt] = None
        self.sizes: dict[str, int] = {}
        self.ends = unwritten.Ends(hooks)
        self.is_waiting = False  # for a window in which the machine may be rebooted

    @property
    def switch(self) -> Optional[launch.SwitchProcess]:
        """The switch process of the present deployment, if this agent has started it."""
        attempt = self.attempt
        return None if attempt is None else attempt.switch

    def settle(self, entry: journal.Journal) -> None:
        """Act as recovery decides until the deployment has ended. A new one is the simplest case.

        All decisions on how a deployment goes on are made here; `Ends` writes every end. The
        attempt is kept until its end is written: an agent that exits waits for that.
        """
        give_up = time.monotonic() + lock.DEPLOYMENT_TIMEOUT
        first = True
        while entry.record.step not in journal.FINAL and not self.hooks.stop.is_set():
            if not first and machine.is_stopping():  # the agent goes on after the next boot
                self.hooks.stop.wait(ADOPTED_PAUSE)
                continue
            first = False
            with contextlib.ExitStack() as stack:
                try:
                    taken = holder.take(entry)
                    if taken is not None:
                        stack.enter_context(contextlib.closing(taken))
                    self.take_action(entry, taken, give_up)
                except Ended as end:
                    self.ends.write(entry, end)
                except launch.Lost as error:  # the next attempt is counted
                    self.hooks.tell(f"{outcomes.title(entry.record)}: {error}")
                except Exception as error:  # even a bug of ours must not leave it without an end
                    self.fail_or_retry(entry, error)
                finally:
                    self.attempt = None
        if entry.record.step in journal.FINAL:
            self.ends.keep(entry)
        self.hooks.changed()

    def end(self, entry: journal.Journal, end: Ended) -> None:
        """End a deployment that was not even started."""
        self.ends.write(entry, end)
        self.ends.keep(entry)
        self.hooks.changed()

    def take_action(
        self, entry: journal.Journal, taken: Optional[holder.Locks], give_up: float
    ) -> None:
        """Take one action under the deployment lock, or wait for its holder.

        Raises Ended, Lost or whatever makes the attempt fail. `give_up` is a monotonic time.
        """
        entry.reload()
        action = recovery.next_action(entry.record, facts.gather(self.hooks, entry, taken))
        if taken is None:
            if action.do != recovery.ADOPT and time.monotonic() > give_up:
                hours = f"{lock.DEPLOYMENT_TIMEOUT / 3600:.0f} hours"
                other = f"another deployment of agent {entry.record.agent}"
                is_harmless = entry.record.step in journal.HARMLESS
                step = journal.FAILED if is_harmless else journal.ROLLBACK_FAILED
                raise Ended(step, f"{other} did not end within {hours}")
            leftovers.end_starters(entry.record.id)
            self.hooks.stop.wait(ADOPTED_PAUSE)
            return
        if action.do == recovery.REPORT:
            return
        if cancellation.is_requested(entry) and entry.record.step in journal.HARMLESS:
            raise Ended(journal.FAILED, cancellation.REASON)
        if action.do == recovery.WAIT:
            self.is_waiting = True
            taken.close()
            self.hooks.stop.wait(WINDOW_PAUSE)
            return
        self.is_waiting = False
        if entry.record.attempts:
            self.end_leftovers(entry)
        if action.reason:
            self.hooks.tell(f"{outcomes.title(entry.record)}: {action.reason}")
        if action.do == recovery.END:
            raise Ended(action.step, action.reason, outcome=action.outcome)
        self.count_attempt(entry, action)
        self.attempt = Attempt(self.hooks, entry, self.sizes)
        self.attempt.run(action, taken)

    def count_attempt(self, entry: journal.Journal, action: recovery.Action) -> None:
        """Count an attempt before it is made.

        Raises OSError if the count can't be written, unless the machine has been changed already.
        """
        news: dict[str, Any] = {"attempts": entry.record.attempts + 1}
        step = entry.record.step
        if action.do == recovery.ROLL_BACK and step != journal.ROLLING_BACK:
            step, news = journal.ROLLING_BACK, {"attempts": 1, "reason": action.reason}
        try:
            entry.enter(step, **news)
            self.ends.write_pending(entry.record.agent)
        except OSError as error:
            if step in journal.HARMLESS:
                raise
            name = f"the journal of {outcomes.title(entry.record)}"
            self.hooks.tell(f"{name} can't be written ({error}), going on")

    def end_leftovers(self, entry: journal.Journal) -> None:
        """End commands that an interrupted attempt left running, unless another process goes on."""
        leftovers.end_commands(entry.directory)
        if entry.record.profile is None:
            return
        taken = lock.take(lock.machine_path(entry.record.profile))
        if taken is not None:
            with contextlib.closing(taken):
                log = logfile.open_log(entry)
                leftovers.end_marked(taken.fd, log, lock.DEPLOYMENT_TIMEOUT)
                os.close(log)

    def fail_or_retry(self, entry: journal.Journal, error: Exception) -> None:
        """End a deployment that has changed nothing; retry any other.

        An attempt that failed because the agent exits does not count.
        """
        delay = 0.0 if getattr(error, "is_clear", False) else SIGNAL_DELAY
        if entry.record.step not in journal.HARMLESS:
            self.hooks.tell(f"error: {error}")
            self.hooks.stop.wait(PAUSE)
        elif self.hooks.stop.wait(delay) or machine.is_stopping():
            with contextlib.suppress(OSError):
                entry.enter(entry.record.step, attempts=max(0, entry.record.attempts - 1))
        else:
            expected = isinstance(error, (Error, OSError))
            reason = str(error) if expected else f"{type(error).__name__}: {error}"
            if cancellation.is_requested(entry):  # its download was ended
                reason = cancellation.REASON
            end = Ended(journal.FAILED, reason, getattr(error, "detail", None))
            self.ends.write(entry, end)


def has_ended(state: str, deployment_id: str) -> bool:
    """Whether a deployment has a journal in this state directory, and has ended."""
    with contextlib.suppress(Error):
        entry = journal.load(os.path.join(state, "deployments", deployment_id))
        return entry is not None and entry.record.step in journal.FINAL
    return False


def wait_for_leader(
    hooks: AgentHooks, deployment_id: str, agent: str, profile_name: Optional[str]
) -> None:
    """Wait while another process, maybe with another state directory, leads this deployment."""
    give_up = time.monotonic() + lock.DEPLOYMENT_TIMEOUT
    profiles = [kind.profile_path(profile_name) for kind in kinds.KINDS]
    while holder.is_led_elsewhere(deployment_id, agent, profiles):
        if hooks.stop.wait(ADOPTED_PAUSE) or time.monotonic() > give_up:
            return
