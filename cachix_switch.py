"""The entry of the switch process, which starts while its agent downloads.

Python takes longer to start than Nix takes for a small download, so that as little as possible
comes before the first step. An agent starts this process; there is no command for it.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import signal
from typing import Any, Optional

from activate import journal, logfile, pipe
from activate.kinds.verdict import Policy
from activate.process import Error


def load_reach(config: dict[str, Any]) -> pipe.Reach:
    """Load all that a look at the workspace needs: an activation may remove the files."""
    from cachix_connection import Peer, load, reach

    peer = Peer(config["host"], config["token"], config["name"])
    load(peer)
    return lambda timeout: reach(peer, timeout)


class Network:
    """Looks at the workspace, each over a new connection.

    The agent makes them as long as it is alive, because it has loaded everything for that already.
    `load` makes this process independent of the agent, and of files, before a step that may end
    the one or remove the others.
    """

    def __init__(self, config: dict[str, Any], agent: pipe.SwitchEnd) -> None:
        self.config, self.agent = config, agent
        self.own: Optional[pipe.Reach] = None

    def load(self) -> None:
        """Become independent of the agent and of files."""
        self.own = load_reach(self.config)

    def reach(self, timeout: float) -> None:
        """Look once. Raises Error with the reason if the workspace can't be reached."""
        if self.own is None:
            problem = self.agent.ask(f"{pipe.LOOK} {timeout}", timeout)
            if problem:
                raise Error(problem)
            if problem is None:
                self.load()
        if self.own is not None:
            self.own(timeout)


def main() -> int:
    """Lead one deployment, as the agent at the other end of stdin and stdout asks.

    Returns the exit status.
    """
    agent = pipe.SwitchEnd(io.FileIO(0, closefd=False), io.FileIO(1, "w", closefd=False))
    config = agent.wait_for_config()
    if config is None:
        return 0
    policy = Policy(**config["policy"])
    os.set_inheritable(config["lock"], False)
    agent.report(pipe.READY)
    import ctypes  # noqa: F401  # for `files.sync`; loaded while the agent downloads

    from activate.switch import steps
    from activate.switch.output import Output
    from activate.switch.progress import Progress, Stopping

    network = Network(config, agent)
    gc.enable()  # disabled by the command line of this process, because imports leave no garbage
    order = agent.wait_for_go()
    if order is None:
        return 0
    action, record = order  # not from disk: the journal there may be lost, or older
    entry = journal.Journal(config["directory"], record)
    log = Output(logfile.open_log(entry))
    os.dup2(log.sink, 2)
    os.set_blocking(1, False)
    progress = Progress(entry, log, policy, agent)
    signal.signal(signal.SIGTERM, lambda *_: progress.stop.set())
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # unlike SIG_IGN it is not inherited by commands
    try:
        steps.Switch(progress, network.reach, network.load).perform(action)
    except Stopping:
        with contextlib.suppress(OSError):  # a shutdown does not count as an attempt
            entry.enter(entry.record.step, attempts=max(0, entry.record.attempts - 1))
    finally:
        log.close()
    return 0
