"""A host with an agent that is connected to a live workspace, as most end-to-end tests need."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from typing import Any, Optional

from caches import Files
from hosts import Host, Program
from live import Workspace

from cachix_protocol import FAILURE_LINE, SUCCESS_LINE

FINAL = ("succeeded", "failed", "cancelled", "superseded", "rolled-back", "rollback-failed")


@dataclass(frozen=True)
class Outcome:
    """How a deployment ended.

    Status, reason and log are the workspace's; the step is the last one in the machine's journal.
    """

    id: str
    status: str
    reason: Optional[str]
    log: str
    step: str


class Machine:
    """An agent on a host of its own."""

    def __init__(
        self,
        host: Host,
        workspace: Workspace,
        name: str,
        *args: str,
        env: Optional[dict[str, str]] = None,
    ) -> None:
        self.host, self.workspace, self.name = host, workspace, name
        self.args, self.env = args, env
        self.agent: Program = self.start()

    @property
    def files(self) -> Files:
        """The cache for this machine's closures: `nixos(machine.files, 1)` adds one."""
        return self.workspace.files

    def start(self, timeout: float = 30.0) -> Program:
        """Start the agent (again) and wait until it is connected."""
        output = self.host.directory / f"agent-{self.name}.out"
        before = len(output.read_text(errors="replace")) if output.exists() else 0
        token = self.workspace.token("agent")
        self.agent = self.host.agent(self.name, self.workspace.url, token, *self.args, env=self.env)
        self.agent.wait_for(rf"(?s)\A.{{{before}}}.*is connected to", timeout)
        return self.agent

    def order(self, path: str, script: Optional[str] = None, push: bool = True) -> str:
        """Push a closure and its rollback script, and order the deployment. Returns its id."""
        if push:
            self.workspace.push(path, *([script] if script else []))
        return self.workspace.deploy(self.name, path, script)

    def outcome(self, deployment_id: str, timeout: float = 60.0) -> Outcome:
        """Wait for the end of a deployment, and return how it ended."""
        status = self.workspace.wait(deployment_id, timeout)
        self.wait_for_log(deployment_id)
        reason = self.workspace.deployment(deployment_id).get("reason")
        return Outcome(
            deployment_id,
            status,
            reason,
            self.workspace.text(deployment_id),
            self.host.step(deployment_id),
        )

    def wait_for_log(self, deployment_id: str) -> None:
        """Give the log a moment to close, as whoever views it does: its end may overtake it."""
        deadline = time.monotonic() + 3.0
        while time.monotonic() < deadline:
            lines = self.workspace.log(deployment_id)
            if not lines or lines[-1] == SUCCESS_LINE or lines[-1].startswith(FAILURE_LINE):
                return
            time.sleep(0.02)

    def deploy(
        self, path: str, script: Optional[str] = None, push: bool = True, timeout: float = 60.0
    ) -> Outcome:
        """Push a closure, order its deployment, wait for the end, and return how it ended."""
        return self.outcome(self.order(path, script, push), timeout)

    def journals(self) -> list[dict[str, Any]]:
        """Return the journals of all deployments that the machine still has."""
        return [
            json.loads(path.read_text())
            for path in sorted(self.host.state.glob("deployments/*/journal.json"))
        ]

    def check(self) -> None:
        """Check what holds after every test.

        All deployments have ended, a NixOS machine boots the system that it runs, and the token can
        be read nowhere.
        """
        unfinished = [
            (entry["id"], entry["step"]) for entry in self.journals() if entry["step"] not in FINAL
        ]
        assert not unfinished, f"deployments without an end: {unfinished}"
        if self.host.boot_default() is not None:
            assert self.host.running() == self.host.profile() == self.host.boot_default()
        places = self.leaks(self.workspace.token("agent"))
        assert not places, f"the token can be read in {places}"

    def leaks(self, token: str) -> list[str]:
        """Return where the token can be read: files, command lines, environments of children."""
        secret, places = token.encode(), []
        for path in self.host.directory.rglob("*"):
            if "nix/store" in str(path) or not path.is_file() or path.is_symlink():
                continue
            with contextlib.suppress(FileNotFoundError):  # it was just replaced
                if secret in path.read_bytes():
                    places.append(str(path))
        return places + self.host.exposing(token, self.agent.pid)
