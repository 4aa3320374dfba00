"""Signs of life of deployments: who has any, and which deployment an agent is to be sent.

An agent of ours goes on after any restart and reports what it did; while it is connected it is at
work. Any other agent, such as Cachix's, executes whatever it is sent: it is at work while it has a
socket of the deployment open. Nothing here is stored: a server that has just started gives all of
them the time to come back.
"""

from __future__ import annotations

import collections
import threading
import time
from dataclasses import dataclass, replace

from cachix_protocol import IN_PROGRESS, utc_now
from cachix_workspace.deployments import DeploymentRow, Open
from cachix_workspace.reports import AWAITING_REBOOT, REBOOTING

REBOOT_SECONDS = 900.0  # for which a machine that reboots may be silent
REPEATS = 3  # of one deployment on one connection, to an agent that gives no sign of life


@dataclass(frozen=True)
class Sign:
    """When a sign of life came: by this process' clock, in seconds, and as the protocol writes."""

    moment: float
    time: str

    @classmethod
    def now(cls) -> Sign:
        return cls(time.monotonic(), utc_now())


class Signs:
    """Signs of life of deployments and agents, by their ids."""

    def __init__(self) -> None:
        self._start = Sign.now()
        self._last: dict[str, Sign] = {}
        self._open: collections.Counter[str] = collections.Counter()  # sockets
        self._quiet: set[str] = set()  # agents that all nodes know to be connected
        self._told = 0.0  # when the last news were taken
        self._lock = threading.Lock()

    def note(self, *ids: str) -> None:
        """Note a sign of life, now."""
        sign = Sign.now()
        with self._lock:
            self._last.update(dict.fromkeys(ids, sign))

    def enter(self, id: str, is_known: bool = False) -> None:
        """Give signs of life from now on, as a socket is open, until `leave`.

        Other nodes are told, unless they know.
        """
        with self._lock:
            self._open[id] += 1
            if is_known:
                self._quiet.add(id)

    def leave(self, id: str) -> None:
        """Give no more, as the socket has ended, but this last one."""
        self.note(id)
        with self._lock:
            self._open[id] -= 1
            if not self._open[id]:
                del self._open[id]
                self._quiet.discard(id)

    def take_news(self) -> list[str]:
        """Those that have given a sign since the last call, or give one now, for other nodes."""
        with self._lock:
            before, self._told = self._told, time.monotonic()
            given = {each for each, sign in self._last.items() if sign.moment >= before}
            return sorted((given | set(self._open)) - self._quiet)

    def forget(self, deployment_id: str) -> None:
        """Forget a deployment that has ended."""
        with self._lock:
            self._last.pop(deployment_id, None)

    def last(self, *ids: str) -> Sign:
        """The latest sign of any of these; the start of this process if none is known."""
        with self._lock:
            signs = [self._last[each] for each in ids if each in self._last]
            if any(each in self._open for each in ids):
                signs.append(Sign.now())
        return max(signs, key=lambda sign: sign.moment, default=self._start)

    def silence(self, *ids: str) -> float:
        """Seconds since the latest sign of any of these."""
        return max(0.0, time.monotonic() - self.last(*ids).moment)

    def lost_since(self, row: DeploymentRow, patience: float) -> str | None:
        """When a deployment gave its last sign of life; None unless that is `patience` seconds ago.

        One that does not run gives none, and is not lost.
        """
        patience = patience_for(row.step, patience)
        if row.status != IN_PROGRESS or self.silence(row.id, row.agent_id) < patience:
            return None
        return self.last(row.id, row.agent_id).time


def patience_for(step: str | None, patience: float) -> float:
    """Seconds of silence after which a deployment in a step is lost."""
    return max(patience, REBOOT_SECONDS) if step == REBOOTING else patience


@dataclass(frozen=True)
class Sent:
    """The deployments sent on a connection: the highest index, and repeats of a deployment.

    A repeat is one that was InProgress already.
    """

    index: int = 0
    is_new: bool = True  # it has just registered
    repeated: str = ""
    times: int = 0


@dataclass(frozen=True)
class Decision:
    """A deployment to send, after ending another one; the next look is in `pause` seconds."""

    send: DeploymentRow | None = None
    end: DeploymentRow | None = None
    pause: float | None = None


def decide(now: Open, is_ours: bool, sent: Sent, silence: float, patience: float) -> Decision:
    """The decision on what to send an agent that is connected.

    `silence` is how long the deployment that runs has given no sign of life; 0 if it is at work.
    """
    running, waiting = now.running, now.waiting
    if running is None:
        is_due = waiting is not None and waiting.index > sent.index
        return Decision(send=waiting if is_due else None)
    if is_ours:
        # one that waits for a reboot is done, and gives way
        next_one = waiting if running.step == AWAITING_REBOOT else None
        if sent.is_new:
            return Decision(send=running, pause=1.0 if next_one else None)
        is_due = next_one is not None and next_one.index > sent.index
        return Decision(send=next_one if is_due else None)
    if silence < patience:
        return Decision(pause=patience - silence)
    if waiting is not None:
        return Decision(send=waiting, end=running)
    if sent.repeated == running.id and sent.times >= REPEATS:
        return Decision()
    return Decision(send=running, pause=patience)


def after(sent: Sent, decision: Decision) -> Sent:
    """The deployments sent once a decision was carried out."""
    row = decision.send
    if row is None:
        return replace(sent, is_new=False)
    if row.status != IN_PROGRESS:
        return Sent(row.index, is_new=False)
    times = sent.times + 1 if sent.repeated == row.id else 1
    return Sent(max(sent.index, row.index), is_new=False, repeated=row.id, times=times)
