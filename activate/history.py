"""All deployments in a state directory, in the order of their turns at the machine.

A deployment gets the next number, `sequence`, when it arrives, and another one whenever a process
that leads it gets the machine lock. The clock would not do: it may be wrong for a while. Nor would
the index: a workspace that was restored from a backup begins with lower ones.
"""

from __future__ import annotations

import contextlib
import os

from activate.journal import SET_ASIDE, Journal, load
from activate.process import Error


def load_all(state: str) -> tuple[list[Journal], list[str]]:
    """All journals, oldest first, and a message for each that can't be read."""
    journals, problems = [], []
    root = os.path.join(state, "deployments")
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(root)):
            try:
                entry = load(os.path.join(root, name))
            except Error as error:
                problems.append(str(error))
                continue
            if entry is not None:
                journals.append(entry)
    return sorted(journals, key=order), problems


def order(entry: Journal) -> tuple[int, float]:
    """The place of a deployment among all.

    Those without a number are older than any other; only among them times must do.
    """
    return entry.record.sequence, max(entry.record.times.values(), default=0.0)


def next_sequence(journals: list[Journal]) -> int:
    """A number higher than that of any of these deployments.

    No file counts them, so that none can be lost: the highest number is that of the newest
    deployment, which `prune` keeps. If its journal is lost, the rest is still in order.
    """
    return 1 + max((entry.record.sequence for entry in journals), default=0)


def was_set_aside(directory: str) -> bool:
    """Whether a deployment was begun in this directory, and its journal is lost."""
    with contextlib.suppress(OSError):
        return any(SET_ASIDE in name for name in os.listdir(directory))
    return False
