"""The end of a deployment whose agent is gone: another agent reports it, or its switch process.

A deployment may replace our agent by Cachix's, or stop it for good. Then nobody else is left.
"""

from __future__ import annotations

import json
import os
import threading
import time
from typing import Any, Callable, Optional

import cachix_connection
from activate import journal, lock, machine
from cachix_connection import Peer, Waits
from cachix_protocol import AgentRegistered, Undecodable
from cachix_reported import Reported
from cachix_reports import Reporter

PAUSE = 0.5  # seconds between two looks at what agents do


def load(peer: Peer, by_requests: bool) -> None:
    """Load all that looks and reports need: an activation may remove the files."""
    import random  # noqa: F401
    import shutil  # noqa: F401
    import traceback  # noqa: F401
    import uuid  # noqa: F401

    cachix_connection.load(peer)
    if by_requests:
        import encodings.idna  # noqa: F401

        import cachix_session  # noqa: F401


class Orphan:
    """A deployment that has ended, and whose agent has ended too, or is about to."""

    def __init__(
        self, entry: journal.Journal, config: dict[str, Any], stop: threading.Event
    ) -> None:
        """`config` is the switch process' own; nothing more is done once `stop` is set."""
        self.entry, self.config, self.stop = entry, config, stop
        self.waits = Waits.from_environment()
        self.ended = entry.record.times.get(entry.record.step, time.time())

    def attend(self, is_alive: Callable[[], bool]) -> None:
        """Wait for another agent to report the end; report it if none comes.

        What the former agent holds counts only when it `is_alive` no more.
        """
        record, config = self.entry.record, self.config
        if (record.agent, record.host) != (config["name"], config["host"]):
            return  # it is of another workspace, and was only finished by us
        deadline = time.monotonic() + self.waits.orphan
        while time.monotonic() < deadline:
            alone = not is_alive()
            if self.stop.wait(PAUSE) or (alone and self.is_in_hands()):
                return
        self.report()

    def is_in_hands(self) -> bool:
        """Whether an agent reports the end, or has reported it."""
        whole = Reported.load(self.entry.path("reported.json")).whole
        return whole or lock.held(self.entry.path("reported.lock"))

    def report(self) -> None:
        """Report until all is delivered, for some time. An agent that comes back takes over."""
        registered = self.registration()
        if registered is None or self.is_in_hands():
            return
        peer = Peer(self.config["host"], self.config["token"], self.config["name"])
        self.entry.drop_roots()
        reporter = Reporter(peer, self.waits)
        reporter.register(registered)
        reporter.add(self.entry)
        reporter.start()
        deadline = time.monotonic() + self.waits.orphan_reports
        while not reporter.idle.is_set() and time.monotonic() < deadline:
            if self.stop.wait(PAUSE):
                return
            if self.has_successor():  # what is on its way may arrive, so that it is sent once
                deadline = min(deadline, time.monotonic() + self.waits.call)

    def registration(self) -> Optional[AgentRegistered]:
        """How the agent reports: by its latest registration; None if that is not known."""
        known = self.config.get("registered") or self.mark().get("registered")
        try:
            return None if known is None else AgentRegistered.from_json(known)
        except Undecodable:
            return None

    def has_successor(self) -> bool:
        """Whether an agent of this name has registered since the end, in this boot."""
        mark = self.mark()
        return bool(mark["time"] >= self.ended and mark["boot_id"] == machine.boot_id())

    def mark(self) -> dict[str, Any]:
        """The note that the agent of this name made when it registered last."""
        path = os.path.join(self.entry.state, f"registered-{self.entry.record.agent}.json")
        fields: dict[str, type] = {"time": float, "boot_id": str, "host": str, "registered": dict}
        try:
            with open(path, "rb") as file:
                mark = json.loads(file.read(1 << 16))
            valid = all(isinstance(mark[name], kind) for name, kind in fields.items())
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            valid = False
        if not valid or mark["host"] != self.config["host"]:
            return {"time": 0.0, "boot_id": ""}
        return dict(mark)
