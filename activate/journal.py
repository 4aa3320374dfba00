"""The durable record of a deployment.

`Journal.enter` is the only way from step to step: it writes before the step has any effect.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any, Optional

from activate.environment import state_directory as state_directory
from activate.files import write_durably
from activate.process import Error
from activate.record import ACTIVATING as ACTIVATING
from activate.record import ACTIVATION as ACTIVATION
from activate.record import ADDED as ADDED
from activate.record import AWAITING_REBOOT as AWAITING_REBOOT
from activate.record import CANCELLED as CANCELLED
from activate.record import CHECKING as CHECKING
from activate.record import COMMITTING as COMMITTING
from activate.record import DOWNLOADING as DOWNLOADING
from activate.record import EFFECTS as EFFECTS
from activate.record import FAILED as FAILED
from activate.record import FINAL as FINAL
from activate.record import HARMLESS as HARMLESS
from activate.record import READY as READY
from activate.record import REBOOTING as REBOOTING
from activate.record import RECEIVED as RECEIVED
from activate.record import ROLLBACK as ROLLBACK
from activate.record import ROLLBACK_FAILED as ROLLBACK_FAILED
from activate.record import ROLLED_BACK as ROLLED_BACK
from activate.record import ROLLING_BACK as ROLLING_BACK
from activate.record import SET_ASIDE as SET_ASIDE
from activate.record import STEPS as STEPS
from activate.record import SUCCEEDED as SUCCEEDED
from activate.record import SUPERSEDED as SUPERSEDED
from activate.record import VERSION as VERSION
from activate.record import Record as Record
from activate.record import Unreadable as Unreadable
from activate.values import replace

MOST_RECORDS = 200  # that are kept in memory
SETTLED = 2.0  # seconds after which a file can't be another one with the same marks

_records: dict[str, tuple[tuple[int, ...], Record]] = {}  # by path, with the marks of its file


class Journal:
    """A deployment's journal. Only the holder of its deployment lock writes it."""

    def __init__(self, directory: str, record: Record) -> None:
        self.directory = directory
        self.record = record

    @property
    def state(self) -> str:
        """The state directory that this deployment is in."""
        return os.path.dirname(os.path.dirname(self.directory))

    def path(self, name: str) -> str:
        """A file of this deployment: its log, reported.json, a GC root."""
        return os.path.join(self.directory, name)

    def enter(self, step: str, **facts: Any) -> None:
        """Record that `step` is starting. Callers must not act before this returns. Raises OSError.

        The first time in a step with effects starts a new count of attempts. Only the first time:
        otherwise a commit that is checked again each time would have no limit.
        """
        if step not in self.record.times and step in EFFECTS:
            facts.setdefault("attempts", 0)
        times = {**self.record.times, step: time.time()}
        facts["revision"] = self.record.revision + 1
        self.record = replace(self.record, step=step, times=times, **facts)
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        write_durably(self.path("journal.json"), self.record.to_json())

    def reload(self) -> None:
        """Read the record of another process, unless this one knows more than it could write.

        An end is final, however much this process has written before it knew of that.
        """
        with contextlib.suppress(Error):
            on_disk = load(self.directory)
            if on_disk is None:
                return
            has_ended = on_disk.record.step in FINAL and self.record.step not in FINAL
            if has_ended or on_disk.record.revision >= self.record.revision:
                self.record = on_disk.record

    def drop_roots(self) -> None:
        """Remove the GC roots of a deployment that has ended.

        After a failed rollback they are still needed; otherwise the profile keeps what is needed.
        """
        if self.record.step == ROLLBACK_FAILED:
            return
        with contextlib.suppress(OSError):
            for name in os.listdir(self.directory):
                if os.path.islink(self.path(name)):
                    os.unlink(self.path(name))


def _read(path: str) -> Record:
    """The record in a file, which is replaced and never changed. Raises OSError or Unreadable."""
    status = os.stat(path)
    mark = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    known = _records.get(path)
    if known is not None and known[0] == mark:
        return known[1]
    with open(path, "rb") as file:
        record = Record.from_json(file.read(1 << 22))
    if len(_records) >= MOST_RECORDS:
        _records.clear()
    if time.time() > status.st_mtime + SETTLED:  # an inode's number may be used again at once
        _records[path] = mark, record
    return record


def load(directory: str) -> Optional[Journal]:
    """The journal in a deployment's directory; None if there is none.

    Raises Unreadable. A file that is not a journal is set aside before; one that can't be opened
    stays.
    """
    path = os.path.join(directory, "journal.json")
    try:
        return Journal(directory, _read(path))
    except FileNotFoundError:
        return None
    except (IsADirectoryError, Unreadable) as error:
        with contextlib.suppress(OSError):
            os.rename(path, f"{path}{SET_ASIDE}{time.time_ns()}")
        raise Unreadable(f"{path} can't be read and was set aside: {error}") from None
    except OSError as error:
        raise Unreadable(f"{path} can't be read: {error}") from None
