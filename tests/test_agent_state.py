"""An agent's reports on the state of its machine, their times, and that nothing waits for them."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any, Callable

import pytest
from caches import Cache, Files, Link
from closures import darwin, home_manager, nixos, plain
from hosts import CURRENT_SYSTEM, SYSTEM, Host, Program, wait_until
from machines import Machine
from peer import AGENT_ID, Answer, Peer, Request

import cachix_report_state
from activate import journal
from activate.agent.present import needs_reboot, waits_for_boot
from cachix_protocol import __version__
from cachix_report_state import MachineState
from cachix_workspace import agents
from cachix_workspace.database import open_database
from cachix_workspace.settings import Settings

PATH = f"/api/v1/deploy/agent/{AGENT_ID}/state"
BOOTED = "/run/booted-system"


class Listener:
    """A workspace of ours, in place of a Cachix's: what the agent has told it, in order."""

    def __init__(self, peer: Peer, status: int = 200) -> None:
        self.peer, self.status = peer, status
        self.told: list[dict[str, Any]] = []
        peer.reports = "http"
        peer.answer(f"PUT {PATH}", self.answer)

    def answer(self, request: Request) -> Answer:
        self.told.append(request.json())
        return self.status, {}

    def wait(self, count: int = 1, **wanted: Any) -> dict[str, Any]:
        """Wait for that many messages, the last of which says what is wanted."""

        def found() -> bool:
            return len(self.told) >= count and wanted.items() <= self.told[-1].items()

        wait_until(found, what=f"{count} messages and {wanted}, not {self.told}")
        return self.told[-1]


def start(host: Host, peer: Peer, *args: str, look: float = 0.2) -> Program:
    waits = json.dumps({"backoff": 0.05, "slowest": 0.2, "look": look})
    return host.agent("web", peer.url, "T", *args, env={"CACHIX_DEPLOY_WAITS": waits})


def install(host: Host, cache: Cache, path: str) -> str:
    host.install(cache.url, cache.key.public, path)
    return path


def present(host: Host, cache: Cache, path: str) -> str:
    host.fetch(cache.url, cache.key.public, path)
    return path


def point(host: Host, link: str, path: str) -> None:
    """Let a link lead to a path, as a tool does."""
    own = host.path(link)
    os.symlink(path, f"{own}.new")
    os.rename(f"{own}.new", own)


def with_kernel(files: Files, version: int, kernel: int) -> str:
    names = ("kernel", "initrd", "kernel-modules")
    parts = {name: files.add(f"{name}-{kernel}", f"{name} {kernel}\n") for name in names}
    return nixos(files, version, extra={name: Link(path) for name, path in parts.items()})


# --- when -----------------------------------------------------------------------------------------


def test_after_registering_and_after_the_report_of_each_end(
    host: Host, cache: Cache, peer: Peer
) -> None:
    """And not in between, nor twice the same."""
    old = install(host, cache, nixos(cache, 1))
    new = present(host, cache, nixos(cache, 2))
    failing = present(host, cache, nixos(cache, 3, after="exit 2"))
    listener = Listener(peer)
    agent = start(host, peer, look=60)
    reports = listener.wait()
    since = reports.pop("runningSince")
    assert reports == {
        "running": old,
        "profile": SYSTEM,
        "kind": "nixos",
        "agentVersion": __version__,
        "rebootNeeded": False,
    }
    changed = os.lstat(host.path(CURRENT_SYSTEM)).st_mtime
    assert since == time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime(changed))
    deployment = peer.deploy(new)
    assert peer.finished(deployment)
    listener.wait(2, running=new)
    assert [report["status"] for report in peer.statuses[deployment]][-1] == "Succeeded"
    bodies = [event["body"] for event in peer.events if event.get("event") == "http-body"]
    states = [place for place, body in enumerate(bodies) if '"rebootNeeded"' in body]
    others = [place for place, body in enumerate(bodies) if '"rebootNeeded"' not in body]
    assert states[0] < min(others) and max(others) < states[1]
    assert not peer.finished(peer.deploy(failing))
    listener.wait(3, running=new)  # another moment: it was rolled back, thus activated anew
    assert len(listener.told) == 3
    assert agent.stop() == 0


def test_what_was_changed_by_hand(host: Host, cache: Cache, peer: Peer) -> None:
    old = install(host, cache, nixos(cache, 1))
    new = present(host, cache, nixos(cache, 2))
    listener = Listener(peer)
    start(host, peer)
    listener.wait(running=old)
    host.output(f"{new}/bin/switch-to-configuration", "test")
    listener.wait(2, running=new, profile=SYSTEM)
    host.output(f"{old}/bin/switch-to-configuration", "test")
    listener.wait(3, running=old)
    assert len(listener.told) == 3


def test_again_on_each_connection(host: Host, cache: Cache, peer: Peer) -> None:
    install(host, cache, nixos(cache, 1))
    listener = Listener(peer)
    start(host, peer, look=60)
    listener.wait()
    peer.agent().reset()
    listener.wait(2)
    assert listener.told[0] == listener.told[1]


# --- workspaces that know nothing of it -----------------------------------------------------------


def test_an_older_workspace_is_asked_once_a_connection(
    host: Host, cache: Cache, peer: Peer
) -> None:
    install(host, cache, nixos(cache, 1))
    path = present(host, cache, nixos(cache, 2))
    listener = Listener(peer, status=404)
    agent = start(host, peer)
    listener.wait()
    assert peer.finished(peer.deploy(path))
    time.sleep(1.5)  # several looks
    assert len(listener.told) == 1
    peer.agent().reset()
    listener.wait(2, running=path)
    assert "error" not in agent.text() and "404" not in agent.text()


def test_cachix_is_never_asked(host: Host, cache: Cache, peer: Peer) -> None:
    install(host, cache, nixos(cache, 1))
    path = present(host, cache, nixos(cache, 2))
    listener = Listener(peer)
    peer.reports = None
    start(host, peer)
    assert peer.finished(peer.deploy(path))
    time.sleep(1.5)
    assert listener.told == []


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 403, 429, 500, 503])
def test_a_failure_is_tried_again_and_nobody_hears_of_it(
    host: Host, cache: Cache, peer: Peer, status: int
) -> None:
    old = install(host, cache, nixos(cache, 1))
    listener = Listener(peer, status)
    agent = start(host, peer)
    listener.wait(3)
    listener.status = 200
    count = len(listener.told)
    listener.wait(count + 1, running=old)
    time.sleep(1.5)
    assert len(listener.told) <= count + 2
    assert agent.text().count("\n") == 1, agent.text()  # that it is connected


def test_a_deployment_waits_for_no_answer(host: Host, cache: Cache, peer: Peer) -> None:
    install(host, cache, nixos(cache, 1))
    path = present(host, cache, nixos(cache, 2))
    peer.reports = "http"
    begun, go_on = threading.Event(), threading.Event()

    def stall(request: Request) -> Answer:
        begun.set()
        go_on.wait(60)
        return 200, {}

    peer.answer(f"PUT {PATH}", stall)
    start(host, peer)
    assert begun.wait(30)
    deployment = peer.deploy(path)
    assert peer.finished(deployment)
    last = ["Successfully activated the deployment."]
    wait_until(lambda: peer.log(deployment)[-1:] == last, what="the log's end")
    go_on.set()


def test_it_waits_until_the_reports_have_arrived(host: Host, cache: Cache, peer: Peer) -> None:
    install(host, cache, nixos(cache, 1))
    path = present(host, cache, nixos(cache, 2))
    listener = Listener(peer)
    start(host, peer)
    listener.wait()
    fault = peer.misbehave("/api/v1/deploy/(deployment|log)/", "503")
    deployment = peer.deploy(path)
    wait_until(lambda: host.step(deployment) == "succeeded", what="the end")
    time.sleep(1.5)
    assert len(listener.told) == 1
    peer.faults.remove(fault)
    listener.wait(2, running=path)
    assert peer.finished(deployment)


# --- what -----------------------------------------------------------------------------------------


def test_a_reboot_is_needed_for_another_kernel(host: Host, cache: Cache, peer: Peer) -> None:
    old = install(host, cache, with_kernel(cache, 1, kernel=1))
    same = present(host, cache, with_kernel(cache, 2, kernel=1))
    other = present(host, cache, with_kernel(cache, 3, kernel=2))
    point(host, BOOTED, old)
    listener = Listener(peer)
    start(host, peer)
    assert listener.wait(running=old)["rebootNeeded"] is False
    assert peer.finished(peer.deploy(same))
    listener.wait(running=same, rebootNeeded=False)
    assert peer.finished(peer.deploy(other))
    listener.wait(running=other, rebootNeeded=True)
    point(host, BOOTED, other)  # as after the reboot
    listener.wait(running=other, rebootNeeded=False)
    host.output("nix-env", "--profile", SYSTEM, "--set", same)  # `nixos-rebuild boot`
    listener.wait(running=other, rebootNeeded=True)


def test_a_reboot_is_needed_for_what_can_only_be_booted(
    host: Host, cache: Cache, peer: Peer
) -> None:
    old = install(host, cache, nixos(cache, 1))
    new = present(host, cache, nixos(cache, 2, before="exit 100"))
    listener = Listener(peer)
    start(host, peer, "--on-reboot-needed=boot")
    listener.wait(running=old, rebootNeeded=False)
    assert peer.finished(peer.deploy(new))
    listener.wait(running=old, rebootNeeded=True)
    host.reboot()
    start(host, peer)
    listener.wait(running=new, rebootNeeded=False)


def deploy_home(host: Host, cache: Cache) -> tuple[str, str]:
    Path(host.environment["XDG_STATE_HOME"], "nix/profiles").mkdir(parents=True)
    return present(host, cache, home_manager(cache, 1)), host.home_profile()


@pytest.mark.parametrize(
    ("kind", "prepare", "args"),
    [
        ("darwin", lambda host, cache: (present(host, cache, darwin(cache, 1)), SYSTEM), ()),
        ("home-manager", deploy_home, ("home-manager",)),
        (
            "profile",
            lambda host, cache: (
                present(host, cache, plain(cache, 1)),
                "/nix/var/nix/profiles/tools",
            ),
            ("tools",),
        ),
    ],
)
def test_each_kind_of_profile(
    host: Host,
    cache: Cache,
    peer: Peer,
    kind: str,
    prepare: Callable[[Host, Cache], tuple[str, str]],
    args: tuple[str, ...],
) -> None:
    """First as it is found, without any record of a deployment, then by that record."""
    path, profile = prepare(host, cache)
    listener = Listener(peer)
    agent = start(host, peer, *args)
    nothing = dict.fromkeys(("running", "runningSince", "profile", "kind"))
    listener.wait(**nothing, rebootNeeded=False)
    assert peer.finished(peer.deploy(path))
    wanted = {"running": path, "profile": profile, "kind": kind, "rebootNeeded": False}
    listener.wait(**wanted)
    agent.stop()
    for file in host.state.glob("deployments/*/journal.json"):
        file.unlink()
    before = len(listener.told)
    start(host, peer, *args)
    listener.wait(before + 1, **wanted)


def test_a_profile_of_somebody_else_is_not_looked_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An agent of a user, for a home, on a NixOS machine: it could not change the system."""
    system = tmp_path / "store" / "system"
    system.mkdir(parents=True)
    (system / "nixos-version").touch()
    monkeypatch.setattr("activate.nix.PROFILES", str(tmp_path))
    monkeypatch.setattr("activate.nix.STORE", str(tmp_path / "store"))
    (tmp_path / "system").symlink_to(system)
    state = cachix_report_state.look(str(tmp_path / "state"), "web", None)
    assert (state.kind, state.profile) == ("nixos", str(tmp_path / "system"))
    monkeypatch.setattr("os.access", lambda path, mode: not str(path).startswith(str(tmp_path)))
    assert cachix_report_state.look(str(tmp_path / "state"), "web", None) == MachineState()


def test_a_container_has_no_kernel_to_compare(tmp_path: Path) -> None:
    booted, system = tmp_path / "booted", tmp_path / "system"
    booted.mkdir()
    system.mkdir()
    assert not needs_reboot(str(system), str(system), str(booted))
    assert not needs_reboot(str(system), str(system), str(tmp_path / "missing"))
    for name in ("kernel", "initrd", "kernel-modules"):
        (system / name).symlink_to(f"/nix/store/{name}-2")
    assert not needs_reboot(str(system), str(system), str(booted))
    for name in ("kernel", "initrd", "kernel-modules"):
        (booted / name).symlink_to(f"/nix/store/{name}-1")
    assert needs_reboot(str(system), str(system), str(booted))
    assert not needs_reboot(str(tmp_path / "gone"), str(tmp_path / "gone"), str(booted))


@pytest.mark.parametrize(
    ("steps", "boot", "waits"),
    [
        ([], "now", False),
        ([(journal.SUCCEEDED, "reboot-needed")], "now", True),
        ([(journal.SUCCEEDED, "reboot-needed")], "before", False),
        ([(journal.FAILED, None), (journal.SUCCEEDED, "reboot-needed")], "now", True),
        ([(journal.FAILED, "reboot-needed")], "now", False),
        ([(journal.SUCCEEDED, None), (journal.SUCCEEDED, "reboot-needed")], "now", False),
    ],
)
def test_which_deployments_wait_for_a_boot(
    monkeypatch: pytest.MonkeyPatch, steps: list[tuple[str, str]], boot: str, waits: bool
) -> None:
    monkeypatch.setattr("activate.machine.boot_id", lambda: "now")
    records = [
        journal.Record("1", 1, "web", "h", "/nix/store/x", step=step, outcome=outcome, boot_id=boot)
        for step, outcome in steps
    ]
    assert waits_for_boot(records) is waits


# --- with a workspace of ours ---------------------------------------------------------------------


def test_the_workspace_knows_what_the_machine_runs(
    make_machine: Callable[..., Machine], make_host: Callable[..., Host]
) -> None:
    machine = make_machine(env={"CACHIX_DEPLOY_WAITS": '{"look": 0.2}'}, check=False)
    database = open_database(Settings(machine.workspace.data))

    def running() -> tuple[Any, ...]:
        with database.read() as connection:
            row = agents.find(connection, machine.name)
        return row.running, row.deployed, row.kind

    first, second = plain(machine.files, 1), plain(machine.files, 2)
    assert machine.deploy(first).status == "Succeeded"
    wait_until(lambda: running() == (first, first, "profile"), what="the first path")
    machine.workspace.push(second)
    url, key = machine.workspace.cache_url, machine.files.key.public
    machine.host.fetch(url, key, second)
    machine.host.output("nix-env", "--profile", SYSTEM, "--set", second)
    wait_until(lambda: running() == (second, first, "profile"), what="the change by hand")
    machine.agent.wait_for(f"warning: {second} runs and {SYSTEM} is {second}, but {first} was")
    database.close()
