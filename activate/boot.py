"""The start of a switch process: it boots while its agent downloads, and loads for the network what it needs beside.

Python takes longer for that than Nix for a small download: what comes before the first step is the bare minimum.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import threading
from typing import Any

from activate import journal, logfile, verdict, watch


class Network:
    """The look at the workspace, which is not this package's own: the agent has said which module has it."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.found: list[watch.Reach] = []
        self.thread = threading.Thread(target=self.load, name="imports", daemon=True)
        self.thread.start()

    def load(self) -> None:
        """Read all that it needs: the files may be gone after an activation."""
        import ctypes  # noqa: F401  # for `durable.sync`

        self.found.append(importlib.import_module(self.config["network"]).load_reach(self.config))
        gc.enable()  # the command that started this process has held it back: modules leave no garbage

    def reach(self, timeout: float) -> None:
        """One look; what could not be loaded is tried again, and raised."""
        if not self.found:
            self.load()
        self.found[0](timeout)


def main(deployment_id: str) -> int:
    """The switch process: started by an agent, never by hand."""
    sys.setswitchinterval(0.0005)  # seconds: loading must not hold up the steps
    agent = watch.Agent(0, 1)
    line = agent.line(watch.START_TIMEOUT)
    if line is None:
        return 0
    config = json.loads(line)
    settings = verdict.Settings(**config["settings"])
    os.set_inheritable(config["lock"], False)
    agent.tell("ready")
    from activate import switch

    network = Network(config)
    go = agent.line(watch.START_TIMEOUT)
    if go is None or not go.startswith("go "):
        return 0
    entry = journal.load(config["directory"])
    if entry is None or entry.record.id != deployment_id:
        return 1
    log = logfile.open_log(entry)
    os.dup2(log, 2)
    os.set_blocking(1, False)
    process = switch.Switch(entry, log, settings, network.reach, agent, network.thread.join)
    signal.signal(signal.SIGTERM, lambda *_: process.stop.set())
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        process.perform(go[3:])
    except switch.Stopping:
        record = entry.record
        with contextlib.suppress(OSError):  # an interruption by the system's end counts as no attempt
            entry.enter(record.step, attempts=max(0, record.attempts - 1))
    return 0
