"""The test harness itself, with real Nix."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import closures
import pytest
import websocket
from caches import Cache, Executable, Files, Key, Link, nar
from closures import darwin, home_manager, nixos, plain, script
from hosts import PROJECT, Host, wait_until
from live import Workspace
from machines import Machine
from peer import Peer, headers, transcript


def test_two_hosts_live_side_by_side(make_host: Callable[..., Host], cache: Cache) -> None:
    one, two = make_host("one"), make_host("two")
    first, second = nixos(cache, 1), nixos(cache, 2)
    one.install(cache.url, cache.key.public, first)
    two.install(cache.url, cache.key.public, second)
    assert (one.running(), one.profile(), one.boot_default()) == (first, first, first)
    assert (two.running(), two.profile(), two.boot_default()) == (second, second, second)
    assert not one.valid(second)
    assert boot_id(one) != boot_id(two)


def boot_id(host: Host) -> str:
    return host.output("cat", "/proc/sys/kernel/random/boot_id")


def test_a_host_sees_nothing_of_the_developer(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHIX_AGENT_TOKEN", "the developer's")
    environment = dict(line.split("=", 1) for line in host.output("env").splitlines())
    assert "CACHIX_AGENT_TOKEN" not in environment
    names = ["HOME", "TMPDIR", "STATE_DIRECTORY", "NIX_CONF_DIR"]
    names += ["XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME"]
    assert all(environment[name].startswith(f"{host.directory}/") for name in names)


def test_closing_a_host_kills_everything_in_it(make_host: Callable[..., Host]) -> None:
    host, other = make_host("one"), make_host("two")
    survivor = other.popen(["sleep", "600"])
    code = "trap '' TERM; setsid sleep 600 & echo started; sleep 600; sleep 600"
    program = host.start("sleeper", ["sh", "-c", code])
    program.wait_for("started")
    pids = wait_until(lambda: len(processes := host.processes()) >= 3 and processes)
    host.close()
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}/exe")]
    assert survivor.poll() is None


@pytest.mark.slow
def test_a_killed_test_run_leaves_nothing_behind(tmp_path: Path) -> None:
    code = f"""
import sys, time
sys.path[:0] = [{str(PROJECT / "tests")!r}]
from hosts import Host
host = Host({str(tmp_path / "host")!r})
print(host.popen(["setsid", "sleep", "600"]).pid, flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    name = Path(f"/proc/{pid}/comm")
    wait_until(lambda: name.read_text() == "sleep\n", 10, "the program to start in the host")
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    process.stdout.close()
    wait_until(lambda: not os.path.exists(f"/proc/{pid}/exe"), 10, "the program to end")


def test_a_reboot_keeps_the_disk_alone(host: Host, cache: Cache) -> None:
    first, second = nixos(cache, 1), nixos(cache, 2)
    host.install(cache.url, cache.key.public, first)
    host.fetch(cache.url, cache.key.public, second)
    before = boot_id(host)
    host.output(f"{second}/bin/switch-to-configuration", "test")
    assert host.running() == second
    host.reboot()
    assert host.running() == first and host.valid(second) and host.record() == [("test", second)]
    assert boot_id(host) != before
    assert host.processes() == {}


def test_archives_are_those_of_nix(host: Host, cache: Cache) -> None:
    tree = {
        "empty": "",
        "dir": {},
        "run": Executable("#!/bin/sh\n"),
        "link": Link("dir"),
        "b": b"\0" * 9,
        "B": "x" * 8,
    }
    paths = [
        cache.add("tree", tree),
        cache.add("file", b"\xff\n"),
        script(cache, "ok", "exit 0"),
        nixos(cache, 1),
    ]
    host.fetch(cache.url, cache.key.public, *paths)
    for path in cache.closure(*paths):
        process = host.popen(["nix-store", "--dump", path], stdout=subprocess.PIPE)
        assert process.communicate(timeout=30)[0] == cache.archive(path).read_bytes()
    assert nar(tree) == cache.archive(paths[0]).read_bytes()
    assert host.run(["nix-store", "--verify", "--check-contents"]).returncode == 0
    references = host.output("nix-store", "--query", "--references", paths[3]).split()
    assert len(references) == 5 and set(references) == cache.closure(paths[3])


def test_keys_are_those_of_nix(host: Host, tmp_path: Path) -> None:
    secret, public = tmp_path / "secret", tmp_path / "public"
    files = (str(secret), str(public))
    host.output("nix-store", "--generate-binary-cache-key", "made-by-nix-1", *files)
    assert Key.parse(secret.read_text()).public == public.read_text().strip()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("unsigned", "is not signed by any of the keys"),
        ("wrong-key", "is not signed by any of the keys"),
        ("wrong-hash", "hash mismatch"),
        ("corrupt", "hash mismatch"),
        ("malformed", "bad archive"),
        ("truncated", "is incomplete"),
        ("no-archive", "does not exist in binary cache"),
        ("missing", "don't know how to build these paths"),
    ],
)
def test_nix_refuses_damaged_paths(host: Host, cache: Cache, how: str, message: str) -> None:
    good, bad = plain(cache, "good"), plain(cache, "bad")
    cache.damage(bad, how)
    with pytest.raises(AssertionError, match=message):
        host.fetch(cache.url, cache.key.public, bad)
    host.fetch(cache.url, cache.key.public, good)
    assert host.valid(good) and not host.valid(bad)


def test_the_cache_misbehaves_on_demand(host: Host, cache: Cache) -> None:
    path = plain(cache, 1)
    cache.misbehave(r"/nar/", "503", times=2)
    host.fetch(cache.url, cache.key.public, path)
    assert sorted({request.status for request in cache.requests}) == [200, 503]
    assert cache.count(r"\.narinfo$") == 3
    cache.token = "secret"
    with pytest.raises(AssertionError, match="HTTP error 401|don't know how to build"):
        host.fetch(cache.url, cache.key.public, plain(cache, 2))


def test_home_manager_keeps_its_promise_and_its_flaw(host: Host, cache: Cache) -> None:
    one, two = home_manager(cache, 1), home_manager(cache, 2, middle="exit 3")
    host.fetch(cache.url, cache.key.public, one, two)
    assert host.run([f"{one}/activate"]).returncode == 0
    assert (host.current_home(), host.profile(host.home_profile())) == (one, one)
    assert host.run([f"{two}/activate"]).returncode == 3
    assert (host.current_home(), host.profile(host.home_profile())) == (one, two)
    assert "No change so reusing latest profile generation" in host.output(f"{one}/activate")
    assert host.profile(host.home_profile()) == two


def test_darwin_and_behaviours(host: Host, cache: Cache) -> None:
    kill = closures.kill("sleep 4321")
    system = darwin(cache, 1, before=closures.output(b"\xff\0x\n"), after=kill)
    host.fetch(cache.url, cache.key.public, system)
    victim = host.popen(["sleep", "4321"])
    rebuild = host.popen([f"{system}/sw/bin/darwin-rebuild", "activate"], stdout=subprocess.PIPE)
    assert rebuild.communicate(timeout=30)[0].startswith(b"\xff\0x\n")
    assert host.running() == system
    assert victim.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("status", "code"), [(2, "exit 2"), (100, "exit 100"), (-signal.SIGKILL, "kill -9 $$")]
)
def test_an_activation_that_fails_before_and_after(
    host: Host, cache: Cache, status: int, code: str
) -> None:
    first = nixos(cache, 1)
    before, after = nixos(cache, 2, before=code), nixos(cache, 3, after=code)
    host.install(cache.url, cache.key.public, first)
    host.fetch(cache.url, cache.key.public, before, after)
    assert host.run([f"{before}/bin/switch-to-configuration", "test"]).returncode == status
    assert host.running() == first
    assert host.run([f"{after}/bin/switch-to-configuration", "test"]).returncode == status
    assert host.running() == after
    assert host.record() == [("test", before), ("test", after)]


def _client(peer: Peer, path: str = "/ws", **kw: Any) -> websocket.WebSocket:
    url = peer.url.replace("http", "ws") + path
    client = websocket.create_connection(
        url, timeout=5, suppress_origin=True, redirect_limit=0, **kw
    )
    if client.getstatus() != 101:  # for websocket-client 1.9.0 a redirect is a connection
        raise websocket.WebSocketException(f"HTTP {client.getstatus()}")
    return client


def test_the_peer_speaks_as_the_transcripts_do(peer: Peer) -> None:
    recorded = transcript("agent-no-cache")
    client = _client(peer, header=["name: agentg"])
    client.ping(b"")
    message = json.loads(client.recv())
    deployment_id = peer.deploy("/nix/store/x", fragments=3)
    assert json.loads(client.recv())["command"]["contents"]["id"] == deployment_id
    client.close()
    wait_until(lambda: [event for event in peer.events if event.get("event") == "closed"])
    first = next(json.loads(event["payload"]) for event in recorded if event.get("frame") == "text")
    assert {**message, "id": first["id"]} == first
    frames = [("ping", "C->S"), ("pong", "S->C"), ("close", "C->S"), ("close", "S->C")]
    for kind, direction in frames:
        frame = next(e for e in recorded if (e.get("frame"), e.get("dir")) == (kind, direction))
        assert list(peer.frames("/ws", kind, direction)[0]) == list(frame)
    assert ("name", "agentg") in headers(peer.heads("/ws")[0])


@pytest.mark.parametrize("kind", ["302", "401", "500", "200", "cut", "reset"])
def test_the_peer_refuses_handshakes(peer: Peer, kind: str) -> None:
    peer.misbehave("/ws", kind, times=1)
    with pytest.raises((websocket.WebSocketException, OSError)):
        _client(peer)
    _client(peer).close()


def test_the_peer_is_silent_half_open_and_gone(peer: Peer) -> None:
    peer.misbehave("/ws-silent", "silent")
    peer.misbehave("/ws-half", "half-open")
    peer.misbehave("/ws-code", "close-4001")
    peer.misbehave("/ws-bare", "close")
    with socket.create_connection(("127.0.0.1", peer.port), timeout=0.2) as sock:
        sock.sendall(b"GET /ws-silent HTTP/1.1\r\nUpgrade: websocket\r\n\r\n")
        with pytest.raises(socket.timeout):
            sock.recv(1)
    half = _client(peer, "/ws-half")
    half.settimeout(0.2)
    half.ping()
    with pytest.raises(websocket.WebSocketTimeoutException):
        half.recv()
    assert _client(peer, "/ws-code").recv_data()[1] == b"\x0f\xa1"
    assert _client(peer, "/ws-bare").recv_data()[1] == b""
    peer.stop()
    with pytest.raises(OSError):
        _client(peer)
    peer.restart()
    _client(peer).close()


def test_an_agent_deploys_from_the_live_workspace(machine: Machine) -> None:
    first, second = nixos(machine.files, 1), nixos(machine.files, 2)
    assert machine.deploy(first).status == "Succeeded"
    outcome = machine.deploy(second, script(machine.files, "failing", "echo unhealthy; exit 1"))
    assert (outcome.status, outcome.step) == ("Failed", "rolled-back")
    assert "unhealthy" in outcome.log
    assert machine.host.running() == machine.host.profile() == first


def test_a_workspace_for_one_test(make_workspace: Callable[..., Workspace]) -> None:
    workspace = make_workspace(private=True)
    path = plain(workspace.files, 1)
    workspace.push(path)
    narinfo = f"/cache/main/{workspace.files.narinfo(path).name}"
    status, text = workspace.request("GET", narinfo, token="wrong")
    assert status == 401, text
    assert isinstance(workspace.files, Files) and workspace.stop() == 0


def test_the_summary_of_faults_survives_an_error_at_collection(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text("raise RuntimeError('broken')\n")
    argv = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "--faults"]
    argv += [f"--rootdir={tmp_path}", "-c", str(PROJECT / "setup.cfg"), str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(PROJECT / "tests")}
    result = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "RuntimeError: broken" in result.stdout
    assert "1 cases, 1 failed, 0 skipped" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("option", [[], ["--long"]])
def test_a_case_that_failed_among_others_is_found_again_alone(
    tmp_path: Path, option: list[str]
) -> None:
    """`make test` and `make test-slow` take each so many of the fault cases, and count them."""
    case = "tests/faults/test_endings.py::test_an_orderly_end_in_a_step[nixos-received-{}-often]"
    failed = [case.format(ending) for ending in ("shutdown", "stop-agent")]
    cache = tmp_path / "v/cache/lastfailed"
    cache.parent.mkdir(parents=True)
    cache.write_text(json.dumps(dict.fromkeys(failed, True)))
    select = ["--collect-only", "-q", "--last-failed", "-o", f"cache_dir={tmp_path}"]
    command = [sys.executable, "-m", "pytest", *select, *option]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=PROJECT)
    assert result.stdout.splitlines()[:2] == failed, result.stdout + result.stderr
