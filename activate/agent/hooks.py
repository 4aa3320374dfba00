"""The agent as its deployments see it: its functions, and the exception for an early end."""

from __future__ import annotations

import contextlib
import threading
from typing import Any, Callable, Optional

from activate import journal, nix
from activate.pipe import Reach
from activate.process import Error
from activate.values import dataclass


class Ended(Error):
    """A deployment ends before it has changed anything. `detail` goes only into the report.

    `outcome` is given where the step alone does not tell it.
    """

    def __init__(
        self, step: str, reason: str, detail: Optional[str] = None, outcome: Optional[str] = None
    ) -> None:
        super().__init__(reason)
        self.step, self.detail, self.outcome = step, detail, outcome


@dataclass(frozen=True)
class AgentHooks:
    """The agent's settings and functions for a deployment. Times are in seconds."""

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
    reach: Reach  # looks at the workspace over a new connection
    is_cancelled: Callable[[journal.Journal], bool] = lambda entry: False  # asks the workspace
    switch_files: tuple[int, ...] = ()  # descriptors that a switch process is loaded from
    is_replaced: Callable[[journal.Journal], bool] = lambda entry: False  # a newer one waits
