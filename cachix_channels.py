"""The channels for reports of a deployment: requests to our workspace, websockets to Cachix's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Optional, Union

from cachix_connection import (
    CALL_TIMEOUT,
    Answer,
    Peer,
    Waits,
    close,
    connect,
    hang_up,
    http,
    round_trip,
    within,
)
from cachix_console import tell
from cachix_protocol import (
    IN_PROGRESS,
    SUCCEEDED,
    DeploymentFinished,
    DeploymentStarted,
    Error,
    FromAgent,
    Gone,
    Refused,
    Undecodable,
    Unreachable,
    checked_field,
    encode_from_agent,
    loads,
    utc_now,
)

if TYPE_CHECKING:
    import cachix_websocket


_TEXT = json.JSONEncoder(ensure_ascii=False)


def encode_lines(lines: Iterable[str], time: str) -> list[str]:
    """A LogLine of each, as the protocol writes it, in a tenth of the time: logs are long."""
    encode, end = _TEXT.encode, f',"time":{_TEXT.encode(time)}}}'
    return [f'{{"line":{encode(line)}{end}' for line in lines]


class LogClosed(Error):
    """The workspace takes no more lines of a deployment's log."""


class HttpChannel:
    """Reports to our workspace. Every call is acknowledged, and may be repeated."""

    def __init__(self, peer: Peer, deployment_id: str, timeout: float = CALL_TIMEOUT) -> None:
        self.peer, self.id, self.timeout = peer, deployment_id, timeout

    def call(self, method: str, path: str, **kwargs: Any) -> Answer:
        """Make a request; an answer that the protocol has. Raises Refused, Unreachable or Gone."""
        answer = http(self.peer, method, path, self.timeout, **kwargs)
        host = self.peer.host
        if answer.status in (401, 403):
            raise Refused(f"{host} refused the token (HTTP {answer.status})")
        if answer.status == 404 and answer.is_json:
            raise Gone(f"{host} does not know deployment {self.id}")
        if answer.status not in (200, 409, 416) or not answer.is_json:
            raise Unreachable(f"{host} answered HTTP {answer.status}", answer.retry_after)
        return answer

    def status(
        self,
        status: str,
        size: Optional[int],
        reason: Optional[str] = None,
        step: Optional[str] = None,
        outcome: Optional[str] = None,
    ) -> bool:
        """Put a status. False if the deployment was cancelled, so that the status is ignored.

        `step` is the journal's; `outcome` says what an end means for the machine.
        """
        body = {"status": status, "time": utc_now(), "closureSize": size, "reason": reason}
        more = {"step": step, "outcome": outcome}
        body.update({name: value for name, value in more.items() if value is not None})
        path = f"/api/v1/deploy/deployment/{self.id}/status"
        return self.call("PUT", path, json=body).status != 409

    def lines(self, index: int, lines: list[str]) -> int:
        """Append lines, the first with this index; the index that the workspace expects next.

        Raises LogClosed if no more lines are taken, ever.
        """
        body = "".join(f"{text}\n" for text in encode_lines(lines, utc_now()))
        path = f"/api/v1/deploy/log/{self.id}?offset={index}"
        answer = self.call("PUT", path, data=body.encode())
        if answer.status == 409:
            problem = f"{self.peer.host} takes no more lines of the log of deployment {self.id}"
            tell(problem)
            raise LogClosed(problem)
        try:
            return int(checked_field(loads(answer.body), "next", int))
        except Undecodable:
            problem = "answered without the next line's index"
            raise Unreachable(f"{self.peer.host} {problem}") from None

    def close(self) -> None:
        """Do nothing: no connection stays open."""


class SocketChannel:
    """Reports to Cachix: frames on two websockets.

    The pong to a ping acknowledges all frames before that ping.
    """

    def __init__(self, peer: Peer, deployment_id: str, agent_id: str, waits: Waits) -> None:
        self.peer, self.id, self.agent_id, self.waits = peer, deployment_id, agent_id, waits
        self.sockets: dict[str, cachix_websocket.WebSocket] = {}

    def send(self, path: str, frames: list[str]) -> None:
        """Deliver text frames on the socket of `path`. Raises Unreachable or Refused."""
        timeout = self.waits.call
        try:
            if path not in self.sockets:
                self.sockets[path] = connect(self.peer, path, self.waits.connect)
            sock = self.sockets[path]
            within(
                timeout,
                lambda: round_trip(sock, timeout, tuple(frames)),
                lambda: hang_up(sock),
            )
        except Error:
            if path in self.sockets:
                self.sockets.pop(path).shutdown()  # type: ignore[no-untyped-call]
            raise

    def status(
        self,
        status: str,
        size: Optional[int],
        reason: Optional[str] = None,
        step: Optional[str] = None,
        outcome: Optional[str] = None,
    ) -> bool:
        """Send the start, the size or the end. The protocol has no field for anything else."""
        command: FromAgent = DeploymentStarted(self.id, utc_now(), size)
        if status != IN_PROGRESS:
            command = DeploymentFinished(self.id, utc_now(), status == SUCCEEDED)
        self.send("/ws-deployment", [encode_from_agent(self.agent_id, command)])
        return True

    def lines(self, index: int, lines: list[str]) -> int:
        """Append lines; the index after them, as Cachix does not tell what it has."""
        if lines:
            self.send(f"/api/v1/deploy/log/{self.id}", encode_lines(lines, utc_now()))
        return index + len(lines)

    def close(self) -> None:
        """Close both websockets with code 1000."""
        for path in sorted(self.sockets):
            close(self.sockets.pop(path))


Channel = Union[HttpChannel, SocketChannel]
