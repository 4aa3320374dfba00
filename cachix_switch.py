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
from typing import TYPE_CHECKING, Any, Optional

from activate import journal, logfile, pipe, startup
from activate.kinds.verdict import Policy
from activate.process import Error
from activate.text import hide

if TYPE_CHECKING:
    from activate.switch.progress import Progress


# What `load_reach` loads, in small pieces and in this order; the latter for plain requests only.
PIECES = ("cachix_connection", "ssl", "http.client", "cachix_websocket", "cachix_orphan")
FOR_REQUESTS = ("urllib3.util", "urllib3.connection", "cachix_unguessed", "cachix_session")
GRACE = 0.25  # seconds in which "go" comes if there is nothing to download


def load_reach(config: dict[str, Any]) -> pipe.Reach:
    """Load all that looks at the workspace and reports need: an activation may remove the files."""
    import cachix_orphan
    from cachix_connection import Peer, reach

    peer = Peer(config["host"], config["token"], config["name"])
    cachix_orphan.load(peer, needs_requests(config))
    return lambda timeout: reach(peer, timeout)


def needs_requests(config: dict[str, Any]) -> bool:
    """Whether the reports are plain requests, as far as the agent knows already."""
    registered = config.get("registered")
    return registered is None or registered.get("reports") == "http"


def load_while_silent(agent: pipe.SwitchEnd, config: dict[str, Any]) -> None:
    """Load in advance, until the agent says something: it takes time that a download has."""
    for name in PIECES + (FOR_REQUESTS if needs_requests(config) else ()):
        if not agent.has_no_word(GRACE if name == PIECES[0] else 0):
            return
        with contextlib.suppress(ImportError):  # not everything needs it
            __import__(name)


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
        if not self.config["host"]:  # by hand, without a workspace
            import shutil  # noqa: F401
            import traceback  # noqa: F401

            return
        self.own = load_reach(self.config)

    def look_ahead(self, timeout: float) -> None:
        """Let the agent begin to look, as `reach` will want it to."""
        if self.own is None and self.config["host"]:
            self.agent.begin_to_ask(f"{pipe.LOOK} {timeout}")

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


def leave(progress: Progress, config: dict[str, Any]) -> None:
    """Let go of everything, and see to it that the end is reported if the agent is gone."""
    entry = progress.journal
    if entry.record.step not in journal.FINAL or entry.record.by_hand or progress.agent.stays():
        return
    for fd in config["locks"]:
        os.close(fd)
    progress.machine_lock.close()
    progress.log.close()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (1, 2):  # nothing more belongs into the log
        os.dup2(null, fd, inheritable=False)
    from cachix_orphan import Orphan

    Orphan(entry, config, progress.stop).attend(progress.agent.is_alive)


def handle_signals(progress: Progress) -> None:
    """Stop on SIGTERM only. A handler is not inherited by commands, unlike SIG_IGN."""
    signal.signal(signal.SIGTERM, lambda *_: progress.stop.set())
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)


def main() -> int:
    """Lead one deployment, as the agent at the other end of stdin and stdout asks.

    Returns the exit status.
    """
    agent = pipe.SwitchEnd(io.FileIO(0, closefd=False), io.FileIO(1, "w", closefd=False))
    config = agent.wait_for_config()
    if config is None:
        return 0
    for fd in config["locks"]:
        os.set_inheritable(fd, False)
    agent.report(pipe.READY)
    hide(config["token"])
    startup.protect()  # loads ctypes, also for `files.sync`, while the agent downloads
    from activate.switch import steps
    from activate.switch.output import Output
    from activate.switch.progress import Progress, Stopping

    network = Network(config, agent)
    load_while_silent(agent, config)
    gc.enable()  # disabled by the command line of this process, because imports leave no garbage
    order = agent.wait_for_go()
    if order is None:
        return 0
    action, record = order  # not from disk: the journal there may be lost, or older
    entry = journal.Journal(config["directory"], record)
    log = Output(logfile.open_log(entry))
    os.dup2(log.sink, 2)
    os.set_blocking(1, False)
    progress = Progress(entry, log, Policy(**config["policy"]), agent)
    handle_signals(progress)
    try:
        steps.Switch(progress, network).perform(action)
        leave(progress, config)
    except Stopping:
        progress.uncount()
    finally:
        log.close()
    return 0
