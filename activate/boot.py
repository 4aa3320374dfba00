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
from typing import Any, Optional

from activate import journal, logfile, verdict, watch
from activate.process import Error


class Network:
    """The look at the workspace over a fresh connection, which is not this package's own: `config` names its module.

    The agent looks as long as it is there: it has loaded what that needs, and this process need not. What may take the
    agent, or files, away is told to `load` before; then this process looks by itself.
    """

    def __init__(self, config: dict[str, Any], agent: watch.Agent) -> None:
        self.config, self.agent = config, agent
        self.own: Optional[watch.Reach] = None

    def load(self) -> None:
        """Read all that a look needs: the files may be gone after an activation."""
        self.own = importlib.import_module(self.config["network"]).load_reach(self.config)

    def reach(self, timeout: float) -> None:
        """One look. Raises Error with what is wrong."""
        if self.own is None:
            problem = self.agent.asks(f"{watch.LOOK} {timeout}", timeout)
            if problem:
                raise Error(problem)
            if problem is None:
                self.load()
        if self.own is not None:
            self.own(timeout)


def main(deployment_id: str) -> int:
    """The switch process: started by an agent, never by hand."""
    agent = watch.Agent(0, 1)
    line = agent.line(watch.START_TIMEOUT)
    if line is None:
        return 0
    config = json.loads(line)
    settings = verdict.Settings(**config["settings"])
    os.set_inheritable(config["lock"], False)
    agent.tell("ready")
    import ctypes  # noqa: F401  # for `durable.sync`; this and more are loaded while the agent downloads

    from activate import switch

    network = Network(config, agent)
    gc.enable()  # the command that started this process has held it back: modules leave no garbage
    go = agent.line(watch.START_TIMEOUT)
    if go is None or not go.startswith("go "):
        return 0
    _, action, text = go.split(" ", 2)
    # What the agent says counts, and not the file: the state may be lost, or on a disk that takes nothing any more.
    entry = journal.Journal(config["directory"], journal.Record.from_json(text.encode()))
    log = logfile.open_log(entry)
    os.dup2(log, 2)
    os.set_blocking(1, False)
    process = switch.Switch(entry, log, settings, network.reach, agent, network.load)
    signal.signal(signal.SIGTERM, lambda *_: process.stop.set())
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        process.perform(action)
    except switch.Stopping:
        record = entry.record
        with contextlib.suppress(OSError):  # an interruption by the system's end counts as no attempt
            entry.enter(record.step, attempts=max(0, record.attempts - 1))
    return 0
