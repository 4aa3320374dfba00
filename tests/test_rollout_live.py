"""A fleet of fifty agents at a real workspace: five are real, on hosts of their own."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

import pytest
import websocket
from closures import plain
from hosts import command, wait_until
from live import Workspace
from machines import Machine

import cachix_connection
from cachix_channels import HttpChannel
from cachix_connection import Peer
from cachix_protocol import FAILURE_LINE, SUCCESS_LINE, Deployment, Error, decode_to_agent

COUNT, REAL = 50, 5
REASON = "the rollback script ended with status 1"


class Actor:
    """A scripted agent: each deployment succeeds, but for that of the path it can't run."""

    def __init__(self, workspace: Workspace, token: str, name: str) -> None:
        self.name, self.bad = name, ""
        self.peer = Peer.create(workspace.url, token, name)
        self.socket = cachix_connection.connect(self.peer, "/ws")
        self.socket.settimeout(None)
        threading.Thread(target=self.act, daemon=True).start()

    def act(self) -> None:
        decode_to_agent(self.socket.recv())
        while True:
            try:
                deployment = decode_to_agent(self.socket.recv())
            except (OSError, Error, websocket.WebSocketException):
                return
            assert isinstance(deployment, Deployment)
            channel = HttpChannel(self.peer, deployment.id)
            channel.status("InProgress", None)
            is_bad = deployment.store_path == self.bad
            end = f"{FAILURE_LINE} {REASON}" if is_bad else SUCCESS_LINE
            if is_bad:
                channel.status("Failed", 1, REASON, outcome="rolled-back")
            else:
                channel.status("Succeeded", 1, outcome="succeeded")
            channel.lines(0, [f"{self.name} activates", end])


class Stage:
    """The workspace with its fleet, and the command that deploys to it."""

    def __init__(self, workspace: Workspace, machines: list[Machine], actors: list[Actor]) -> None:
        self.workspace, self.machines, self.actors = workspace, machines, actors
        self.old, self.new = (plain(workspace.files, version) for version in (1, 2))
        workspace.push(self.old, self.new)

    @property
    def names(self) -> list[str]:
        """The real agents stand among the others: one in each batch of five."""
        actors = iter(self.actors)
        groups = [
            [machine.name, *(next(actors).name for _ in range(4))] for machine in self.machines
        ]
        return [name for group in groups for name in group] + [actor.name for actor in actors]

    def activate(
        self, path: str, *words: str, names: Optional[list[str]] = None, status: int = 0
    ) -> dict[str, Any]:
        """Deploy a path to all agents, and return the summary."""
        spec = self.workspace.directory / "deploy.json"
        spec.write_text(json.dumps({"agents": dict.fromkeys(names or self.names, path)}))
        argv = [*command("cachix-deploy"), "activate", str(spec), "--json", *words]
        argv += [f"--host={self.workspace.url}", "--timeout=90"]
        token = self.workspace.token("activate")
        env = {**self.workspace.environment, "CACHIX_ACTIVATE_TOKEN": token}
        result = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=110)
        assert result.returncode == status, result.stderr + result.stdout[-4000:]
        return dict(json.loads((result.stdout.splitlines() or ["{}"])[-1]))

    def running(self) -> dict[str, str]:
        """Return the path that each agent runs, as the workspace says."""
        status, answer = self.workspace.request("GET", "/api/v1/agents?limit=1000")
        assert status == 200, answer
        return {agent["name"]: agent["running"] for agent in answer["agents"]}


@pytest.fixture
def stage(
    make_workspace: Callable[..., Workspace], make_host: Callable[..., Any]
) -> Iterator[Stage]:
    workspace = make_workspace()
    token = workspace.token("agent")
    actors = [Actor(workspace, token, f"actor-{n:02}") for n in range(COUNT - REAL)]
    machines = [Machine(make_host(f"host-{n}"), workspace, f"real-{n}") for n in range(REAL)]
    yield Stage(workspace, machines, actors)
    for machine in machines:
        machine.check()
    for actor in actors:
        cachix_connection.hang_up(actor.socket)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_fifty_agents_are_rolled_out_by_batches_and_taken_back(stage: Stage) -> None:
    first = stage.activate(stage.old, "--batch=50%")
    assert len(first["succeeded"]) == COUNT and set(stage.running().values()) == {stage.old}

    bad = stage.actors[9]  # in the third batch of five
    bad.bad = stage.new
    words = ("--canary=real-0", "--batch=10%", "--rollback-succeeded")
    summary = stage.activate(stage.new, *words, status=1)
    assert summary["failed"] == [bad.name] and summary["stopped"].endswith(f": {REASON}")
    done = summary["succeeded"]
    assert sorted(summary["rolledBack"]) == sorted(done) and "real-0" in done and "real-2" in done
    assert len(done) + 1 + len(summary["notPosted"]) == COUNT
    assert set(stage.running().values()) == {stage.old}
    for machine in stage.machines[:3]:
        assert Path(str(machine.host.profile())).name == Path(stage.old).name

    bad.bad = ""
    summary = stage.activate(stage.new, *words)
    assert len(summary["succeeded"]) == COUNT and set(stage.running().values()) == {stage.new}
    summary = stage.activate(stage.new, *words)
    assert len(summary["unchanged"]) == COUNT and summary["succeeded"] == []
    status, answer = stage.workspace.request("GET", "/api/v1/runs")
    assert status == 200 and len(answer["runs"]) == 4  # one command line is one run, and a way back


@pytest.mark.long
def test_labels_and_a_token_for_some_agents(make_workspace: Callable[..., Workspace]) -> None:
    workspace = make_workspace()
    actors = [Actor(workspace, workspace.token("agent"), name) for name in ("web", "db", "mail")]
    stage = Stage(workspace, [], actors)
    wait_until(lambda: len(stage.running()) == 3)
    for name in ("web", "db"):
        path = f"/api/v1/agents/{name}"
        assert workspace.request("PATCH", path, {"labels": ["staging"]})[0] == 200
    names = ["web", "db", "mail"]
    assert stage.activate(stage.old, "--on=staging", names=names)["succeeded"] == ["web", "db"]
    workspace.tokens["activate"] = workspace.token("activate", "--agents=web,mail")
    summary = stage.activate(stage.new, "--unknown=skip", names=names)
    assert summary["succeeded"] == ["web", "mail"] and summary["unknown"] == ["db"]
    stage.activate(stage.new, names=names, status=77)
