"""All deployments in a state directory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from activate.journal import RECEIVED, SET_ASIDE, Journal, load
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
    return sorted(journals, key=lambda entry: entry.record.times.get(RECEIVED, 0.0)), problems


def newest_first(state: str) -> Iterator[Journal]:
    """The journals that can be read, in the order of their last write, latest first."""
    root = os.path.join(state, "deployments")
    writes: list[tuple[float, str]] = []
    with contextlib.suppress(OSError):
        for name in os.listdir(root):
            with contextlib.suppress(OSError):
                writes.append((os.stat(os.path.join(root, name, "journal.json")).st_mtime, name))
    for _, name in sorted(writes, reverse=True):
        with contextlib.suppress(Error):
            entry = load(os.path.join(root, name))
            if entry is not None:
                yield entry


def was_set_aside(directory: str) -> bool:
    """Whether a deployment was begun in this directory, and its journal is lost."""
    with contextlib.suppress(OSError):
        return any(SET_ASIDE in name for name in os.listdir(directory))
    return False
