"""The log sockets of viewers: all lines from the first on, until no more are to come."""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection

from cachix_protocol import TERMINAL
from cachix_workspace import deployments, logs
from cachix_workspace.context import Workspace
from cachix_workspace.deployments import DeploymentRow
from cachix_workspace.handlers import Handler, Messages
from cachix_workspace.refusal import Refusal
from cachix_workspace.websocket import COMPLETE, Socket, frame_of

LOG_GRACE = 3.0  # seconds that a viewer waits for the last lines of a deployment that has ended
AT_ONCE = 50  # logs that are looked at in one transaction
PAUSE = 0.1  # seconds between two looks at a log that grows: lines meanwhile are sent together


class ViewHandler(Handler):
    """The socket of a viewer."""

    __slots__ = ("last", "log_id", "looked", "offset", "quiet_since")
    path = "/api/v1/deploy/log"
    may_wait = True

    def __init__(self, workspace: Workspace, sock: Socket, log_id: str) -> None:
        super().__init__(workspace, sock)
        self.log_id = log_id
        self.offset, self.last, self.quiet_since = 0, "", 0.0
        self.looked = 0.0  # when it was found to have all lines

    @classmethod
    def handle(cls, visits: Sequence[tuple[Any, Messages]]) -> None:
        """Send what is new. Viewers at the same line of a log share a look at it."""
        together = collections.defaultdict(list)
        now = time.monotonic()
        for handler, _ in visits:
            if not handler.sock.open or handler.sock.is_clogged:
                continue
            if now < handler.looked + PAUSE:
                handler.look_again(handler.looked + PAUSE - now)
            else:
                together[handler.log_id, handler.offset].append(handler)
        looks = list(together.items())
        for start in range(0, len(looks), AT_ONCE):
            with visits[0][0].workspace.database.read() as connection:
                for (log_id, offset), handlers in looks[start : start + AT_ONCE]:
                    try:
                        _look(connection, handlers, log_id, offset)
                    except Refusal as refusal:  # its deployment was removed
                        cls._end(handlers, refusal)


def _look(connection: Connection, handlers: list[ViewHandler], log_id: str, offset: int) -> None:
    """Send viewers at the same line what follows it. Raises Refusal."""
    row = deployments.find(connection, log_id)
    lines = logs.read(connection, row.id, offset) if offset < row.log_next else []
    now = time.monotonic()
    frames = b"".join(map(frame_of, lines))
    following = offset + len(lines)
    # then whoever adds to the log wakes its viewers, and they need not look meanwhile
    has_all = row.status not in TERMINAL and following >= row.log_next
    for handler in handlers:
        if lines:
            handler.offset, handler.last = following, lines[-1]
            handler.quiet_since = now
            handler.sock.send_many(frames, will_wake=not has_all)
        if has_all or not lines:
            handler.looked = now
            _wait_for_more(handler, row, now)


def _wait_for_more(handler: ViewHandler, row: DeploymentRow, now: float) -> None:
    """Look again in a while, or close the socket if no more lines are to come."""
    if row.status not in TERMINAL:
        handler.look_again()
        return
    handler.quiet_since = handler.quiet_since or now
    wait = handler.quiet_since + LOG_GRACE - now
    if wait <= 0 or _is_complete(row, handler.last):
        handler.sock.end(*COMPLETE)
    else:
        handler.look_again(wait)


def _is_complete(row: DeploymentRow, last: str) -> bool:
    """Whether no more lines are to come to a log that has ended with the line `last`.

    It has no lines if the deployment never started, else a closing line.
    """
    if row.started_on is None and row.log_next == 0:
        return True
    return bool(last) and logs.is_closing(last)
