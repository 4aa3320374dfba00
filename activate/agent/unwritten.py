"""Ends of deployments, which may have to wait until the disk can be written again.

Without its end, recovery would undo or repeat a deployment, even long after another one of the
same path.
"""

from __future__ import annotations

import contextlib
import os
import threading

from activate import journal, leftovers, lock, logfile, outcomes
from activate.agent.hooks import AgentHooks, Ended
from activate.process import Error, say

PAUSE = 2.0  # seconds between attempts to write an end


class Ends:
    """The ends that an agent has seen."""

    def __init__(self, hooks: AgentHooks) -> None:
        self.hooks = hooks
        self.unwritten: list[journal.Journal] = []

    def write(self, entry: journal.Journal, end: Ended) -> None:
        """End a deployment whose end no switch process writes."""
        reason = str(end)
        leftovers.end_commands(entry.directory)  # a download may outlive its agent and journal
        log = logfile.open_log(entry)
        try:
            if end.detail:
                say(log, reason)
            with contextlib.suppress(OSError):
                os.fsync(log)
            size = logfile.end(entry)
            facts = {"detail": end.detail, "outcome": end.outcome, "log_size": size}
            entry.enter(end.step, reason=reason, **facts)
        except OSError as error:
            self.hooks.tell(f"the end of {outcomes.title(entry.record)} can't be written: {error}")
        finally:
            os.close(log)
        self.hooks.tell(f"{outcomes.title(entry.record)}: {end.step}: {reason}")

    def keep(self, entry: journal.Journal) -> None:
        """Let go of a deployment that has ended, or remember it until its end is on disk."""
        entry.drop_roots()
        if is_written(entry) or entry in self.unwritten:
            return
        self.unwritten.append(entry)
        if len(self.unwritten) == 1:
            threading.Thread(target=self._write_later, name="ends", daemon=True).start()

    def write_pending(self, agent: str) -> None:
        """Write the ends that could not be written before. Raises OSError.

        The caller holds the deployment lock of `agent`.
        """
        for entry in [entry for entry in self.unwritten if entry.record.agent == agent]:
            if not is_written(entry):
                entry.enter(entry.record.step, log_size=logfile.end(entry))
            entry.drop_roots()
            self.unwritten.remove(entry)

    def _write_later(self) -> None:
        """Retry until all are written: there may not be another deployment that writes them."""
        while self.unwritten and not self.hooks.stop.wait(PAUSE):
            for record in {entry.record.agent: entry.record for entry in self.unwritten}.values():
                with contextlib.suppress(OSError):
                    path = lock.shared_path("deployment", record.agent)
                    taken = lock.take(path, text=record.id)
                    if taken is not None:
                        with contextlib.closing(taken):
                            self.write_pending(record.agent)


def is_written(entry: journal.Journal) -> bool:
    """Whether the journal on disk is as new as that of this process."""
    with contextlib.suppress(Error):
        on_disk = journal.load(entry.directory)
        return on_disk is not None and on_disk.record.revision >= entry.record.revision
    return False
