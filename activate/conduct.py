"""A deployment on its way to its end, as the agent leads it: download, hand over to a switch process, follow that."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass, replace
from typing import Any, Callable, Optional

import activate
from activate import before, download, journal, launch, lock, logfile, nix, recovery
from activate.process import Error, say

SWITCH_TIMEOUT = 48 * 3600.0  # seconds for one step of a switch process; its own deadlines are shorter
SIZE_TIMEOUT = 10.0  # seconds for which an end waits for the closure's size


class Ended(Error):
    """A deployment ends before it has changed anything."""

    def __init__(self, step: str, reason: str) -> None:
        super().__init__(reason)
        self.step = step


@dataclass(frozen=True)
class Surroundings:
    """What leading a deployment needs from the agent. `config` is for the switch process."""

    name: str
    config: dict[str, Any]
    scope_timeout: float
    stop: threading.Event
    source: Callable[[], contextlib.AbstractContextManager[nix.Source]]
    last_look: Callable[[journal.Journal], None]  # raises Ended, right before anything changes
    changed: Callable[[], None]
    measured: Callable[[journal.Journal, int], None]
    tell: Callable[[str], None]
    reach: Callable[[float], None]  # raises where the workspace can't be reached over a fresh connection


class Conductor:
    """Leads one deployment at a time to its end."""

    def __init__(self, around: Surroundings) -> None:
        self.around = around
        self.switch: Optional[launch.SwitchProcess] = None
        self.sizes: dict[str, int] = {}

    def settle(self, entry: journal.Journal) -> None:
        """Do what recovery decides until the deployment has ended; one that is new is only its first case."""
        path = lock.shared_path("deployment", self.around.name)
        give_up = time.monotonic() + before.LOCK_TIMEOUT
        while entry.record.step not in journal.FINAL and not self.around.stop.is_set():
            held = lock.take(path, text=entry.record.id)
            action = recovery.next_action(entry.record, self.facts(entry, None if held else lock.read(path)))
            if held is not None:
                try:
                    self.act(entry, action, held)
                finally:
                    held.close()
            elif action.do != recovery.ADOPT and time.monotonic() > give_up:
                self.end(entry, journal.FAILED, f"another deployment of agent {self.around.name} did not end")
            else:
                self.around.stop.wait(0.5)
                self.reload(entry)
        if entry.record.step in journal.FINAL - {journal.ROLLBACK_FAILED}:  # that one's previous path is still needed
            entry.drop_roots()
        self.around.changed()

    def facts(self, entry: journal.Journal, holder: Optional[str]) -> recovery.Facts:
        """What recovery needs to know besides the journal."""
        kind = next((kind for kind in activate.KINDS if entry.record.kind == kind.NAME), activate.profile)
        profile = str(entry.record.profile)
        return recovery.Facts(holder, kind.running_path(profile), nix.target(profile))

    def act(self, entry: journal.Journal, action: recovery.Action, held: lock.Lock) -> None:
        """One action, under the deployment lock. What prevents it ends a deployment that has changed nothing."""
        if action.reason:
            self.around.tell(f"deployment {entry.record.index}: {action.reason}")
        if action.do == recovery.END:
            self.end(entry, action.step, action.reason)
            return
        try:
            entry.enter(entry.record.step, attempts=entry.record.attempts + 1)
            self.conduct(entry, action, held)
        except Ended as ended:
            self.end(entry, ended.step, str(ended))
        except Exception as error:  # even a mistake of this program must not leave a deployment without an end
            if self.around.stop.is_set():
                with contextlib.suppress(OSError):  # the agent's own end counts as no attempt
                    entry.enter(entry.record.step, attempts=entry.record.attempts - 1)
            elif entry.record.step in journal.HARMLESS:
                reason = str(error) if isinstance(error, (Error, OSError)) else f"{type(error).__name__}: {error}"
                self.end(entry, journal.FAILED, reason, getattr(error, "detail", None))
            else:
                self.around.tell(f"error: {error}")
                self.around.stop.wait(5.0)

    def conduct(self, entry: journal.Journal, action: recovery.Action, held: lock.Lock) -> None:
        """Prepare what has to be, give the switch process the word, follow it. Raises Error."""
        nix.check_paths(entry.record.store_path, entry.record.rollback_script)
        config = {**self.around.config, "directory": entry.directory}
        self.switch = launch.SwitchProcess(entry.record.id, config, held, self.around.scope_timeout)
        try:
            if action.do == recovery.START:
                self.download(entry)
                self.around.last_look(entry)
            self.switch.go(action.do)
            measuring = threading.Thread(target=self.measure, args=(entry,), name="measure", daemon=True)
            measuring.start()
            self.switch.step = journal.ACTIVATING
            self.follow(entry, self.switch, measuring)
        finally:
            self.switch.close()
            self.switch = None

    def measure(self, entry: journal.Journal) -> None:
        """Ask for the closure's size while other things happen."""
        path = entry.record.store_path
        with contextlib.suppress(Error):
            if path not in self.sizes:
                self.sizes = {path: nix.path_info_size(path)}  # of the last one: it may be deployed again
            self.around.measured(entry, self.sizes[path])

    def follow(self, entry: journal.Journal, switch: launch.SwitchProcess, measuring: threading.Thread) -> None:
        """Hear of each step until the process ends; the final report has the closure's size in it."""
        step: Optional[str] = ""
        while step is not None:
            step = switch.read(SWITCH_TIMEOUT)
            if step is not None and step.startswith("look "):
                self.look(switch, *step.split()[1:])
                continue
            if step is None or step in journal.FINAL:
                measuring.join(SIZE_TIMEOUT)
            switch.step = step or switch.step
            self.reload(entry, switch.step)
            if switch.step in journal.FINAL:  # before that, the log is looked at often enough
                self.around.changed()
        ending = f": {entry.record.reason}" if entry.record.reason else ""
        self.around.tell(f"deployment {entry.record.index}: {entry.record.step}{ending}")

    def look(self, switch: launch.SwitchProcess, number: str, timeout: str) -> None:
        """See for the switch process whether the workspace can be reached."""
        problem = ""
        try:
            self.around.reach(float(timeout))
        except Exception as error:
            problem = str(error).replace("\n", " ") or type(error).__name__
        with contextlib.suppress(OSError):
            switch.write(f"{number} {problem}")

    def reload(self, entry: journal.Journal, step: str = "") -> None:
        """Read what the switch process has written; what it said counts where it could not write."""
        with contextlib.suppress(Error):
            found = journal.load(entry.directory)
            if found is not None:
                entry.record = found.record
        if step in journal.FINAL and entry.record.step != step:
            entry.record = replace(entry.record, step=step, reason="its end could not be written, the log has it")

    def end(self, entry: journal.Journal, step: str, reason: str, detail: Optional[str] = None) -> None:
        """End a deployment that no switch process has to end."""
        log = logfile.open_log(entry)
        try:
            if detail:
                say(log, reason)
            entry.enter(step, reason=reason, detail=detail, log_size=os.fstat(log).st_size)
        except OSError as error:
            self.around.tell(f"the end of deployment {entry.record.index} can't be written: {error}")
        finally:
            os.close(log)
        self.around.tell(f"deployment {entry.record.index}: {step}: {reason}")
        self.around.changed()

    def download(self, entry: journal.Journal) -> None:
        """Have the closure and the rollback script in the store, with GC roots. Raises Error."""
        entry.enter(journal.DOWNLOADING)
        self.around.changed()
        record = entry.record
        paths = [record.store_path, *([record.rollback_script] if record.rollback_script else [])]
        profiles = [kind.profile_path(record.profile_name) for kind in activate.KINDS]
        links = [*profiles, *(kind.running_path(profile) for kind, profile in zip(activate.KINDS, profiles))]
        previous = sorted({path for path in map(nix.target, filter(None, links)) if path and os.path.lexists(path)})
        log = logfile.open_log(entry)
        try:
            with self.around.source() as source:
                rooted = download.download(paths, previous, entry.path("new"), source, log)
        finally:
            os.close(log)
        entry.enter(journal.READY, rooted=tuple(previous) if rooted else ())
