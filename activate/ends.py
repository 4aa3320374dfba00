"""Deployments that have ended. What the disk does not take of that is written when it is well again: recovery would
undo or repeat a deployment whose journal has no end, even long after the same path was deployed once more.
"""

from __future__ import annotations

import contextlib
import threading

from activate import journal, lock, logfile
from activate.process import Error

PAUSE = 2.0  # seconds between attempts to write an end


class Ends:
    """The ends that an agent has seen."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop
        self.unwritten: list[journal.Journal] = []

    def keep(self, entry: journal.Journal) -> None:
        """Let go of a deployment that has ended, or remember it until that is on disk."""
        if entry.record.step != journal.ROLLBACK_FAILED:  # that one's previous path is still needed
            entry.drop_roots()
        if is_written(entry) or entry in self.unwritten:
            return
        self.unwritten.append(entry)
        if len(self.unwritten) == 1:
            threading.Thread(target=self.write_later, name="ends", daemon=True).start()

    def write(self, agent: str) -> None:
        """Write what the disk did not take before. The deployment lock of `agent` is held. Raises OSError."""
        for entry in [entry for entry in self.unwritten if entry.record.agent == agent]:
            if not is_written(entry):
                entry.enter(entry.record.step, log_size=logfile.end(entry))
            if entry.record.step != journal.ROLLBACK_FAILED:
                entry.drop_roots()
            self.unwritten.remove(entry)

    def write_later(self) -> None:
        """Try that again and again: the agent may not live to see another deployment."""
        while self.unwritten and not self.stop.wait(PAUSE):
            for record in {entry.record.agent: entry.record for entry in self.unwritten}.values():
                with contextlib.suppress(OSError):
                    held = lock.take(lock.shared_path("deployment", record.agent), text=record.id)
                    if held is not None:
                        try:
                            self.write(record.agent)
                        finally:
                            held.close()


def is_written(entry: journal.Journal) -> bool:
    """Whether the disk knows as much of a deployment as is known here."""
    with contextlib.suppress(Error):
        found = journal.load(entry.directory)
        return found is not None and found.record.revision >= entry.record.revision
    return False
