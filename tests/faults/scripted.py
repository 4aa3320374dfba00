"""A workspace for one world that sends what the test wants when the test wants it, with the face of a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Optional

from caches import Cache
from hosts import wait_until
from peer import Answer, Peer, Request

ENDED = ("Succeeded", "Failed")


class Scripted:
    """As `live.Workspace`, as far as worlds need that; its reports come over HTTP."""

    def __init__(self, directory: Path) -> None:
        self.peer = Peer()
        self.peer.reports = "http"
        self.files = Cache(directory)
        self.peer.cache = self.files.wire()
        self.url, self.cache_url = self.peer.url, self.files.url
        self.sent: dict[str, dict[str, Any]] = {}

    def close(self) -> None:
        self.peer.stop()
        self.files.close()

    def token(self, kind: str) -> str:
        return f"token-of-the-{kind}-5e1f"

    def push(self, *paths: str) -> None:
        """What is added to the cache's files is there."""

    def deploy(self, agent: str, path: str, script: Optional[str] = None) -> str:
        """Send a deployment at once, whatever the agent does; its id."""
        index = len(self.sent) + 1
        deployment = self.peer.deploy(path, script, index=index)
        self.sent[deployment] = {"store_path": path, "script": script, "index": index}
        return deployment

    def again(self, deployment: str, **more: Any) -> None:
        """Send a deployment once more; it has arrived when this returns."""
        self.peer.deploy(**self.sent[deployment], id=deployment, **more)
        self.arrived()

    def arrived(self) -> None:
        """Wait until the agent has read all that was sent to it: it answers a ping that was sent later."""
        before = len(self.peer.frames("/ws", "pong"))
        self.peer.agent().send("ping", b"arrived")
        wait_until(lambda: len(self.peer.frames("/ws", "pong")) > before, 10, "a pong")

    def ends(self, deployment: str) -> list[str]:
        """The final statuses that were reported, each time."""
        return [
            one["status"]
            for one in self.peer.statuses.get(deployment, [])
            if one["status"] in ENDED
        ]

    def at_last_look(self, do: Callable[[], None]) -> None:
        """Do something once, while an agent waits for the answer whether a deployment is still wanted."""
        left = [do]

        def answer(request: Request) -> Answer:
            deployment = request.path.split("/")[-2]
            status = request.json()
            told = self.peer._take_status(deployment, status)
            bare = (
                status["status"] == "InProgress" and status["closureSize"] is None
            )  # else it tells the size
            if left and bare and len(self.peer.statuses[deployment]) > 1:
                left.pop()()
            return told

        self.peer.answer(r"^PUT \S+/status", answer)

    def deployment(self, deployment: str) -> dict[str, Any]:
        """The last that was reported; as in a real workspace a final status stays."""
        if deployment in self.peer.cancelled:
            return {"status": "Cancelled"}
        told = self.peer.statuses.get(deployment) or [{"status": "Pending", "reason": None}]
        return next((one for one in told if one["status"] in ENDED), told[-1])

    def wait(self, deployment: str, timeout: float = 60.0) -> str:
        """The final status."""
        final = (*ENDED, "Cancelled")
        wait_until(
            lambda: self.deployment(deployment)["status"] in final,
            timeout,
            f"the end of {deployment}",
        )
        return str(self.deployment(deployment)["status"])

    def log(self, deployment: str) -> list[str]:
        return self.peer.log(deployment)

    def text(self, deployment: str) -> str:
        return "\n".join(self.log(deployment))
