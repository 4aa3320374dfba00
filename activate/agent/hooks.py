"""The agent as its deployments see it: what they call, and how one of them ends early."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from typing import Any, Callable, Optional

from activate import journal, nix
from activate.process import Error


class Ended(Error):
    """A deployment ends before it has changed anything. `detail` is for the report alone."""

    def __init__(self, step: str, reason: str, detail: Optional[str] = None) -> None:
        super().__init__(reason)
        self.step, self.detail = step, detail


@dataclass(frozen=True)
class AgentHooks:
    """What leading a deployment needs from the agent. Times are in seconds."""

    config: dict[str, Any]  # for the switch process: token, host, policy
    switch_command: list[str]  # starts a switch process; the deployment's id follows
    scope_timeout: float  # for systemd-run to start it in a scope of its own
    download_timeout: float
    stop: threading.Event
    source: Callable[[], contextlib.AbstractContextManager[nix.Source]]
    still_wanted: Callable[[journal.Journal], None]  # raises Ended, right before anything changes
    changed: Callable[[], None]  # there is something to report
    measured: Callable[[journal.Journal, int], None]  # the closure has this many bytes
    tell: Callable[[str], None]  # a message for the operator
    reach: Callable[[float], None]  # raises if the workspace can't be reached in so many seconds
