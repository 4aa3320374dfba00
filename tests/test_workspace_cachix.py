"""The workspace against recorded frames of Cachix's own client, byte for byte (transcripts/).

Only values that can't exist here are replaced: ids of deployments, and invalid store paths.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from workspace_support import (
    OPCODES,
    STORE_PATHS,
    TRANSCRIPTS,
    Connection,
    Peer,
    Server,
    accept_key,
    running,
    wait_for,
)

from cachix_workspace.life import REPEATS

AGENT_TOKEN, CI_TOKEN, NIX_TOKEN = "AGENT-TOKEN", "ACTIVATE-TOKEN", "peer-agent-token"


@pytest.fixture
def peer() -> Iterator[Peer]:
    yield from serve("--public-url=http://localhost")


@pytest.fixture
def impatient() -> Iterator[Peer]:
    """A workspace that sends a silent agent's deployment again after a second."""
    yield from serve(patience=1.0)


def serve(*options: str, **settings: float) -> Iterator[Peer]:
    with running(*options, **settings) as server:
        for kind, secret in (("agent", AGENT_TOKEN), ("agent", NIX_TOKEN), ("activate", CI_TOKEN)):
            server.token(kind, secret)
        yield Peer(server)


def events(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TRANSCRIPTS / f"{name}.jsonl").read_text().splitlines()]


class Replay:
    """Sends the client's frames and expects the answers. `before` is called ahead of each event."""

    def __init__(self, server: Server, before: Callable[[dict[str, Any]], None]) -> None:
        self.server, self.before = server, before
        self.connections: dict[int, Connection] = {}
        self.replaced: dict[str, str] = {}  # our value for a recorded one
        self.requests: dict[int, str] = {}
        self.answers: list[tuple[str, bytes]] = []

    def run(self, recorded: list[dict[str, Any]]) -> None:
        for index, event in enumerate(recorded):
            following = recorded[index + 1] if index + 1 < len(recorded) else {}
            self.before(event)
            if event.get("event") == "http-request":
                has_body = following.get("event") == "http-body"
                self.request(event, following.get("body") if has_body else None)
            elif event.get("event") == "http-response":
                self.response(event)
            elif event.get("dir") == "C->S":
                connection = self.connections[event["conn"]]
                connection.send_frame(OPCODES[event["frame"]], self.payload(event))
            elif event.get("dir") == "S->C":
                self.expect(event)
            elif event.get("event") in ("closed", "tcp-eof"):
                self.connections[event["conn"]].close()

    def translate(self, text: str) -> str:
        for recorded, ours in self.replaced.items():
            text = text.replace(recorded, ours)
        return text

    def payload(self, event: dict[str, Any]) -> bytes:
        if event["frame"] == "close":
            return bytes.fromhex(event["payload"])
        return self.translate(event["payload"]).encode()

    def request(self, event: dict[str, Any], body: str | None) -> None:
        number = event["conn"]
        if number not in self.connections:
            self.connections[number] = Connection(self.server.port)
        raw = self.translate(event["raw"])
        if body is not None:
            body = self.translate(body)
            raw = re.sub(r"Content-Length: \d+", f"Content-Length: {len(body)}", raw)
        self.requests[number] = raw
        self.connections[number].send((raw + (body or "")).encode())

    def response(self, event: dict[str, Any]) -> None:
        connection = self.connections[event["conn"]]
        head = connection.read_head()
        if "Upgrade: websocket" in self.requests[event["conn"]]:
            assert head.startswith("HTTP/1.1 101"), head
            fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:])
            key = re.search("Sec-WebSocket-Key: (.*)\r", self.requests[event["conn"]])
            assert key and f"Sec-WebSocket-Accept: {accept_key(key[1])}\r\n" in head + "\r\n"
            del fields["sec-websocket-accept"]
            assert fields == {"upgrade": "websocket", "connection": "upgrade"}
            return
        assert head.startswith(f"HTTP/1.1 {event['status']}"), head
        self.answers.append((event["body"], connection.read_body(head)))

    def expect(self, event: dict[str, Any]) -> None:
        payload = self.connections[event["conn"]].expect(OPCODES[event["frame"]])
        if event["frame"] != "text":
            assert payload == self.payload(event)
        elif "method" in json.loads(event["payload"]):
            check_contains(json.loads(payload), json.loads(event["payload"]), self.replaced)
        else:
            assert payload == event["payload"].encode()  # a log line reaches the viewer as it was


def check_contains(answer: Any, recorded: Any, replaced: dict[str, str], key: str = "") -> None:
    """Check that all recorded values are there. Ids are ours, and are added to `replaced`."""
    if isinstance(recorded, dict):
        assert set(recorded) <= set(answer), (recorded, answer)
        for name, value in recorded.items():
            check_contains(answer[name], value, replaced, name)
    elif key == "id":
        replaced[recorded] = answer
    elif key in ("publicKey", "index"):
        assert type(answer) is type(recorded)
    else:
        assert answer == recorded, key


def is_deployment(event: dict[str, Any]) -> bool:
    """Whether the recorded workspace sends an agent a deployment."""
    return event.get("dir") == "S->C" and '"Deployment"' in event.get("payload", "")


def deploys(peer: Peer, name: str) -> Callable[[dict[str, Any]], None]:
    """Order each deployment just before the recorded workspace sends it."""

    def before(event: dict[str, Any]) -> None:
        if is_deployment(event):
            order = json.loads(event["payload"])["command"]["contents"]
            scripts = {"x86_64-linux": order["rollbackScript"]} if order["rollbackScript"] else None
            peer.activate({name: order["storePath"]}, scripts)

    return before


def recorded_lines(recorded: list[dict[str, Any]]) -> list[str]:
    """The log lines of a transcript."""
    sent = [event for event in recorded if event.get("dir") == "C->S" and event["frame"] == "text"]
    lines = [event["payload"] for event in sent if "/log/" in event["path"]]
    return [json.loads(line)["line"] for line in lines]


def only(replay: Replay, recorded: list[dict[str, Any]]) -> str:
    """Our id of the deployment that was recorded."""
    payload = next(event["payload"] for event in recorded if is_deployment(event))
    return replay.replaced[json.loads(payload)["command"]["contents"]["id"]]


def test_an_agent_without_cache(peer: Peer) -> None:
    recorded = events("agent-no-cache")
    replay = Replay(peer.server, deploys(peer, "agentg"))
    replay.run(recorded)
    deployment = only(replay, recorded)
    ended = wait_for(lambda: peer.status(deployment)["finishedOn"] and peer.status(deployment))
    assert (ended["status"], ended["closureSize"]) == ("Succeeded", 296)
    assert ended["startedOn"] == "2026-11-23T19:52:31.209451092Z"
    assert ended["finishedOn"] == "2026-11-23T19:52:31.317078708Z"
    assert peer.lines(deployment) == recorded_lines(recorded)


def test_an_agent_with_a_private_cache(peer: Peer) -> None:
    recorded = events("agent-private-cache")
    peer.server.command("cache", "create", "mycache", "--private")
    narinfo = next(e["body"] for e in recorded if e.get("body", "").startswith("StorePath"))
    nar = "nar/0mfmcnccmvpdjgr40nx99b51z3ir8h2qba753gy9pm84v980n722.nar.xz"
    # signed by the recording's key, and so not to be uploaded
    directory = peer.server.data / "cache" / "mycache"
    (directory / "nar").mkdir(parents=True)
    (directory / nar).write_bytes(b"nar")
    (directory / "mazzsmsn03ncr7v0cj38finzvxr6ggzv.narinfo").write_text(narinfo)
    replay = Replay(peer.server, deploys(peer, "agentg"))
    replay.run(recorded)
    assert [body for _, body in replay.answers][1:] == [narinfo.encode(), b"nar"]
    assert b"StoreDir: /nix/store\n" in replay.answers[0][1]
    deployment = only(replay, recorded)
    ended = wait_for(lambda: peer.status(deployment)["finishedOn"] and peer.status(deployment))
    assert (ended["status"], ended["closureSize"]) == ("Succeeded", 405752)
    assert peer.lines(deployment) == recorded_lines(recorded)


def test_the_key_of_a_cache_as_cachix_derives_it(peer: Peer) -> None:
    secret = peer.server.command("cache", "create", "mycache").strip()
    sent = peer.agent("web").expect_text()["command"]["contents"]["cache"]
    assert secret.startswith("mycache.localhost-1:")
    public = base64.b64encode(base64.b64decode(secret.partition(":")[2])[32:]).decode()
    assert sent == {
        "cacheName": "mycache",
        "publicKey": public,
        "isPublic": True,
        "uri": "http://localhost/cache/mycache",
    }
    elsewhere = peer.agent("web", Host="10.0.0.1:8080").expect_text()["command"]["contents"]
    assert elsewhere["cache"]["publicKey"] == f"mycache.localhost-1:{public}"


def lose_the_report(peer: Peer) -> tuple[Replay, str]:
    """An agent whose /ws-deployment broke and never came back; and its deployment."""
    recorded = events("agent-finish-lost")
    down = next(index for index, event in enumerate(recorded) if event.get("status") == 503) - 1
    replay = Replay(peer.server, deploys(peer, "agentl"))
    replay.run(recorded[:down])
    deployment = only(replay, recorded)
    wait_for(lambda: len(peer.lines(deployment)) == len(recorded_lines(recorded)))
    assert peer.lines(deployment) == recorded_lines(recorded)
    status = peer.status(deployment)
    assert (status["status"], status["closureSize"]) == ("InProgress", 296)
    return replay, deployment


def test_an_agent_whose_report_is_lost(impatient: Peer) -> None:
    """A newer deployment ends the lost one, which can't be cancelled."""
    replay, deployment = lose_the_report(impatient)
    cancel = f"/api/v1/deploy/deployment/{deployment}/cancel"
    refused = impatient.http("POST", cancel)
    assert refused.status_code == 409
    assert refused.json()["error"] == "this agent can't be cancelled once it has started"
    following = impatient.activate({"agentl": STORE_PATHS[0]})["agentl"]
    for number in set(replay.connections) - {1}:
        replay.connections[number].close()
    order = replay.connections[1].expect_text()
    assert order["command"]["contents"]["id"] == following
    lost = impatient.status(deployment)
    assert lost["status"] == "Failed" and "gave no sign of life" in lost["reason"]


@pytest.mark.slow
def test_a_lost_deployment_is_sent_again(impatient: Peer) -> None:
    replay, deployment = lose_the_report(impatient)
    for number in set(replay.connections) - {1}:
        replay.connections[number].close()
    for _ in range(REPEATS):
        order = replay.connections[1].expect_text()["command"]["contents"]
        assert (order["id"], order["resumed"]) == (deployment, True)
    assert replay.connections[1].is_silent(1.5)
    assert impatient.report("agentl", deployment, "Succeeded").json()["status"] == "Succeeded"


@pytest.mark.slow
@pytest.mark.long
def test_a_deployment_goes_on_while_the_workspace_restarts(impatient: Peer) -> None:
    """Cachix's agent is back on /ws at once, and its log socket a second later."""
    agent = impatient.registered("web")
    deployment = impatient.activate({"web": STORE_PATHS[0]})["web"]
    assert agent.expect_text()["command"]["contents"]["id"] == deployment
    log = impatient.agent("web", f"/api/v1/deploy/log/{deployment}")
    assert impatient.report("web", deployment, "InProgress").status_code == 200
    impatient.server.stop()
    impatient.server.start()
    agent = impatient.registered("web")
    assert agent.is_silent(0.5)
    log = impatient.agent("web", f"/api/v1/deploy/log/{deployment}")
    assert agent.is_silent(2.5)
    log.close()
    assert agent.expect_text()["command"]["contents"]["id"] == deployment


class CommandReplay(Replay):
    """An `activate` command. Its agent does what the recorded workspace answers next."""

    def __init__(self, peer: Peer, recorded: list[dict[str, Any]]) -> None:
        super().__init__(peer.server, self.act)
        self.peer, self.recorded, self.offset = peer, recorded, 0
        self.replaced = {"/nix/store/aaa": STORE_PATHS[0], "/nix/store/bbb": STORE_PATHS[1]}

    @property
    def deployment(self) -> str:
        return self.replaced[only_id(self.recorded)]

    def act(self, event: dict[str, Any]) -> None:
        if event.get("event") == "http-request" and event["raw"].startswith("GET"):
            status = next_status(self.recorded[self.recorded.index(event) :])
            if status == "Cancelled":
                path = f"/api/v1/deploy/deployment/{self.deployment}/cancel"
                assert self.peer.http("POST", path).status_code == 200
            elif status not in (None, "Pending") and "view=true" not in event["raw"]:
                assert self.peer.report("agent1", self.deployment, status).status_code == 200
        if event.get("dir") == "S->C" and event["frame"] == "text":
            path = f"/api/v1/deploy/log/{self.deployment}?offset={self.offset}"
            self.offset += 1
            options = {"data": event["payload"].encode(), "headers": {"name": "agent1"}}
            answer = self.peer.http("PUT", path, self.peer.agent_token, **options)
            assert answer.status_code == 200

    def response(self, event: dict[str, Any]) -> None:
        super().response(event)
        if "agents" in event.get("body", ""):
            ordered = json.loads(self.answers[-1][1])["agents"]["agent1"]
            self.replaced[only_id(self.recorded)] = ordered["id"]


@pytest.mark.parametrize("name", ["activate-succeeded", "activate-failed", "activate-cancelled"])
def test_the_activate_command(peer: Peer, name: str) -> None:
    peer.registered("agent1")
    recorded = events(name)
    replay = CommandReplay(peer, recorded)
    replay.run(recorded)
    for theirs, ours in replay.answers:
        if "agents" in theirs:
            assert set(json.loads(ours)["agents"]["agent1"]) == {"id", "url"}
        else:
            assert set(json.loads(theirs)) <= set(json.loads(ours))
            assert json.loads(theirs)["status"] == json.loads(ours)["status"]


def only_id(recorded: list[dict[str, Any]]) -> str:
    """The recorded deployment's id."""
    return str(json.loads(recorded[2]["body"])["agents"]["agent1"]["id"])


def next_status(rest: list[dict[str, Any]]) -> str | None:
    bodies = [
        json.loads(e["body"]) for e in rest if e.get("event") == "http-response" and "body" in e
    ]
    return next((body["status"] for body in bodies if "status" in body), None)
