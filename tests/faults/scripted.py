"""A workspace for one world, with the methods of a real one, that sends what the test tells it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Optional

from caches import Cache
from hosts import wait_until
from peer import Answer, Peer, Request

ENDED = ("Succeeded", "Failed")


class Scripted:
    """The part of `live.Workspace` that worlds need. It takes its reports over HTTP."""

    def __init__(self, directory: Path) -> None:
        self.peer = Peer()
        self.peer.reports = "http"
        self.files = Cache(directory)
        self.peer.cache = self.files.wire()
        self.url, self.cache_url = self.peer.url, self.files.url
        self.sent: dict[str, dict[str, Any]] = {}
        # the signature of a deployment: of its agent, path and rollback script
        self.sign: Optional[Callable[[str, str, Optional[str]], dict[str, Any]]] = None

    def close(self) -> None:
        self.peer.stop()
        self.files.close()

    def token(self, kind: str) -> str:
        return f"token-of-the-{kind}-5e1f"

    def push(self, *paths: str) -> None:
        """Do nothing: the cache serves whatever is added to its files."""

    def deploy(self, agent: str, path: str, script: Optional[str] = None) -> str:
        """Send a deployment at once, whatever the agent is doing. Returns its id."""
        index = len(self.sent) + 1
        sent: dict[str, Any] = {"store_path": path, "script": script, "index": index}
        if self.sign is not None:
            sent["signature"] = self.sign(agent, path, script)
        deployment = self.peer.deploy(**sent)
        self.sent[deployment] = sent
        return deployment

    def again(self, deployment: str, **more: Any) -> None:
        """Send a deployment once more, and wait until it has arrived."""
        self.peer.deploy(**self.sent[deployment], id=deployment, **more)
        self.arrived()

    def arrived(self) -> None:
        """Wait until the agent has read all that was sent to it, as it answers a later ping."""
        before = len(self.peer.frames("/ws", "pong"))
        self.peer.agent().send("ping", b"arrived")
        wait_until(lambda: len(self.peer.frames("/ws", "pong")) > before, 10, "a pong")

    def ends(self, deployment: str) -> list[str]:
        """Return the final status of every final report."""
        statuses = [report["status"] for report in self.peer.statuses.get(deployment, [])]
        return [status for status in statuses if status in ENDED]

    def at_last_look(self, do: Callable[[], None]) -> None:
        """Call `do` once, while an agent asks whether a deployment is still wanted."""
        calls = [do]

        def answer(request: Request) -> Answer:
            deployment = request.path.split("/")[-2]
            status = request.json()
            reply = self.peer._take_status(deployment, status)
            # The first report without a size says that the deployment has started.
            bare = status["status"] == "InProgress" and status["closureSize"] is None
            if calls and bare and len(self.peer.statuses[deployment]) > 1:
                calls.pop()()
            return reply

        self.peer.answer(r"^PUT \S+/status", answer)

    def deployment(self, deployment: str) -> dict[str, Any]:
        """Return the newest report; as in a real workspace, a final status stays."""
        if deployment in self.peer.cancelled:
            return {"status": "Cancelled"}
        reports = self.peer.statuses.get(deployment) or [{"status": "Pending", "reason": None}]
        return next((report for report in reports if report["status"] in ENDED), reports[-1])

    def wait(self, deployment: str, timeout: float = 60.0) -> str:
        """Wait for the final status and return it."""

        def final() -> Optional[str]:
            status = str(self.deployment(deployment)["status"])
            return status if status in (*ENDED, "Cancelled") else None

        return str(wait_until(final, timeout, f"the end of {deployment}"))

    def log(self, deployment: str) -> list[str]:
        return self.peer.log(deployment)

    def text(self, deployment: str) -> str:
        return "\n".join(self.log(deployment))
