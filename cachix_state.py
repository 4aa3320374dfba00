"""A deployment as its workspace sees it, put into words for whoever waits for it."""

from __future__ import annotations

import datetime
import re
from typing import Any, Optional

from activate.text import brief, clean
from activate.values import dataclass
from cachix_protocol import FAILED, IN_PROGRESS, PENDING, SUCCEEDED, TERMINAL, checked_field

PATIENCE = 30.0  # seconds until an agent that does not start is spoken of, if nothing is known
BACK_TO = re.compile(r"rolled back to (/nix/store/[^\s,;]+)")
OUTCOMES = {
    "nothing-changed": "nothing was changed",
    "rolled-back": "rolled back",
    "changed-by-others": "somebody else has changed the machine",
    "state-lost": "the agent has lost its state",
    "reboot-needed": "a reboot is needed",
    "dry-run": "a dry run: nothing was changed",
    "tested": "it runs until the next boot",
    "unreported": "its agent has not reported how it ended",
}
MAX_SIZE = 1 << 62  # bytes; a larger closure is none


@dataclass(frozen=True)
class DeploymentState:
    """A deployment as the workspace sees it. Times are RFC 3339, the size is in bytes.

    What follows the size is our own addition: Cachix's workspace does not say it.
    """

    status: str = "Unknown"
    started: Optional[str] = None
    finished: Optional[str] = None
    closure_size: Optional[int] = None
    reason: Optional[str] = None
    outcome: Optional[str] = None
    agent_online: Optional[bool] = None
    offline_since: Optional[str] = None
    paused_since: Optional[str] = None
    lost_since: Optional[str] = None
    cancel_requested: Optional[str] = None
    cancel_refused: Optional[str] = None
    before: Optional[str] = None
    step: Optional[str] = None
    reboot: Optional[str] = None

    @classmethod
    def from_json(cls, record: Any) -> DeploymentState:
        def text(name: str) -> Optional[str]:
            value = record.get(name)
            return value if isinstance(value, str) else None

        size = checked_field(record, "closureSize", int, optional=True)
        online = record.get("agentOnline") if isinstance(record, dict) else None
        return cls(
            status=checked_field(record, "status", str),
            started=checked_field(record, "startedOn", str, optional=True),
            finished=checked_field(record, "finishedOn", str, optional=True),
            closure_size=size if size is not None and 0 <= size <= MAX_SIZE else None,
            reason=text("reason"),
            outcome=text("outcome"),
            agent_online=online if isinstance(online, bool) else None,
            offline_since=text("agentOfflineSince"),
            paused_since=text("agentPausedSince"),
            lost_since=text("lostSince"),
            cancel_requested=text("cancelRequested"),
            cancel_refused=text("cancelRefused"),
            before=text("before"),
            step=text("step"),
            reboot=text("reboot"),
        )

    @property
    def ended(self) -> bool:
        """Whether the deployment has ended."""
        return self.status in TERMINAL

    def seconds(self) -> Optional[float]:
        """How long it ran, by the workspace's clock; None if a time is missing."""
        start, finish = _timestamp(self.started), _timestamp(self.finished)
        return None if start is None or finish is None else max(0.0, finish - start)

    def result(self, agent: str) -> str:
        """The status, with what the end means for the machine."""
        status = clean(self.status)
        if self.outcome == "rollback-failed":
            return f"ROLLBACK FAILED: {agent} needs you"
        words = OUTCOMES.get(self.outcome or "")
        if words is None or self.status not in (SUCCEEDED, FAILED):
            return status
        target = BACK_TO.search(self.reason or "")
        if self.outcome == "rolled-back" and target is not None:
            words = f"rolled back to {target[1]}"
        return f"{status}, {words}"

    def reasons(self) -> list[str]:
        """The lines of its reason."""
        return [clean(line) for line in (self.reason or "").splitlines() if line.strip()]

    def news(self, agent: str, waited: float) -> str:
        """Why nothing happens, for whoever has `waited` so many seconds; empty if all is well."""
        if self.status == PENDING and self.paused_since:
            return f"{agent}: paused since {minute(self.paused_since)}, waiting for it"
        if self.status == PENDING and self.agent_online is False and self.offline_since:
            return f"{agent}: offline since {minute(self.offline_since)}, waiting for it"
        if self.status == PENDING and self.agent_online is False:
            question = "is its agent started, and by this name?"
            return f"{agent}: never connected so far, waiting for it ({question})"
        if self.status == PENDING and self.agent_online is None and waited >= PATIENCE:
            return f"{agent}: not started yet, its agent may be offline or busy; waiting for it"
        if self.status == IN_PROGRESS and self.step == "awaiting-reboot":
            place = "its reboot window" if self.reboot == "window" else "its reboot"
            return f"{agent}: runs the new system, and waits for {place}"
        if self.status == IN_PROGRESS and self.step == "rebooting" and not self.lost_since:
            return f"{agent}: reboots, and is to be confirmed after that"
        if self.status == IN_PROGRESS and self.lost_since:
            return f"{agent}: no sign of life since {minute(self.lost_since)}, waiting for it"
        if self.status == IN_PROGRESS and self.cancel_requested:
            return f"{agent}: it is to be cancelled, if the agent has not begun to activate it"
        if self.status == IN_PROGRESS and self.cancel_refused:
            return f"{agent}: it was too late to cancel it"
        return ""


def minute(text: str) -> str:
    """A time for people, such as 2026-11-26 18:00 UTC."""
    moment = _timestamp(text)
    if moment is None:
        return brief(text)
    return f"{datetime.datetime.fromtimestamp(moment, datetime.timezone.utc):%Y-%m-%d %H:%M} UTC"


def _timestamp(text: Optional[str]) -> Optional[float]:
    """Seconds since 1970 of an RFC 3339 time; its fraction may have any number of digits."""
    match = re.match(r"(\S{19})(\.\d+)?", text or "")
    if match is None:
        return None
    try:
        moment = datetime.datetime.fromisoformat(match[1]).replace(tzinfo=datetime.timezone.utc)
    except ValueError:
        return None
    return moment.timestamp() + float(match[2] or 0)
