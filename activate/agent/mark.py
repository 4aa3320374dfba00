"""The mark of an agent, registered-NAME.json: when it registered last, and whether it still is.

Switch processes watch it, and `status` shows it.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any, Optional

from activate import files, machine


class Mark:
    """The mark that an agent writes. Its methods raise OSError if the state can't be written."""

    def __init__(self, state: str, name: str, host: str, version: str) -> None:
        self.path = os.path.join(state, f"registered-{name}.json")
        self.own = {"pid": os.getpid(), "host": host, "version": version}
        self.written: Optional[dict[str, Any]] = None

    def set(self, registered: dict[str, Any], cache: Optional[dict[str, Any]] = None) -> None:
        """Note that the agent has registered now; `registered` says how it reports."""
        moment = {"boot_id": machine.boot_id(), "time": time.time()}
        self._write({**self.own, **moment, "registered": registered, "cache": cache})

    def lose(self) -> None:
        """Note that the agent is not connected any more."""
        if self.written is not None and "lost" not in self.written:
            self._write({**self.written, "lost": time.time()})

    def _write(self, mark: dict[str, Any]) -> None:
        self.written = mark
        files.write_durably(self.path, json.dumps(mark).encode())


def load(path: str) -> dict[str, Any]:
    """The mark in a file; empty if it can't be read, or is none."""
    try:
        with open(path, "rb") as file:
            mark = json.loads(file.read(1 << 16))
        is_mark = isinstance(mark["time"], float) and isinstance(mark["pid"], int)
        return dict(mark) if is_mark else {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}
