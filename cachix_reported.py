"""The progress of reports on disk, and the removal of deployments that are reported."""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import Optional

from activate import history, journal
from activate.values import dataclass

KEPT_JOURNALS = 20


@dataclass(frozen=True)
class Reported:
    """The progress of a deployment's report, kept in reported.json.

    `line` and `offset` (in bytes) are the next of the log to send. `started`, `sized`, `logged` and
    `ended` say which reports were acknowledged, `step` which of those that may last for long.
    """

    started: bool = False
    sized: bool = False
    line: int = 0
    offset: int = 0
    logged: bool = False
    ended: bool = False
    size: Optional[int] = None
    time: str = ""
    step: Optional[str] = None

    @classmethod
    def load(cls, path: str) -> Reported:
        """Read the file. A damaged one counts as the beginning: reports may be repeated."""
        try:
            with open(path, "rb") as file:
                record = json.loads(file.read(1 << 16))
            flags = {name: record[name] for name in ("started", "sized", "logged", "ended")}
            numbers = {name: record[name] for name in ("line", "offset")}
            size = record["size"]
            valid = all(type(flag) is bool for flag in flags.values())
            for number in (*numbers.values(), 0 if size is None else size):
                valid = valid and type(number) is int and number >= 0
            return cls(**flags, **numbers, size=size) if valid else cls()
        except IsADirectoryError:  # it would block every later write
            with contextlib.suppress(OSError):
                os.rename(path, f"{path}{journal.SET_ASIDE}{time.time_ns()}")
            return cls()
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return cls()

    @property
    def whole(self) -> bool:
        """Whether the log and the end were acknowledged, so that nothing is left to report."""
        return self.logged and self.ended


def is_reported(entry: journal.Journal) -> bool:
    """Whether nothing is left to report of a deployment that has ended."""
    return bool(entry.record.by_hand) or Reported.load(entry.path("reported.json")).whole


def prune(state: str) -> None:
    """Remove all but the newest KEPT_JOURNALS of the deployments that ended and are reported."""
    import shutil

    entries, _ = history.load_all(state)
    entries = [entry for entry in entries if entry.record.step in journal.FINAL]
    done = [entry for entry in entries if is_reported(entry)]
    for entry in done[: max(0, len(done) - KEPT_JOURNALS)]:
        shutil.rmtree(entry.directory, ignore_errors=True)
