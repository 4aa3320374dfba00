"""One attempt at a deployment: download, hand over to a switch process, follow it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Optional

from activate import (
    cancellation,
    holder,
    journal,
    kinds,
    lock,
    logfile,
    machine,
    nix,
    outcomes,
    pipe,
    recovery,
)
from activate.agent import closure, database, download, launch, signatures
from activate.agent.hooks import AgentHooks, Ended
from activate.process import Error, say
from activate.text import one_line
from activate.values import replace

SWITCH_TIMEOUT = 48 * 3600.0  # seconds for a step of a switch process; its own are shorter
SIZE_TIMEOUT = 10.0  # seconds for which an end waits for the closure's size
# Seconds for which the answer counts whether a deployment was cancelled: less than any wait for a
# lock, in which somebody may have cancelled it.
LATELY = lock.POLL
ASKING = 10.0  # seconds for that answer: without one the deployment goes on


class Cancelled(threading.Thread):
    """Asks the workspace whether a deployment was cancelled, while the switch process begins."""

    def __init__(self, hooks: AgentHooks, entry: journal.Journal) -> None:
        super().__init__(name="cancelled", daemon=True)
        self.hooks, self.entry, self.answer = hooks, entry, False
        self.asked = time.monotonic()
        self.start()

    def run(self) -> None:
        self.answer = self.hooks.is_cancelled(self.entry)

    def require_not(self) -> None:
        """Wait for the answer; ask again if this was long ago. Raises Ended."""
        self.join(ASKING)
        if time.monotonic() > self.asked + LATELY and not self.is_alive():
            self.run()
        if self.answer:
            raise Ended(journal.CANCELLED, "it was cancelled before it was activated")


class Attempt:
    """One attempt, from recovery's decision to the end of the switch process."""

    def __init__(self, hooks: AgentHooks, entry: journal.Journal, sizes: dict[str, int]) -> None:
        """`sizes` has the closure size, in bytes, of the path that was deployed last."""
        self.hooks, self.entry, self.sizes = hooks, entry, sizes
        self.switch: Optional[launch.SwitchProcess] = None
        self.cancelled: Optional[Cancelled] = None
        self.refusal: Optional[Exception] = None  # why the switch process must not begin

    def run(self, action: recovery.Action, taken: holder.Locks) -> None:
        """Download if need be, let the switch process go, follow it. Raises Error."""
        record = self.entry.record
        nix.check_paths(record.store_path, record.rollback_script)
        switch = self.switch = launch.SwitchProcess(self.hooks, self.entry, taken)
        try:
            if action.do == recovery.START:
                self.download()
                self.cancelled = Cancelled(self.hooks, self.entry)
            switch.go(action.do, self.entry.record)
            measuring = threading.Thread(target=self.measure, name="measure", daemon=True)
            measuring.start()
            self.follow(switch, measuring)
        finally:
            switch.close()
        if self.refusal is not None:
            raise self.refusal

    def download(self) -> None:
        """Get the closure and the rollback script into the store, with GC roots. Raises Error."""
        entry, record, boot = self.entry, self.entry.record, machine.boot_id()
        again = journal.DOWNLOADING in record.times
        unsafe = again and record.boot_id != boot  # a power loss: Nix may believe in lost contents
        entry.enter(journal.DOWNLOADING, boot_id=record.boot_id if unsafe else boot)
        self.hooks.changed()
        paths = [record.store_path, *([record.rollback_script] if record.rollback_script else [])]
        previous = paths_in_use(record.profile_name)
        log, timeout = logfile.open_log(entry), self.hooks.download_timeout
        # who stands at the machine answers for what is in its store already
        known = signatures.present(paths) if record.by_hand else []
        try:
            with self.hooks.source() as source:
                if source.note:
                    say(log, source.note)
                link = entry.path("new")
                look = signatures.Look(
                    [path for path in paths if path not in (*previous, *known)], source
                )
                rooted = download.download(paths, previous, link, source, log, timeout)
                closure.complete(paths, source, log, timeout)
                look.require(log)
                if unsafe:
                    download.repair(paths, source, log, timeout)
            closure.check_programs(record.store_path, record.rollback_script)
        finally:
            os.close(log)
        entry.enter(journal.READY, rooted=tuple(previous) if rooted else (), boot_id=boot)

    def measure(self) -> None:
        """Find out the closure's size while the switch process works."""
        path = self.entry.record.store_path
        with contextlib.suppress(Error):
            if path not in self.sizes:
                size = database.closure_size(path)
                self.sizes.clear()
                self.sizes[path] = nix.path_info_size(path) if size is None else size
            self.hooks.measured(self.entry, self.sizes[path])

    def follow(self, switch: launch.SwitchProcess, measuring: threading.Thread) -> None:
        """Follow the switch process until it ends. An end waits for the closure's size."""
        while True:
            message = switch.pipe.listen(SWITCH_TIMEOUT)
            if isinstance(message, pipe.Question):
                self.answer(switch, message)
                continue
            if message is None or message.step in journal.FINAL:
                measuring.join(SIZE_TIMEOUT)
            if message is None:
                self.entry.reload()
                return
            switch.step = message.step
            self.entry.reload()
            if message.step == journal.AWAITING_REBOOT:
                self.hooks.changed()
                self.hooks.tell(f"{outcomes.title(self.entry.record)}: in place, to be rebooted")
            if message.step in journal.FINAL:
                self.note_end(message)

    def note_end(self, end: pipe.Entered) -> None:
        """Take note of the end, even if the switch process could not write it."""
        entry, record = self.entry, self.entry.record
        if record.step != end.step:  # the journal on disk is older, and must not come back
            revision = record.revision + 1
            reason = end.reason or None
            entry.record = replace(record, step=end.step, reason=reason, revision=revision)
        self.hooks.changed()
        detail = f": {end.reason}" if end.reason else ""
        self.hooks.tell(f"{outcomes.title(record)}: {end.step}{detail}")

    def answer(self, switch: launch.SwitchProcess, question: pipe.Question) -> None:
        """Answer whether the workspace can be reached, or whether the switch process may begin."""
        problem = ""
        try:
            if question.word == pipe.LOOK:
                self.hooks.reach(question.timeout)
            elif cancellation.is_requested(self.entry):
                raise Ended(journal.FAILED, cancellation.REASON)
            else:
                if self.cancelled is not None:
                    self.cancelled.require_not()
                self.hooks.still_wanted(self.entry)
                switch.step = journal.ACTIVATING
        except Exception as error:
            problem = one_line(str(error)) or type(error).__name__
            if question.word == pipe.BEGIN:
                self.refusal = error
        switch.pipe.answer(question, problem)


def paths_in_use(profile_name: Optional[str]) -> list[str]:
    """The paths that run or that profiles point at, of any kind: the download roots them too."""
    profiles = [kind.profile_path(profile_name) for kind in kinds.KINDS]
    running = [kind.running_path(profile) for kind, profile in zip(kinds.KINDS, profiles)]
    targets = {nix.target(link) for link in (*profiles, *running) if link}
    return sorted(path for path in targets if path and os.path.lexists(path))
