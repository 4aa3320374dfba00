"""One attempt at a deployment, as the agent leads it: download, hand over to a switch process, follow that."""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass, replace
from typing import Any, Callable, Optional

import activate
from activate import download, journal, launch, lock, logfile, machine, nix, recovery, watch
from activate.process import Error

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

    config: dict[str, Any]
    scope_timeout: float
    timeout: float  # seconds for a download
    stop: threading.Event
    source: Callable[[], contextlib.AbstractContextManager[nix.Source]]
    last_look: Callable[[journal.Journal], None]  # raises Ended, right before anything changes
    changed: Callable[[], None]
    measured: Callable[[journal.Journal, int], None]
    tell: Callable[[str], None]
    reach: Callable[[float], None]  # raises where the workspace can't be reached over a fresh connection


class Attempt:
    """From what recovery has decided to the end of the switch process."""

    def __init__(self, around: Surroundings, entry: journal.Journal, sizes: dict[str, int]) -> None:
        """`sizes` has the closure's size, in bytes, of the path that was deployed last."""
        self.around, self.entry, self.sizes = around, entry, sizes
        self.switch: Optional[launch.SwitchProcess] = None
        self.refused: Optional[Exception] = None  # why the switch process was not allowed to begin

    def run(self, action: recovery.Action, held: lock.Lock) -> None:
        """Prepare what has to be, give the switch process the word, follow it. Raises Error."""
        record = self.entry.record
        nix.check_paths(record.store_path, record.rollback_script)
        config = {**self.around.config, "directory": self.entry.directory}
        switch = self.switch = launch.SwitchProcess(record.id, config, held, self.around.scope_timeout)
        try:
            if action.do == recovery.START:
                self.download()
            switch.go(action.do, self.entry.record)
            measuring = threading.Thread(target=self.measure, name="measure", daemon=True)
            measuring.start()
            self.follow(switch, measuring)
        finally:
            switch.close()
        if self.refused is not None:
            raise self.refused

    def download(self) -> None:
        """Have the closure and the rollback script in the store, with GC roots. Raises Error."""
        entry, record, boot = self.entry, self.entry.record, machine.boot_id()
        again = journal.DOWNLOADING in record.times
        unsafe = again and record.boot_id != boot  # the machine restarted: what Nix holds for valid may be lost
        entry.enter(journal.DOWNLOADING, boot_id=record.boot_id if unsafe else boot)
        self.around.changed()
        paths = [record.store_path, *([record.rollback_script] if record.rollback_script else [])]
        profiles = [kind.profile_path(record.profile_name) for kind in activate.KINDS]
        links = [*profiles, *(kind.running_path(profile) for kind, profile in zip(activate.KINDS, profiles))]
        previous = sorted({path for path in map(nix.target, filter(None, links)) if path and os.path.lexists(path)})
        log = logfile.open_log(entry)
        try:
            with self.around.source() as source:
                rooted = download.download(paths, previous, entry.path("new"), source, log, self.around.timeout)
                if unsafe:
                    download.repair(paths, source, log, self.around.timeout)
        finally:
            os.close(log)
        entry.enter(journal.READY, rooted=tuple(previous) if rooted else (), boot_id=boot)

    def measure(self) -> None:
        """Ask for the closure's size while other things happen."""
        path = self.entry.record.store_path
        with contextlib.suppress(Error):
            if path not in self.sizes:
                size = nix.path_info_size(path)
                self.sizes.clear()
                self.sizes[path] = size
            self.around.measured(self.entry, self.sizes[path])

    def follow(self, switch: launch.SwitchProcess, measuring: threading.Thread) -> None:
        """Hear of each step until the process ends; the final report has the closure's size in it."""
        entry = self.entry
        said: Optional[str] = ""
        while said is not None:
            said = switch.read(SWITCH_TIMEOUT)
            step, _, rest = (said or "").partition(" ")
            if step == "ask":
                self.answer(switch, *rest.split())
                continue
            if said is None or step in journal.FINAL:
                measuring.join(SIZE_TIMEOUT)
            switch.step = step or switch.step
            entry.reload()
            if step in journal.FINAL:  # before that, the log is looked at often enough
                if entry.record.step != step:  # it could not be written, and what the disk says must not come back
                    revision = entry.record.revision + 1
                    entry.record = replace(entry.record, step=step, reason=rest or None, revision=revision)
                self.around.changed()
                self.around.tell(f"deployment {entry.record.index}: {step}{': ' * bool(rest)}{rest}")

    def answer(self, switch: launch.SwitchProcess, number: str, what: str, *words: str) -> None:
        """Say to the switch process whether the workspace can be reached, or whether it may begin: empty for yes."""
        problem = ""
        try:
            if what == watch.LOOK:
                self.around.reach(float(words[0]))
            else:
                self.around.last_look(self.entry)
                switch.step = journal.ACTIVATING
        except Exception as error:
            problem = " ".join(str(error).split()) or type(error).__name__
            if what == watch.BEGIN:
                self.refused = error
        with contextlib.suppress(OSError):
            switch.write(f"{number} {problem}")
