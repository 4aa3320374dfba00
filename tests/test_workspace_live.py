"""The workspace's protocol, on a real server over real sockets."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator

import pytest
import requests
from workspace_support import (
    BINARY,
    CLOSE,
    DEADLINE,
    OURS,
    PING,
    PONG,
    STORE_PATHS,
    TEXT,
    Connection,
    Peer,
    handshake,
    open_socket,
    running,
    wait_for,
)

from cachix_protocol import (
    AgentRegistered,
    Deployment,
    DeploymentFinished,
    DeploymentStarted,
    decode_to_agent,
    encode_from_agent,
)

RUNNING, S, F, C = "InProgress", "Succeeded", "Failed", "Cancelled"
SUCCESS = "Successfully activated the deployment."


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with running() as server:
        yield Peer(server)


@pytest.fixture
def name() -> str:
    return f"agent-{uuid.uuid4()}"


def deployment_of(connection: Connection) -> Deployment:
    command = decode_to_agent(connection.expect(TEXT))
    assert isinstance(command, Deployment), command
    return command


def test_a_deployment_from_ci_to_its_end(peer: Peer, name: str) -> None:
    agent = peer.agent(name)
    registered = decode_to_agent(agent.expect(TEXT))
    assert (
        isinstance(registered, AgentRegistered)
        and registered.reports == "http"
        and registered.cache is None
    )
    scripts = {"x86_64-linux": STORE_PATHS[1], "aarch64-darwin": STORE_PATHS[2]}
    deployment = peer.activate({name: STORE_PATHS[0]}, scripts)[name]
    assert deployment_of(agent) == Deployment(STORE_PATHS[0], deployment, 1, STORE_PATHS[1])
    waiting = peer.status(deployment)
    assert waiting["status"] == "Pending" and waiting["startedOn"] is None and waiting["index"] == 1
    viewer = peer.view(deployment)
    assert peer.report(name, deployment, RUNNING).json()["status"] == RUNNING
    assert peer.report(name, deployment, RUNNING, closureSize=296).json()["closureSize"] == 296
    assert peer.log(name, deployment, 0, ["$ nix-store -r", "ä\0"]).json() == {"next": 2}
    assert [viewer.expect_text()["line"] for _ in range(2)] == ["$ nix-store -r", "ä\0"]
    assert peer.report(name, deployment, S, reason="fine").status_code == 200
    assert peer.log(name, deployment, 2, [SUCCESS]).json() == {"next": 3}
    assert viewer.expect_text()["line"] == SUCCESS
    assert viewer.expect_close(1) == 1000
    ended = peer.status(deployment)
    assert (ended["status"], ended["closureSize"], ended["reason"]) == (S, 296, "fine")
    assert ended["startedOn"] == ended["finishedOn"] == "2026-11-24T01:02:03.000004Z"
    assert peer.report(name, deployment, S).status_code == 200
    refused = peer.report(name, deployment, F)
    assert refused.status_code == 409 and refused.json()["status"] == S
    late = peer.view(deployment)
    assert [late.expect_text()["line"] for _ in range(3)] == ["$ nix-store -r", "ä\0", SUCCESS]
    assert late.expect_close(1) == 1000


def test_version_1_of_activate_answers_urls(peer: Peer, name: str) -> None:
    peer.registered(name)
    answer = peer.http("POST", "/api/v1/deploy/activate?", json={"agents": {name: STORE_PATHS[0]}})
    url = answer.json()["agents"][name]
    assert url == f"{peer.server.url}/agents/{name}/deployments/1"
    page = requests.get(url, auth=("", peer.ci_token), timeout=DEADLINE)
    assert (
        page.json()["storePath"] == STORE_PATHS[0]
        and requests.get(url, timeout=DEADLINE).status_code == 401
    )


def test_reports_by_websocket(peer: Peer, name: str) -> None:
    agent = peer.registered(name)
    deployment = peer.activate({name: STORE_PATHS[0]})[name]
    assert deployment_of(agent).rollback_script is None
    log = peer.agent(name, f"/api/v1/deploy/log/{deployment}")
    report = peer.agent(name, "/ws-deployment")
    for junk in ("{", "[]", '{"command":{"tag":"X"}}'):
        report.send_text(junk)
        log.send_text(junk)
    for size in (1 << 70, -5):
        started = DeploymentStarted(deployment, "2026-11-24T01:00:00Z", size)
        report.send_text(encode_from_agent(str(uuid.uuid4()), started))
    report.send_frame(TEXT, b"\xff\xfe")  # not UTF-8: this one ends the connection
    assert report.expect_close() == 1007
    report = peer.agent(name, "/ws-deployment")
    frame = encode_from_agent(
        str(uuid.uuid4()), DeploymentStarted(deployment, "2026-11-24T01:00:00Z")
    ).encode()
    report.send_frame(TEXT, frame[:20], final=False)
    report.send_frame(0, frame[20:])
    wait_for(lambda: peer.status(deployment)["status"] == RUNNING)
    assert peer.status(deployment)["closureSize"] is None
    log.send_text({"line": "one", "time": "T", "more": 1})
    log.send_frame(BINARY, b'{"line":"two","time":"T"}')
    finished = encode_from_agent(
        str(uuid.uuid4()), DeploymentFinished(deployment, "2026-11-24T01:01:00Z", False)
    )
    report.send_text(finished)
    wait_for(lambda: peer.status(deployment)["status"] == F)
    log.send_text({"line": "Failed to activate the deployment. x", "time": "T"})
    log.send_frame(CLOSE, b"\x03\xe8")
    assert log.expect_close() == 1000
    lines = wait_for(lambda: len(peer.lines(deployment)) == 3 and peer.lines(deployment))
    assert lines == ["one", "two", "Failed to activate the deployment. x"]


def test_a_reachability_check_changes_nothing(peer: Peer, name: str) -> None:
    agent = peer.registered(name)
    check = peer.agent(name, "/ws-deployment")
    check.send_frame(PING, b"mark")
    assert check.expect(PONG) == b"mark"
    check.send_frame(CLOSE, b"\x03\xe8")
    assert check.expect_close() == 1000
    agent.send_frame(PING, b"")
    assert agent.expect(PONG) == b"" and agent.is_silent()


def test_an_offline_agent_gets_the_newest(peer: Peer, name: str) -> None:
    agent = peer.registered(name)
    agent.close()
    first, second = (peer.activate({name: path})[name] for path in STORE_PATHS[:2])
    assert (
        peer.status(first)["status"] == C
        and peer.status(first)["reason"] == "replaced by deployment 2"
    )
    agent = peer.registered(name)
    assert deployment_of(agent).id == second and agent.is_silent()
    again = peer.registered(name)
    assert deployment_of(again).id == second  # nothing was marked by sending it


def test_one_at_a_time_and_resumed(peer: Peer, name: str) -> None:
    agent = peer.registered(name, **OURS)
    first = peer.activate({name: STORE_PATHS[0]})[name]
    assert deployment_of(agent).id == first
    peer.report(name, first, RUNNING)
    second = peer.activate({name: STORE_PATHS[1]})[name]
    third = peer.activate({name: STORE_PATHS[2]})[name]
    assert agent.is_silent() and peer.status(second)["status"] == C
    agent.close()
    agent = peer.registered(name, **OURS)
    resumed = deployment_of(agent)
    assert (resumed.id, resumed.resumed) == (first, True) and agent.is_silent()
    peer.report(name, first, F)
    assert deployment_of(agent) == Deployment(STORE_PATHS[2], third, 3)


def test_an_agent_at_its_log_is_not_reminded(peer: Peer, name: str) -> None:
    agent = peer.registered(name)
    deployment = peer.activate({name: STORE_PATHS[0]})[name]
    assert deployment_of(agent).id == deployment
    log = peer.agent(name, f"/api/v1/deploy/log/{deployment}")
    log.send_text({"line": "one", "time": "T"})
    wait_for(lambda: peer.lines(deployment))
    peer.report(name, deployment, RUNNING)
    assert peer.registered(name).is_silent()
    log.close()


def test_cancellation(peer: Peer, name: str) -> None:
    agent = peer.registered(name)
    first = peer.activate({name: STORE_PATHS[0]})[name]
    cancel = f"/api/v1/deploy/deployment/{first}/cancel"
    assert peer.http("POST", cancel, peer.agent_token).status_code == 403
    viewer = peer.view(first)
    assert peer.http("POST", cancel).json()["status"] == C
    assert viewer.expect_close(1) == 1000
    assert deployment_of(agent).id == first
    second = peer.activate({name: STORE_PATHS[1]})[name]
    assert deployment_of(agent).id == second
    peer.report(name, second, RUNNING, step="downloading")
    third = peer.activate({name: STORE_PATHS[2]})[name]
    for _ in range(2):
        asked = peer.http("POST", cancel.replace(first, second))
        assert asked.status_code == 200 and asked.json()["status"] == RUNNING
        assert asked.json()["cancelRequested"]
    facts = peer.report(name, second, RUNNING, step="ready")
    assert facts.status_code == 409 and facts.json()["status"] == C
    for status in (RUNNING, S, F):
        refused = peer.report(name, second, status)
        assert refused.status_code == 409 and refused.json()["status"] == C
    assert peer.log(name, second, 0, ["still written"]).status_code == 200
    assert deployment_of(agent).id == third
    peer.report(name, third, S)
    assert peer.http("POST", cancel.replace(first, third)).status_code == 409


def test_log_offsets(peer: Peer, name: str) -> None:
    peer.registered(name)
    deployment = peer.activate({name: STORE_PATHS[0]})[name]
    assert peer.log(name, deployment, 0, ["a", "b"]).json() == {"next": 2}
    gap = peer.log(name, deployment, 3, ["d"])
    assert gap.status_code == 416 and gap.json() == {"next": 2}
    assert peer.log(name, deployment, 1, ["b", "c"]).json() == {"next": 3}
    assert peer.log(name, deployment, 0, []).json() == {"next": 3}
    assert peer.lines(deployment) == ["a", "b", "c"]
    path = f"/api/v1/deploy/log/{deployment}?offset="
    headers = {"name": name}
    too_long = peer.http(
        "PUT", path + "3", peer.agent_token, data=b"x" * (16 << 20) + b"y", headers=headers
    )
    assert too_long.status_code == 413
    for offset, body in (("-1", b""), ("x", b""), ("3", b"{}\n"), ("3", b"\xff\n"), ("3", b"\n\n")):
        answer = peer.http("PUT", path + offset, peer.agent_token, data=body, headers=headers)
        assert answer.status_code == 400 and answer.json()["error"], (offset, body)
    assert peer.lines(deployment) == ["a", "b", "c"]


def test_a_viewer_waits_a_moment_for_a_closing_line(peer: Peer, name: str) -> None:
    peer.registered(name)
    deployment = peer.activate({name: STORE_PATHS[0]})[name]
    peer.report(name, deployment, RUNNING)
    peer.log(name, deployment, 0, ["a"])
    viewer = peer.view(deployment)
    peer.report(name, deployment, F)
    began = time.monotonic()
    assert viewer.expect_text()["line"] == "a"
    assert viewer.expect_close() == 1000 and 2 < time.monotonic() - began < 25


def test_who_may_do_what(peer: Peer, name: str) -> None:
    peer.registered(name)
    deployment = peer.activate({name: STORE_PATHS[0]})[name]
    log, status = f"/api/v1/deploy/log/{deployment}", f"/api/v1/deploy/deployment/{deployment}"
    for method, path in (
        ("POST", "/api/v2/deploy/activate"),
        ("GET", status),
        ("GET", log),
        ("PUT", log),
    ):
        for token, code in (
            ("unknown", 401),
            (peer.agent_token if method != "PUT" else peer.ci_token, 403),
        ):
            answer = peer.http(method, path, token)
            right = "an agent token" if method == "PUT" else "an activate token or an admin token"
            assert answer.status_code == code and right in answer.json()["error"], (method, path)
        assert requests.request(method, peer.server.url + path, timeout=DEADLINE).status_code == 401
    admin = peer.server.token("admin")
    assert peer.http("GET", status, admin).status_code == 200
    other = f"{name}-other"
    assert peer.report(other, deployment, RUNNING).status_code == 403  # never connected
    peer.registered(other)
    assert "not one of agent" in peer.report(other, deployment, RUNNING).json()["error"]
    assert peer.log(other, deployment, 0, ["x"]).status_code == 403
    assert peer.report(name, str(uuid.uuid4()), RUNNING).status_code == 404
    assert peer.status(deployment)["status"] == "Pending"


@pytest.mark.parametrize(
    ("path", "kind", "headers", "code"),
    [
        ("/ws", "unknown", {"name": "web"}, 401),
        ("/ws", "activate", {"name": "web"}, 403),
        ("/ws", "agent", {}, 400),
        ("/ws", "agent", {"name": "../web"}, 400),
        ("/ws-deployment", "unknown", {"name": "web"}, 401),
        ("/api/v1/deploy/log/00000000-0000-4000-8000-000000000000?view=true", "activate", {}, 404),
        ("/api/v1/deploy/log/00000000-0000-4000-8000-000000000000?view=true", "agent", {}, 403),
        ("/ws", "agent", {"name": "web", "Sec-WebSocket-Version": "7"}, 400),
        ("/ws", "agent", {"name": "web", "Sec-WebSocket-Key": "x"}, 400),
        ("/ws", "agent", {"name": "web", "Sec-WebSocket-Key": "A" * 23 + "="}, 400),
        ("/nowhere", "agent", {"name": "web"}, 404),
    ],
)
def test_refused_handshakes(
    peer: Peer, path: str, kind: str, headers: dict[str, str], code: int
) -> None:
    connection = Connection(peer.server.port)
    token = {"agent": peer.agent_token, "activate": peer.ci_token}.get(kind, kind)
    connection.send(handshake(path, token, **headers))
    head = connection.read_head()
    assert head.startswith(f"HTTP/1.1 {code}"), head
    assert b'"error"' in connection.read_body(head)


def test_wrong_requests(peer: Peer, name: str) -> None:
    peer.registered(name)
    unknown = {"agents": dict.fromkeys(("nobody", name, "no-one"), STORE_PATHS[0])}
    many = {"agents": dict.fromkeys((f"{i:02}" + "x" * 1000 for i in range(99)), STORE_PATHS[0])}
    bodies = {
        b"": "not JSON",
        b"[]": "object",
        b'{"agents":{}}': "`agents` must be",
        b'{"agents":{"x":"/nix/store/aaa"}}': "not a store path",
        json.dumps(unknown).encode(): "unknown agents: no-one, nobody",
        json.dumps(many).encode(): f"19{'x' * 126} and 79 more.",
    }
    for body, sentence in bodies.items():
        answer = peer.http("POST", "/api/v2/deploy/activate?", data=body)
        assert answer.status_code == 400 and sentence in answer.json()["error"]
        assert len(answer.content) < 4000
    deployment = peer.activate({name: STORE_PATHS[0]})[name]
    assert peer.status(deployment)["index"] == 1  # the refused ones left nothing
    for more in (
        {"status": "Pending"},
        {"closureSize": -1},
        {"closureSize": True},
        {"reason": 1},
        {"time": None},
    ):
        answer = peer.report(name, deployment, **{"status": RUNNING, **more})
        assert answer.status_code == 400 and answer.json()["error"], more
    missing = peer.http("GET", "/nowhere")
    assert missing.status_code == 404
    assert missing.json() == {"error": "GET /nowhere: not found"}
    assert peer.http("DELETE", "/").status_code == 405
    assert peer.http("GET", "/ws").status_code == 400
    assert peer.http("GET", "/").json()["service"]


def test_a_second_connection_replaces_the_first(peer: Peer, name: str) -> None:
    first = peer.registered(name)
    second = peer.registered(name)
    assert first.expect_close() == 4001
    deployment = peer.activate({name: STORE_PATHS[0]})[name]
    assert deployment_of(second).id == deployment
    listed = json.loads(peer.server.command("agent", "list", "--json"))
    assert [agent["connected"] for agent in listed if agent["name"] == name] == [True]


def test_revoking_a_token_closes_its_sockets(peer: Peer, name: str) -> None:
    number, token = peer.server.new_token("agent")
    _, short = peer.server.new_token("agent", days=1 / 86400)
    headers = {"version": "1", "system": "x86_64-linux"}
    mine = open_socket(peer.server, "/ws", token, name=name, **headers)
    check = open_socket(peer.server, "/ws-deployment", token, name=name, **headers)
    expiring = open_socket(peer.server, "/ws", short, name=f"{name}-2", **headers)
    others = peer.registered(f"{name}-3")
    peer.server.command("token", "revoke", str(number))
    assert [connection.expect_close(5) for connection in (mine, check, expiring)] == [
        4003,
        4003,
        4003,
    ]
    refused = Connection(peer.server.port)
    refused.send(handshake("/ws", token, name=name))
    assert refused.read_head().startswith("HTTP/1.1 401")
    assert others.is_silent()


def test_200000_lines(peer: Peer, name: str) -> None:
    peer.registered(name)
    deployment = peer.activate({name: STORE_PATHS[0]})[name]
    viewer = peer.view(deployment)
    count, batch = 200_000, 20_000
    began = time.monotonic()
    for first in range(0, count, batch):
        lines = [f"line {first + number}" for number in range(batch)]
        assert peer.log(name, deployment, first, lines).json() == {"next": first + batch}
    stored = time.monotonic() - began
    for number in range(count):
        assert b'"line %d"' % number in viewer.expect(TEXT)
    seen = time.monotonic() - began
    print(f"{count / stored:.0f} lines/s stored, {count / seen:.0f} lines/s seen")
    assert seen < 40


def test_a_line_of_20_mb_by_websocket(peer: Peer, name: str) -> None:
    peer.registered(name)
    deployment = peer.activate({name: STORE_PATHS[0]})[name]
    log = peer.agent(name, f"/api/v1/deploy/log/{deployment}")
    payload = b'{"line":"' + b"x" * 20_000_000 + b'","time":"T"}'
    mask = b"\0\0\0\0"  # zeros save a minute
    header = b"\x81\xff" + len(payload).to_bytes(8, "big") + mask
    log.send(header + payload)
    wait_for(lambda: peer.http("GET", f"/api/v1/deploy/log/{deployment}").json()["next"] == 1, 20)
    assert len(peer.lines(deployment)[0]) == 20_000_000
