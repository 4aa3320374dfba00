"""A deployment on its way to its end, as the agent sees it through: by the attempts that recovery decides."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any, Optional

import activate
from activate import before, ends, journal, launch, lock, logfile, machine, nix, recovery
from activate.attempt import Attempt, Ended, Surroundings
from activate.process import Error, say

PAUSE = 5.0  # seconds between attempts to undo something
LAST_WORD = 0.5  # seconds: who ends a service ends its commands with it, and the agent may hear of that a little later
ADOPTED_PAUSE = 0.5  # seconds between two looks at a deployment that another process sees through


class Conductor:
    """Leads one deployment at a time to its end."""

    def __init__(self, around: Surroundings) -> None:
        self.around = around
        self.attempt: Optional[Attempt] = None
        self.sizes: dict[str, int] = {}
        self.ends = ends.Ends(around.stop)

    @property
    def switch(self) -> Optional[launch.SwitchProcess]:
        """The switch process of the deployment that is under way, if this process has started it."""
        attempt = self.attempt
        return None if attempt is None else attempt.switch

    def settle(self, entry: journal.Journal) -> None:
        """Do what recovery decides until the deployment has ended; one that is new is only its first case."""
        give_up = time.monotonic() + before.LOCK_TIMEOUT
        path = lock.shared_path("deployment", entry.record.agent)
        tried = False
        while entry.record.step not in journal.FINAL and not self.around.stop.is_set():
            if tried and machine.is_stopping():  # no switch process goes on then, the next boot does
                self.around.stop.wait(ADOPTED_PAUSE)
                continue
            tried = True
            try:
                held = lock.take(path, text=entry.record.id)
            except OSError as error:
                self.prevented(entry, Error(f"{path} can't be locked: {error.strerror}"))
                continue
            entry.reload()
            action = recovery.next_action(entry.record, self.facts(entry, None if held else lock.read(path)))
            if held is not None:
                try:
                    self.act(entry, action, held)
                finally:
                    held.close()
            elif action.do != recovery.ADOPT and time.monotonic() > give_up:
                self.end(entry, journal.FAILED, f"another deployment of agent {entry.record.agent} did not end")
            else:
                self.around.stop.wait(ADOPTED_PAUSE)
        if entry.record.step in journal.FINAL:
            self.ends.keep(entry)
        self.around.changed()

    def is_held(self, agent: str) -> bool:
        """Whether a deployment of the agent of this name is under way, whichever process sees it through."""
        return lock.held(lock.shared_path("deployment", agent))

    def has_ended(self, state: str, deployment_id: str) -> bool:
        """Whether a deployment is known here, and has come to its end."""
        with contextlib.suppress(Error):
            found = journal.load(os.path.join(state, "deployments", deployment_id))
            return found is not None and found.record.step in journal.FINAL
        return False

    def wait_for_holder(self, agent: str, deployment_id: str) -> None:
        """Wait as long as another process sees this deployment through, which may keep its state elsewhere."""
        path, give_up = lock.shared_path("deployment", agent), time.monotonic() + before.LOCK_TIMEOUT
        while lock.held(path) and lock.read(path) == deployment_id and time.monotonic() < give_up:
            if self.around.stop.wait(ADOPTED_PAUSE):
                return

    def facts(self, entry: journal.Journal, holder: Optional[str]) -> recovery.Facts:
        """What recovery needs to know besides the journal."""
        kind = next((kind for kind in activate.KINDS if entry.record.kind == kind.NAME), activate.profile)
        profile = str(entry.record.profile)
        return recovery.Facts(holder, machine.boot_id(), kind.running_path(profile), nix.target(profile))

    def act(self, entry: journal.Journal, action: recovery.Action, held: lock.Lock) -> None:
        """One action, under the deployment lock."""
        if action.do == recovery.REPORT:
            return
        if entry.record.attempts:
            self.end_left(entry)
        if action.reason:
            self.around.tell(f"deployment {entry.record.index}: {action.reason}")
        if action.do == recovery.END:
            self.end(entry, action.step, action.reason)
            return
        try:
            self.count(entry, action)
            self.attempt = Attempt(self.around, entry, self.sizes)
            self.attempt.run(action, held)
        except Ended as ended:
            self.end(entry, ended.step, str(ended))
        except launch.Lost as error:  # the next attempt is counted
            self.around.tell(f"deployment {entry.record.index}: {error}")
        except Exception as error:  # even a mistake of this program must not leave a deployment without an end
            self.prevented(entry, error)
        finally:
            self.attempt = None

    def end_left(self, entry: journal.Journal) -> None:
        """End what an interrupted attempt has left running, unless somebody else has seen to that and goes on."""
        machine.end_commands(entry.directory)
        held = None if entry.record.profile is None else lock.take(lock.machine_path(entry.record.profile))
        if held is not None:
            log = logfile.open_log(entry)
            machine.end_marked(held.fd, log, before.LOCK_TIMEOUT)
            os.close(log)
            held.close()

    def count(self, entry: journal.Journal, action: recovery.Action) -> None:
        """Note one more attempt, before it is made. Raises OSError where that can't be and nothing was changed."""
        facts: dict[str, Any] = {"attempts": entry.record.attempts + 1}
        step = entry.record.step
        if action.do == recovery.ROLL_BACK and step != journal.ROLLING_BACK:
            step, facts = journal.ROLLING_BACK, {"attempts": 1, "reason": action.reason}
        try:
            entry.enter(step, **facts)
            self.ends.write(entry.record.agent)
        except OSError as error:
            if step in journal.HARMLESS:
                raise
            self.around.tell(f"the journal of deployment {entry.record.index} can't be written ({error}), going on")

    def prevented(self, entry: journal.Journal, error: Exception) -> None:
        """Something can't be done: that ends a deployment that has changed nothing, and is tried again for all others.

        The agent's own end counts as no attempt.
        """
        if entry.record.step not in journal.HARMLESS:
            self.around.tell(f"error: {error}")
            self.around.stop.wait(PAUSE)
        elif self.around.stop.wait(LAST_WORD) or machine.is_stopping():
            with contextlib.suppress(OSError):
                entry.enter(entry.record.step, attempts=max(0, entry.record.attempts - 1))
        else:
            reason = str(error) if isinstance(error, (Error, OSError)) else f"{type(error).__name__}: {error}"
            self.end(entry, journal.FAILED, reason, getattr(error, "detail", None))

    def end(self, entry: journal.Journal, step: str, reason: str, detail: Optional[str] = None) -> None:
        """End a deployment that no switch process has to end. A download may have outlived its agent and journal."""
        machine.end_commands(entry.directory)
        log = logfile.open_log(entry)
        try:
            if detail:
                say(log, reason)
            with contextlib.suppress(OSError):
                os.fsync(log)
            entry.enter(step, reason=reason, detail=detail, log_size=logfile.end(entry))
        except OSError as error:
            self.around.tell(f"the end of deployment {entry.record.index} can't be written: {error}")
        finally:
            os.close(log)
        self.around.tell(f"deployment {entry.record.index}: {step}: {reason}")
        self.ends.keep(entry)
        self.around.changed()
