"""Our agent at a stand-in for Cachix's backend, compared with recordings of Cachix's own agent."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from typing import Any

import closures
import pytest
from caches import Cache, Files, password
from closures import nixos, plain, script
from hosts import Host, Program, wait_until
from peer import AGENT_ID, GARBAGE, Answer, Peer, Request, headers, message, outline, transcript

TOKEN = "peer-agent-token"


def start(host: Host, peer: Peer, *args: str, url: str = "") -> Program:
    return host.agent("agentg", url or peer.url, TOKEN, *args)


def present(host: Host, cache: Cache, path: str) -> str:
    """Put `path` into the host's store, so that no cache is needed."""
    host.fetch(cache.url, cache.key.public, path)
    return path


def lower(pairs: list[tuple[str, str]]) -> dict[str, str]:
    return {key.lower(): value for key, value in pairs}


def test_a_deployment_is_reported_as_by_cachix(host: Host, cache: Cache, peer: Peer) -> None:
    recorded = transcript("agent-no-cache")
    path = present(host, cache, plain(cache, 1))
    agent = start(host, peer)
    deployment_id = peer.deploy(path)
    assert peer.finished(deployment_id)
    last = ["Successfully activated the deployment."]
    wait_until(lambda: peer.log(deployment_id)[-1:] == last, what="the log's end")
    assert agent.stop() == 0

    assert outline(peer.events, "/ws-deployment") == outline(recorded, "/ws-deployment")
    lines = outline(peer.events, f"/api/v1/deploy/log/{deployment_id}")
    assert set(map(repr, lines)) == set(map(repr, outline(recorded, "/api/v1/deploy/log/")))
    for frame in peer.frames():
        assert (frame["masked"], frame["rsv"], frame["fin"]) == (1, 0, 1), frame
        assert frame.get("close_code", 1000) == 1000, frame
    for record in peer.messages():
        command = record["command"]
        assert record["agent"] == AGENT_ID and command["id"] == deployment_id
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z", command["time"])
    assert peer.frames("/ws")[0]["frame"] == "ping" and not peer.frames("/ws", "text")


def test_handshakes_have_the_headers_of_cachix_and_one_more(
    host: Host, cache: Cache, peer: Peer
) -> None:
    events = transcript("agent-no-cache")
    recorded = [event["raw"] for event in events if event.get("event") == "http-request"]
    path = present(host, cache, plain(cache, 1))
    start(host, peer)
    deployment_id = peer.deploy(path)
    assert peer.finished(deployment_id)
    wait_until(lambda: peer.heads("/api/v1/deploy/log/"), what="the log socket")
    for path in ("/ws", "/ws-deployment", "/api/v1/deploy/log/"):
        heads = [raw for raw in recorded if raw.split(" ")[1].startswith(path)]
        theirs = lower(headers(heads[0]))
        ours = lower(headers(next(raw for raw in peer.heads(path))))
        agent = ours.pop("user-agent")
        assert re.fullmatch(r"cachix-deploy/\S+", agent)
        assert ours.pop("host") == peer.url[7:] and theirs.pop("host")
        assert ours.pop("authorization") == f"Bearer {TOKEN}" and theirs.pop("authorization")
        assert ours == theirs


def test_messages_in_any_frames_with_garbage_between_them(
    host: Host, cache: Cache, peer: Peer
) -> None:
    paths = [present(host, cache, plain(cache, number)) for number in (1, 2)]
    agent = start(host, peer)
    connection = peer.agent()
    messages = [message("Unknown", {}), message("Deployment", {"id": "x"})]
    for garbage in ("", "{", "[]", '{"command":{}}', "9" * 70000, *messages):
        connection.send_text(garbage)
    connection.send("binary", b"\xff\xfe")
    first = peer.deploy(paths[0], fragments=5)
    assert peer.finished(first)
    upper = "00000000-0000-4000-8000-00000000000A"
    contents = {"storePath": paths[1], "id": upper, "index": 2, "new key": [1]}
    connection.send_text(message("Deployment", contents), kind="binary")
    assert peer.finished("00000000-0000-4000-8000-00000000000a")
    assert agent.process.poll() is None and len(peer.heads("/ws")) <= 1


def test_a_deployment_waits_for_the_registration(host: Host, cache: Cache, peer: Peer) -> None:
    peer.registers = False
    path = present(host, cache, plain(cache, 1))
    start(host, peer)
    deployment_id = peer.deploy(path)
    time.sleep(0.5)
    assert not peer.messages()
    peer.register(peer.agent())
    assert peer.finished(deployment_id)


def test_a_lost_report_is_sent_again(host: Host, cache: Cache, peer: Peer) -> None:
    """As in agent-finish-lost, where Cachix's agent gives up after five attempts."""
    system = present(host, cache, nixos(cache, 1, after=closures.wait_for("/run/go-on")))
    start(host, peer)
    deployment_id = peer.deploy(system)
    wait_until(lambda: host.record(), what="the activation")
    peer.misbehave("/ws-deployment", "500", times=2)
    peer.connection("/ws-deployment").reset()
    host.path("/run/go-on").touch()
    assert peer.finished(deployment_id, 90)
    tags = [record["method"] for record in peer.messages(deployment_id)]
    assert tags[0] == "DeploymentStarted" and tags[-1] == "DeploymentFinished"


def serve_files(files: Files, token: str) -> Any:
    """A function that answers requests as a private cache does."""

    def answer(request: Request) -> Answer:
        given = password(request.headers.get("authorization"))
        if request.path != "/nix-cache-info" and given != token:
            return 401, {"error": "private"}
        file = files.directory / request.path.lstrip("/")
        return (200, file.read_bytes()) if file.is_file() else (404, {"error": "not found"})

    return answer


def test_a_private_cache_as_with_cachix(host: Host, cache: Cache, peer: Peer) -> None:
    """A subdomain of the workspace, a key without a name, the agent's token as the password."""
    cache.key.name = "mycache.localhost-1"
    path = plain(cache, 1)
    peer.cache = {"cacheName": "mycache", "publicKey": cache.key.bare, "isPublic": False}
    peer.answer(r"(GET|HEAD) /(nix-cache-info|nar/|\w{32}\.narinfo)", serve_files(cache, TOKEN))
    start(host, peer, url=f"http://localhost:{peer.port}")
    deployment_id = peer.deploy(path)
    assert peer.finished(deployment_id), peer.log(deployment_id)
    assert host.profile() == path
    nars = [lower(headers(head)) for head in peer.heads("/nar/")]
    assert nars and {nar["host"] for nar in nars} == {f"mycache.localhost:{peer.port}"}
    assert not [name for name in os.listdir(host.state) if "netrc" in name]


@pytest.mark.promise(11)
@pytest.mark.parametrize("place", ["localhost", "127.0.0.1"])
def test_a_cache_on_another_host_is_named_and_gets_no_token(
    host: Host, cache: Cache, peer: Peer, place: str
) -> None:
    path, url = plain(cache, 1), f"http://{place}:{peer.port}"
    key = f"{cache.key.name}:{cache.key.bare}"
    peer.cache = {"cacheName": "c", "publicKey": key, "isPublic": False, "uri": url}
    peer.answer(r"(GET|HEAD) /(nix-cache-info|nar/|\w{32}\.narinfo)", serve_files(cache, TOKEN))
    start(host, peer, url=f"http://localhost:{peer.port}")
    deployment_id = peer.deploy(path)
    finished = peer.finished(deployment_id)
    log = [line for line in peer.log(deployment_id) if "than --host:" in line]
    asked = [lower(headers(head)) for head in peer.heads("/") if ".narinfo" in head]
    assert asked and finished == (place == "localhost")
    if place == "localhost":
        assert not log and any("authorization" in each for each in asked)
    else:
        assert log == [f"the cache is on another host than --host: {url}"]
        assert not any("authorization" in each for each in asked)


@pytest.mark.parametrize("code", [1000, None])
def test_it_exits_if_the_workspace_asks_it_to(host: Host, peer: Peer, code: object) -> None:
    agent = start(host, peer)
    peer.agent().close(code)  # type: ignore[arg-type]
    assert agent.wait(12) == 0


@pytest.mark.parametrize("code", [1001, 1011, 1012, 4003])
def test_it_reconnects_after_every_other_close(host: Host, peer: Peer, code: int) -> None:
    agent = start(host, peer)
    first = peer.agent()
    first.close(code)
    wait_until(lambda: len(peer.heads("/ws")) > 1, 75, "another connection")
    assert agent.process.poll() is None
    assert agent.stop() == 0


@pytest.mark.parametrize("kind", ["302", "500", "200", "cut", "reset"])
def test_it_reconnects_after_a_refused_handshake(host: Host, peer: Peer, kind: str) -> None:
    peer.misbehave("/ws$", kind, times=1)
    agent = start(host, peer)
    assert peer.agent(60)
    assert not peer.heads("/elsewhere") and "Traceback" not in agent.text()


@pytest.mark.parametrize("kind", ["garbage", "reset"])
def test_it_reconnects_when_the_connection_breaks(host: Host, peer: Peer, kind: str) -> None:
    agent = start(host, peer, "--verbose")
    first = peer.agent()
    if kind == "garbage":
        first.raw(GARBAGE)
    else:
        first.reset()
    wait_until(lambda: len(peer.heads("/ws")) > 1, 60, "another connection")
    assert agent.process.poll() is None


def test_it_exits_if_its_token_is_refused_at_the_start(host: Host, peer: Peer) -> None:
    peer.misbehave("/ws", "401")
    agent = start(host, peer)
    assert agent.wait(20) == 77
    assert TOKEN not in agent.text() and "error: " in agent.text()


@pytest.mark.promise(10)
@pytest.mark.parametrize("kind", ["silent", "half-open", "no-pong", "500"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.long
def test_it_can_be_stopped_whatever_the_workspace_does(
    host: Host, peer: Peer, kind: str, number: int
) -> None:
    peer.misbehave("/ws", kind)
    agent = start(host, peer)
    wait_until(lambda: peer.heads("/ws"), what="the agent")
    begin = time.monotonic()
    agent.signal(number)
    assert agent.wait(12) == 0
    assert time.monotonic() - begin < 10


def test_reports_over_http(host: Host, cache: Cache, peer: Peer) -> None:
    peer.reports, peer.cache = "http", cache.wire()
    failing = script(cache, "failing", "echo no; exit 1")
    start(host, peer)
    first = peer.deploy(nixos(cache, 1))
    assert peer.finished(first)
    second = peer.deploy(nixos(cache, 2), failing)
    assert not peer.finished(second)
    wait_until(
        lambda: any(line.startswith("Failed to") for line in peer.log(second)), what="the log's end"
    )
    assert not peer.messages() and not peer.heads("/api/v1/deploy/log/x")
    assert [status["status"] for status in peer.statuses[first]][-1] == "Succeeded"
    sizes = [status["closureSize"] for status in peer.statuses[first]]
    assert sizes[0] is None and sizes[-1] > 0
    assert failing in peer.statuses[second][-1]["reason"] and "no" in peer.log(second)
    assert json.loads(json.dumps(peer.statuses[second][-1]))["time"].endswith("Z")
