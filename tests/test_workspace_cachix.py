"""The workspace against what Cachix's own client was recorded to send, byte for byte (transcripts/).

What can't exist here is put in its place, nothing else: ids of deployments, and store paths that are none.
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

AGENT_TOKEN, CI_TOKEN, NIX_TOKEN = "AGENT-TOKEN", "ACTIVATE-TOKEN", "peer-agent-token"


@pytest.fixture
def peer() -> Iterator[Peer]:
    with running("--public-url=http://localhost") as server:
        for kind, secret in (("agent", AGENT_TOKEN), ("agent", NIX_TOKEN), ("activate", CI_TOKEN)):
            server.token(kind, secret)
        yield Peer(server)


def events(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TRANSCRIPTS / f"{name}.jsonl").read_text().splitlines()]


class Replay:
    """Says what the client said, expects what it was answered. `before` hears each event first, to set the stage."""

    def __init__(self, server: Server, before: Callable[[dict[str, Any]], None]) -> None:
        self.server, self.before = server, before
        self.connections: dict[int, Connection] = {}
        self.in_place: dict[str, str] = {}
        self.requests: dict[int, str] = {}
        self.answers: list[tuple[str, bytes]] = []

    def run(self, recorded: list[dict[str, Any]]) -> None:
        for index, event in enumerate(recorded):
            following = recorded[index + 1] if index + 1 < len(recorded) else {}
            self.before(event)
            if event.get("event") == "http-request":
                self.request(
                    event, following.get("body") if following.get("event") == "http-body" else None
                )
            elif event.get("event") == "http-response":
                self.response(event)
            elif event.get("dir") == "C->S":
                self.connections[event["conn"]].send_frame(
                    OPCODES[event["frame"]], self.payload(event)
                )
            elif event.get("dir") == "S->C":
                self.expect(event)
            elif event.get("event") in ("closed", "tcp-eof"):
                self.connections[event["conn"]].close()

    def here(self, text: str) -> str:
        for recorded, ours in self.in_place.items():
            text = text.replace(recorded, ours)
        return text

    def payload(self, event: dict[str, Any]) -> bytes:
        return (
            bytes.fromhex(event["payload"])
            if event["frame"] == "close"
            else self.here(event["payload"]).encode()
        )

    def request(self, event: dict[str, Any], body: str | None) -> None:
        number = event["conn"]
        if number not in self.connections:
            self.connections[number] = Connection(self.server.port)
        raw = self.here(event["raw"])
        if body is not None:
            body = self.here(body)
            raw = re.sub(r"Content-Length: \d+", f"Content-Length: {len(body)}", raw)
        self.requests[number] = raw
        self.connections[number].send((raw + (body or "")).encode())

    def response(self, event: dict[str, Any]) -> None:
        connection = self.connections[event["conn"]]
        head = connection.read_head()
        if "Upgrade: websocket" in self.requests[event["conn"]]:
            assert head.startswith("HTTP/1.1 101"), head
            fields = {
                line.partition(": ")[0].lower(): line.partition(": ")[2]
                for line in head.split("\r\n")[1:]
            }
            key = re.search("Sec-WebSocket-Key: (.*)\r", self.requests[event["conn"]])
            assert key and fields.pop("sec-websocket-accept") == accept_key(key[1])
            assert {name: value.lower() for name, value in fields.items()} == {
                "upgrade": "websocket",
                "connection": "upgrade",
            }
            return
        assert head.startswith(f"HTTP/1.1 {event['status']}"), head
        self.answers.append((event["body"], connection.read_body(head)))

    def expect(self, event: dict[str, Any]) -> None:
        got = self.connections[event["conn"]].expect(OPCODES[event["frame"]])
        if event["frame"] != "text":
            assert got == self.payload(event)
        elif "method" in json.loads(event["payload"]):
            includes(json.loads(got), json.loads(event["payload"]), self.in_place)
        else:
            assert got == event["payload"].encode()  # a log line reaches the viewer as it was


def includes(got: Any, recorded: Any, in_place: dict[str, str], key: str = "") -> None:
    """Whether all that was recorded is there, of the same value; ids are ours, and are remembered."""
    if isinstance(recorded, dict):
        assert set(recorded) <= set(got), (recorded, got)
        for name, value in recorded.items():
            includes(got[name], value, in_place, name)
    elif key == "id":
        in_place[recorded] = got
    elif key in ("publicKey", "index"):
        assert type(got) is type(recorded)
    else:
        assert got == recorded, key


def deploys(peer: Peer, name: str) -> Callable[[dict[str, Any]], None]:
    """Deploy what the recorded workspace sends, when it does."""

    def before(event: dict[str, Any]) -> None:
        if (
            event.get("dir") == "S->C"
            and event["frame"] == "text"
            and '"Deployment"' in event["payload"]
        ):
            order = json.loads(event["payload"])["command"]["contents"]
            scripts = {"x86_64-linux": order["rollbackScript"]} if order["rollbackScript"] else None
            peer.activate({name: order["storePath"]}, scripts)

    return before


def said(recorded: list[dict[str, Any]]) -> list[str]:
    """The log lines of a transcript."""
    mine = [
        e
        for e in recorded
        if e.get("dir") == "C->S" and e["frame"] == "text" and "/log/" in e["path"]
    ]
    return [json.loads(event["payload"])["line"] for event in mine]


def only(replay: Replay, recorded: list[dict[str, Any]]) -> str:
    """The id here of the deployment that was recorded."""
    orders = [
        e for e in recorded if e.get("dir") == "S->C" and '"Deployment"' in e.get("payload", "")
    ]
    return replay.in_place[json.loads(orders[0]["payload"])["command"]["contents"]["id"]]


def test_an_agent_without_cache(peer: Peer) -> None:
    recorded = events("agent-no-cache")
    replay = Replay(peer.server, deploys(peer, "agentg"))
    replay.run(recorded)
    made = only(replay, recorded)
    ended = wait_for(lambda: peer.status(made)["finishedOn"] and peer.status(made))
    assert (ended["status"], ended["closureSize"]) == ("Succeeded", 296)
    assert ended["startedOn"] == "2026-11-23T19:52:31.209451092Z"
    assert ended["finishedOn"] == "2026-11-23T19:52:31.317078708Z"
    assert peer.lines(made) == said(recorded)


def test_an_agent_with_a_private_cache(peer: Peer) -> None:
    recorded = events("agent-private-cache")
    peer.server.command("cache", "create", "mycache", "--private")
    narinfo = next(e["body"] for e in recorded if e.get("body", "").startswith("StorePath"))
    nar = "nar/0mfmcnccmvpdjgr40nx99b51z3ir8h2qba753gy9pm84v980n722.nar.xz"
    for name, content in (
        (nar, b"nar"),
        ("mazzsmsn03ncr7v0cj38finzvxr6ggzv.narinfo", narinfo.encode()),
    ):
        assert peer.http("PUT", f"/cache/mycache/{name}", data=content).status_code == 201
    replay = Replay(peer.server, deploys(peer, "agentg"))
    replay.run(recorded)
    assert [got for _, got in replay.answers][1:] == [narinfo.encode(), b"nar"]
    assert b"StoreDir: /nix/store\n" in replay.answers[0][1]
    made = only(replay, recorded)
    ended = wait_for(lambda: peer.status(made)["finishedOn"] and peer.status(made))
    assert (ended["status"], ended["closureSize"]) == ("Succeeded", 405752)
    assert peer.lines(made) == said(recorded)


def test_the_key_of_a_cache_as_cachix_derives_it(peer: Peer) -> None:
    secret = peer.server.command("cache", "create", "mycache").strip()
    told = peer.agent("web").expect_text()["command"]["contents"]["cache"]
    assert secret.startswith("mycache.localhost-1:")
    public = base64.b64encode(base64.b64decode(secret.partition(":")[2])[32:]).decode()
    assert told == {
        "cacheName": "mycache",
        "publicKey": public,
        "isPublic": True,
        "uri": "http://localhost/cache/mycache",
    }
    elsewhere = peer.agent("web", Host="10.0.0.1:8080").expect_text()["command"]["contents"][
        "cache"
    ]
    assert elsewhere["publicKey"] == f"mycache.localhost-1:{public}"


def test_an_agent_whose_report_is_lost(peer: Peer) -> None:
    """Its /ws-deployment broke and never came back, so nobody said how it ended."""
    recorded = events("agent-finish-lost")
    down = next(index for index, event in enumerate(recorded) if event.get("status") == 503) - 1
    replay = Replay(peer.server, deploys(peer, "agentl"))
    replay.run(recorded[:down])
    made = only(replay, recorded)
    wait_for(lambda: len(peer.lines(made)) == len(said(recorded)))
    assert peer.lines(made) == said(recorded)
    assert (peer.status(made)["status"], peer.status(made)["closureSize"]) == ("InProgress", 296)
    following = peer.activate({"agentl": STORE_PATHS[0]})["agentl"]
    assert peer.http("POST", f"/api/v1/deploy/deployment/{made}/cancel").status_code == 200
    order = replay.connections[1].expect_text()
    assert order["command"]["contents"]["id"] == following


@pytest.mark.parametrize("name", ["activate-succeeded", "activate-failed", "activate-cancelled"])
def test_the_activate_command(peer: Peer, name: str) -> None:
    peer.registered("agent1")
    recorded = events(name)
    offsets: dict[str, int] = {}

    def before(event: dict[str, Any]) -> None:
        """Let the agent do what the recorded workspace tells of next."""
        body = (
            json.loads(event["body"])
            if event.get("event") == "http-response" and "body" in event
            else {}
        )
        if "agents" in body:
            replay.in_place[body["agents"]["agent1"]["id"]] = "?"
        if event.get("event") == "http-request" and event["raw"].startswith("GET"):
            status = next_status(recorded[recorded.index(event) :])
            made = replay.in_place[only_id(recorded)]
            if status == "Cancelled":
                assert (
                    peer.http("POST", f"/api/v1/deploy/deployment/{made}/cancel").status_code == 200
                )
            elif (
                status in ("InProgress", "Succeeded", "Failed") and "view=true" not in event["raw"]
            ):
                assert peer.report("agent1", made, status).status_code == 200
        if event.get("dir") == "S->C" and event["frame"] == "text":
            made = replay.in_place[only_id(recorded)]
            path = f"/api/v1/deploy/log/{made}?offset={offsets.setdefault(made, 0)}"
            offsets[made] += 1
            body = event["payload"].encode()
            assert (
                peer.http(
                    "PUT", path, peer.agent_token, data=body, headers={"name": "agent1"}
                ).status_code
                == 200
            )

    replay = Replay(peer.server, before)
    replay.in_place = {"/nix/store/aaa": STORE_PATHS[0], "/nix/store/bbb": STORE_PATHS[1]}
    response = Replay.response

    def remember(event: dict[str, Any]) -> None:
        response(replay, event)
        if "agents" in event.get("body", ""):
            made = json.loads(replay.answers[-1][1])["agents"]["agent1"]
            replay.in_place[only_id(recorded)] = made["id"]

    replay.response = remember  # type: ignore[method-assign]
    replay.run(recorded)
    for told, got in replay.answers:
        if "agents" in told:
            assert set(json.loads(got)["agents"]["agent1"]) == {"id", "url"}
        else:
            assert set(json.loads(told)) <= set(json.loads(got))
            assert json.loads(told)["status"] == json.loads(got)["status"]


def only_id(recorded: list[dict[str, Any]]) -> str:
    """The recorded deployment's id."""
    return str(json.loads(recorded[2]["body"])["agents"]["agent1"]["id"])


def next_status(rest: list[dict[str, Any]]) -> str | None:
    bodies = [
        json.loads(e["body"]) for e in rest if e.get("event") == "http-response" and "body" in e
    ]
    return next((body["status"] for body in bodies if "status" in body), None)
