"""Whose name it is: enrolment, tokens that agents keep, and successors of tokens and keys."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from typing import Any

import closures
import pytest
from caches import Key
from hosts import Host, wait_until
from live import Workspace
from workspace_support import OURS, STORE_PATHS, TEXT, Connection, Peer, command, handshake, running

RUNNING, SUCCEEDED = "InProgress", "Succeeded"
FAST = {"CACHIX_DEPLOY_WAITS": '{"backoff": 0.05, "slowest": 0.2, "former": 1}'}


@pytest.fixture
def peer() -> Iterator[Peer]:
    with running("--public-url=http://ws.test") as server:
        yield Peer(server)


def create(peer: Peer, *arguments: str) -> str:
    return peer.server.command("token", "create", *arguments).strip()


def answer_to(peer: Peer, secret: str, name: str, path: str = "/ws", **headers: str) -> str:
    """Try a websocket; the status, and what a refusal says."""
    connection = Connection(peer.server.port)
    connection.send(handshake(path, secret, name=name, **headers))
    head = connection.read_head()
    body = "" if " 101 " in head.splitlines()[0] else connection.read_body(head).decode()
    connection.close()
    return f"{head.split()[1]} {json.loads(body)['error'] if body else ''}".strip()


def register(peer: Peer, secret: str, name: str, **headers: str) -> dict[str, Any]:
    """Connect an agent; what its registration says."""
    connection = peer.agent(name, Authorization=f"Bearer {secret}", **headers)
    contents = json.loads(connection.expect(TEXT))["command"]["contents"]
    connection.close()
    return dict(contents)


def enrol(peer: Peer, secret: str, name: str) -> str:
    """Let an agent of ours get a token of its own, and use it."""
    own = str(register(peer, secret, name, **OURS)["secret"])
    register(peer, own, name, **OURS)
    return own


def listed(peer: Peer, what: str) -> list[dict[str, Any]]:
    return list(json.loads(peer.server.command(what, "list", "--json")))


# --- enrolment ------------------------------------------------------------------------------------


def test_a_name_is_bound_by_the_first_use_of_its_own_token(peer: Peer) -> None:
    shared = create(peer, "agent", "--names=web-*,db")
    lost = register(peer, shared, "web-1", **OURS)["secret"]
    again = register(peer, shared, "web-1", **OURS)["secret"]  # it never came with the first one
    assert lost and again and lost != again
    assert answer_to(peer, lost, "web-1").startswith("401")
    own = register(peer, again, "web-1", **OURS)
    assert "secret" not in own
    other = create(peer, "agent", "--name=web-1")
    for secret in (shared, other, peer.server.token("agent")):
        refused = answer_to(peer, secret, "web-1", **OURS)
        assert refused == (
            "403 web-1 belongs to another machine; if it was reinstalled: "
            "`cachix-workspace agent move web-1`"
        )
    assert answer_to(peer, again, "web-1") == "101"
    assert answer_to(peer, again, "web-2").startswith("403 this token belongs to agent web-1")
    assert answer_to(peer, shared, "web-2") == "101"


def test_no_endpoint_takes_the_enrolment_token_for_a_bound_name(peer: Peer) -> None:
    shared = create(peer, "agent", "--names=*")
    own = enrol(peer, shared, "web")
    deployment = peer.activate({"web": STORE_PATHS[0]})["web"]
    log = f"/api/v1/deploy/log/{deployment}"
    status = f"/api/v1/deploy/deployment/{deployment}/status"
    for secret, expected in ((shared, 403), (own, 200)):
        headers, body = {"name": "web"}, {"status": RUNNING, "time": "T"}
        assert peer.http("PUT", status, secret, json=body, headers=headers).status_code == expected
        answer = peer.http("PUT", f"{log}?offset=0", secret, headers=headers)
        assert answer.status_code == expected
    for path in ("/ws", "/ws-deployment", log):
        assert answer_to(peer, shared, "web", path).startswith("403 web belongs to another")
        assert answer_to(peer, own, "web", path) == "101"


def test_what_was_ordered_before_may_be_reported_with_the_former_token(peer: Peer) -> None:
    """The switch process that a bootstrap started has no other, and must get through."""
    shared = create(peer, "agent", "--names=*")
    register(peer, shared, "web")
    deployment = peer.activate({"web": STORE_PATHS[0]})["web"]
    status = f"/api/v1/deploy/deployment/{deployment}/status"
    headers, body = {"name": "web"}, {"status": RUNNING, "time": "T"}
    assert peer.http("PUT", status, shared, json=body, headers=headers).status_code == 200
    enrol(peer, shared, "web")
    assert answer_to(peer, shared, "web", "/ws-deployment") == "101"
    assert answer_to(peer, shared, "web", "/ws").startswith("403")
    body["status"] = SUCCEEDED
    assert peer.http("PUT", status, shared, json=body, headers=headers).status_code == 200
    log = f"/api/v1/deploy/log/{deployment}?offset=0"
    assert peer.http("PUT", log, shared, headers=headers).status_code == 200
    assert answer_to(peer, shared, "web", "/ws-deployment").startswith("403")
    later = peer.activate({"web": STORE_PATHS[1]})["web"]
    status = f"/api/v1/deploy/deployment/{later}/status"
    assert peer.http("PUT", status, shared, json=body, headers=headers).status_code == 403


@pytest.mark.long
def test_an_agent_of_another_program_stays_unbound_and_lists_say_so(peer: Peer) -> None:
    shared = create(peer, "agent", "--names=*")
    assert "secret" not in register(peer, shared, "old", **{"User-Agent": "cachix 1.11.1"})
    enrol(peer, shared, "new")
    named = create(peer, "agent", "--name=fixed")
    register(peer, named, "fixed")
    table = peer.server.command("agent", "list")
    assert re.search(r"^old .* not bound to a machine$", table, re.M)
    assert re.search(r"^new .* its own$", table, re.M)
    assert re.search(r"^fixed .* token \d+$", table, re.M)
    assert {each["name"]: each["bound"] for each in listed(peer, "agent")} == {
        "old": False,
        "new": True,
        "fixed": True,
    }
    assert re.search(r"agent's own +valid +new ", peer.server.command("token", "list"))


def test_a_token_for_so_many_agents(peer: Peer) -> None:
    shared = create(peer, "agent", "--names=*", "--count=2")
    enrol(peer, shared, "a")
    register(peer, shared, "b")  # Cachix's agent counts too
    assert answer_to(peer, shared, "c") == "403 this token was for 2 agents, and has had them"
    assert answer_to(peer, shared, "b") == "101"
    peer.server.command("agent", "move", "a")
    assert answer_to(peer, shared, "c") == "101"
    data = f"--data={peer.server.data}"
    for bad in (["--count=2"], ["--names=*", "--count=0"], ["--name=a", "--count=2"]):
        assert (
            "goes with --names" in command("token", "create", "agent", *bad, data, status=64).stderr
        )


@pytest.mark.long
def test_a_name_that_is_moved_is_free_for_the_next_machine(peer: Peer) -> None:
    shared = create(peer, "agent", "--names=*")
    own = enrol(peer, shared, "web")
    connection = peer.agent("web", Authorization=f"Bearer {own}")
    connection.expect(TEXT)
    peer.server.command("agent", "move", "web")
    assert connection.expect_close() == 4003
    assert answer_to(peer, own, "web").startswith("403 the token that web kept was taken back")
    assert enrol(peer, shared, "web") != own
    data = f"--data={peer.server.data}"
    assert "there is no agent no" in command("agent", "move", "no", data, status=1).stderr
    register(peer, peer.server.token("agent"), "other")
    assert "is not bound" in command("agent", "move", "other", data).stderr


@pytest.mark.long
def test_revoking_an_enrolment_token_leaves_its_agents_unless_asked(peer: Peer) -> None:
    shared = create(peer, "agent", "--names=*")
    own = enrol(peer, shared, "web")
    number = next(str(each["id"]) for each in listed(peer, "token") if each["agents"] == "*")
    peer.server.command("token", "revoke", number)
    assert answer_to(peer, shared, "new").startswith("401")
    assert answer_to(peer, own, "web") == "101"
    peer.server.command("token", "revoke", number, "--and-agents")
    assert answer_to(peer, own, "web").startswith("403 the token that web kept was taken back")


@pytest.mark.long
def test_a_token_without_a_name_is_for_the_first_agent_that_is_new(peer: Peer) -> None:
    peer.registered("known").close()
    one = create(peer, "agent")
    refused = answer_to(peer, one, "known")
    assert refused.startswith("403 known has a token, and this one is for an agent that is new: ")
    assert "token create agent --name=known" in refused
    deployment = peer.activate({"known": STORE_PATHS[0]})["known"]
    status = f"/api/v1/deploy/deployment/{deployment}/status"
    body = {"status": SUCCEEDED, "time": "T"}
    answer = peer.http("PUT", status, one, json=body, headers={"name": "known"})
    assert answer.status_code == 403 and "no agent has connected" in answer.text
    assert "the first" in peer.server.command("token", "list")
    register(peer, one, "new")
    assert answer_to(peer, one, "other").startswith("403 this token belongs to agent new, and not")
    shared = create(peer, "agent", "--shared")
    for name in ("known", "new", "third"):
        assert answer_to(peer, shared, name) == "101"
    data = f"--data={peer.server.data}"
    refusal = command("token", "create", "activate", "--shared", data, status=64).stderr
    assert "--shared is for agent tokens" in refusal


def test_two_agents_at_once_do_not_share_a_token_without_a_name(peer: Peer) -> None:
    secret = create(peer, "agent")
    rivals = [Connection(peer.server.port) for _ in range(8)]
    for number, rival in enumerate(rivals):
        rival.send(handshake("/ws", secret, name=f"rival-{number}"))
    for rival in rivals:
        assert rival.read_head().startswith("HTTP/1.1 ")
        rival.close()

    def owners() -> list[str]:
        with_token = [each["name"] for each in listed(peer, "agent") if each["token"]]
        return [name for name in with_token if name.startswith("rival-")]

    wait_until(lambda: len(owners()) == 1, 10)


def test_whoever_tries_tokens_is_told_to_wait_and_others_are_not(peer: Peer) -> None:
    path = "/api/v1/deploy/deployments"
    answers = [peer.http("GET", path, f"activate-{i}") for i in range(310)]
    assert [answer.status_code for answer in answers] == [401] * 300 + [429] * 10
    assert answers[-1].headers["Retry-After"]
    assert peer.http("GET", path).status_code == 200


def test_tokens_of_earlier_releases_are_shared(peer: Peer) -> None:
    """They have no names, and nobody is bound by them."""
    old = peer.server.token("agent")
    assert "agent, shared" in peer.server.command("token", "list")
    for name in ("web", "db"):
        assert "secret" not in register(peer, old, name, **OURS)


# --- rotation -------------------------------------------------------------------------------------


def number_of(peer: Peer, **facts: Any) -> str:
    return next(
        str(each["id"])
        for each in listed(peer, "token")
        if all(each[name] == value for name, value in facts.items())
    )


@pytest.mark.long
def test_a_token_of_ci_ends_when_its_successor_is_used(peer: Peer) -> None:
    old = create(peer, "activate", "--agents=web", "--description=ci")
    peer.registered("web")
    number = number_of(peer, description="ci")
    new = peer.server.command("token", "rotate", number).strip()
    path = "/api/v1/deploy/deployments"
    assert peer.http("GET", path, old).status_code == 200
    spec = {"agents": {"db": STORE_PATHS[0]}}
    answer = peer.http("POST", "/api/v2/deploy/activate", new, json=spec)
    assert answer.status_code == 403 and "for agents web" in answer.text  # the same limits
    assert peer.http("GET", path, old).status_code == 401
    assert "token revoke" in peer.server.command("audit")
    data = f"--data={peer.server.data}"
    assert "no valid token" in command("token", "rotate", number, data, status=1).stderr


@pytest.mark.long
def test_a_token_of_agents_ends_for_each_by_itself(peer: Peer) -> None:
    old = create(peer, "agent", "--shared", "--description=fleet")
    for name in ("web", "db"):
        register(peer, old, name)
    number = number_of(peer, description="fleet")
    new = peer.server.command("token", "rotate", number).strip()
    data = f"--data={peer.server.data}"
    assert "has a successor already" in command("token", "rotate", number, data, status=1).stderr
    register(peer, new, "web")
    refused = answer_to(peer, old, "web")
    assert re.fullmatch(
        r"403 this token was replaced by token \d+, which web uses already", refused
    )
    assert answer_to(peer, old, "db") == "101"
    text = command("token", "list", data).stderr
    assert re.search(rf"token {number} is replaced by token \d+, which db still use", text)
    (still,) = (each["used_by"] for each in listed(peer, "token") if str(each["id"]) == number)
    assert still == ["db"]


@pytest.mark.long
def test_the_former_token_ends_after_a_week_or_at_its_own_time(peer: Peer) -> None:
    for days, expected in (("", 7), ("--expires=3", 3), ("--expires=30", 7)):
        create(peer, "agent", f"--description=for{days}", *([days] if days else []))
        number = number_of(peer, description=f"for{days}")
        peer.server.command("token", "rotate", number)
        facts = next(each for each in listed(peer, "token") if str(each["id"]) == number)
        answer, ends = (facts[name][:10] for name in ("created_on", "expires_on"))
        with sqlite3.connect(":memory:") as sql:
            (left,) = sql.execute("select julianday(?) - julianday(?)", (ends, answer)).fetchone()
        assert left == expected


def test_the_token_that_an_agent_keeps_is_not_rotated_by_hand(peer: Peer) -> None:
    enrol(peer, create(peer, "agent", "--names=*"), "web")
    number = number_of(peer, agents="web")
    refused = command("token", "rotate", number, f"--data={peer.server.data}", status=1).stderr
    assert "`cachix-workspace agent move web` lets it get another" in refused


@pytest.mark.long
def test_tokens_that_expire_soon_are_warned_of() -> None:
    with running() as server:
        secrets = {
            days: server.command(
                "token", "create", "agent", "--shared", f"--expires={days}"
            ).strip()
            for days in (2, 10, 20)
        }
        ci = server.command("token", "create", "activate", "--expires=10").strip()
        server.stop()
        server.lines.clear()
        server.start()
        peer = Peer(server)
        wait_until(lambda: sum("expires in" in line for line in server.lines) == 3, 20, "warnings")
        text = "\n".join(server.lines)
        assert "token 1 (agent) expires in 2.0 days: `cachix-workspace token rotate 1`" in text
        assert "token 3" not in text
        assert "tokenExpires" in register(peer, secrets[10], "web")
        assert "tokenExpires" not in register(peer, secrets[20], "web")
        spec = {"agents": {"web": STORE_PATHS[0]}}
        answer = peer.http("POST", "/api/v2/deploy/activate", ci, json=spec)
        assert answer.json()["tokenExpires"].startswith("20")


# --- real agents ----------------------------------------------------------------------------------


def deploy(workspace: Workspace, name: str, version: int) -> str:
    path = closures.plain(workspace.files, version)
    workspace.push(path)
    return workspace.wait(workspace.deploy(name, path))


@pytest.mark.long
def test_an_agent_keeps_its_own_token(host: Host, make_workspace: Any) -> None:
    workspace = make_workspace(private=True)
    shared = workspace.token("agent", "--names=w*")
    agent = host.agent("web", workspace.url, shared, env=FAST)
    agent.wait_for("has a token of its own now")
    agent.wait_for("web is connected")
    kept = host.state / "secret-web.json"
    own = json.loads(kept.read_text())["token"]
    assert kept.stat().st_mode & 0o777 == 0o600 and own != shared
    assert deploy(workspace, "web", 1) == SUCCEEDED  # the cache takes it too
    agent.stop()
    (number,) = (
        str(each["id"])
        for each in json.loads(workspace.cli("token", "list", "--json"))
        if each["agents"] == "w*"
    )
    workspace.cli("token", "revoke", number)
    agent = host.agent("web", workspace.url, shared, env=FAST)  # with its own one
    agent.wait_for("web is connected")
    assert deploy(workspace, "web", 2) == SUCCEEDED
    assert own not in agent.text() and shared not in agent.text()


def test_another_machine_is_told_whose_the_name_is(make_host: Any, make_workspace: Any) -> None:
    workspace, first, second = make_workspace(), make_host("first"), make_host("second")
    shared = workspace.token("agent", "--names=*")
    former = first.agent("web", workspace.url, shared, env=FAST)
    former.wait_for("web is connected")
    refused = second.agent("web", workspace.url, shared, env=FAST)
    assert refused.wait() == 77
    assert (
        "web belongs to another machine; if it was reinstalled: `cachix-workspace agent move"
        in (refused.text())
    )
    workspace.cli("agent", "move", "web")
    former.wait_for("the token that web kept was taken back")  # and it does not enrol again
    second.agent("web", workspace.url, shared, env=FAST).wait_for("web is connected")


@pytest.mark.long
def test_an_agent_whose_token_the_workspace_has_lost_enrols_again(
    host: Host, make_workspace: Any
) -> None:
    """Its database was restored from a backup."""
    workspace = make_workspace()
    shared = workspace.token("agent", "--names=*")
    (host.state / "secret-web.json").write_text(
        json.dumps({"host": workspace.url, "token": "gone"})
    )
    agent = host.agent("web", workspace.url, shared, env=FAST)
    agent.wait_for("web is connected")
    assert json.loads((host.state / "secret-web.json").read_text())["token"] != "gone"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"host": "http://x", "token": "t"}', '"x"'])
def test_a_kept_token_that_is_none_is_replaced(
    host: Host, make_workspace: Any, content: str
) -> None:
    workspace = make_workspace()
    (host.state / "secret-web.json").write_text(content)
    shared = workspace.token("agent", "--names=*")
    host.agent("web", workspace.url, shared, env=FAST).wait_for("has a token of its own now")


@pytest.mark.long
def test_a_bootstrap_hands_its_name_over(host: Host, make_workspace: Any) -> None:
    workspace = make_workspace()
    shared = workspace.token("agent", "--names=*")
    first = host.agent("web", workspace.url, shared, "--bootstrap", env=FAST)
    first.wait_for("web is connected")
    assert not (host.state / "secret-web.json").exists()
    path = closures.plain(workspace.files, 1)
    workspace.push(path)
    deployment = workspace.deploy("web", path)
    wait_until(lambda: workspace.deployment(deployment)["status"] == SUCCEEDED, 30)
    second = host.agent("web", workspace.url, shared, env=FAST)
    second.wait_for("has a token of its own now")
    assert first.wait() == 0
    assert workspace.wait(deployment) == SUCCEEDED
    assert deploy(workspace, "web", 2) == SUCCEEDED


# --- keys of caches -------------------------------------------------------------------------------


@pytest.mark.long
def test_two_keys_count_until_the_old_one_is_retired(host: Host, make_workspace: Any) -> None:
    workspace = make_workspace()
    agent = host.agent("web", workspace.url, workspace.token("agent"), env=FAST)
    agent.wait_for("web is connected")
    one, two, three = (closures.plain(workspace.files, version) for version in (1, 2, 3))
    workspace.push(one)
    secret = workspace.cli("cache", "key", "rotate", "main")
    old, new = workspace.files.key, Key.parse(secret)
    assert re.fullmatch(r"main\.[^:]*-2", new.name) and new.public != old.public
    agent.stop()
    host.agent("web", workspace.url, workspace.token("agent"), env=FAST).wait_for("is connected")
    assert workspace.wait(workspace.deploy("web", one)) == SUCCEEDED
    workspace.push(two)  # still signed by the old key
    assert workspace.wait(workspace.deploy("web", two)) == SUCCEEDED
    workspace.files.key = new
    workspace.files.write(three, workspace.files.archive(three).read_bytes(), [])
    workspace.push(three)
    assert workspace.wait(workspace.deploy("web", three)) == SUCCEEDED
    text = workspace.cli("cache", "key", "retire", "main")
    assert text == ""
    facts = workspace.cli("cache", "show", "main")
    assert new.public in facts and old.public not in facts
    assert one in facts and two in facts and three not in facts


# --- a fleet that comes for the first time --------------------------------------------------------


def test_many_new_agents_at_once_are_admitted_as_single_ones_are(peer: Peer) -> None:
    shared, mine = peer.server.token("agent"), create(peer, "agent", "--names=web-*")
    enrol(peer, mine, "web-1")
    names = [f"host-{number}" for number in range(60)]
    coming = [(name, shared, {}) for name in [*names, "a b", "web-1"]]
    coming += [("web-2", mine, OURS), ("other", mine, {}), ("new", "agent-unknown", {})]
    connections = []
    for name, secret, headers in coming:
        connections.append(Connection(peer.server.port))
        connections[-1].send(handshake("/ws", secret, name=name, **headers))
    heads = [connection.read_head().split()[1] for connection in connections]
    assert heads == [*60 * ["101"], "400", "403", "101", "403", "401"]
    told = [json.loads(each.expect(TEXT))["command"]["contents"] for each in connections[:60]]
    ids = {name: contents["id"] for name, contents in zip(names, told)}
    assert len(set(ids.values())) == 60
    assert json.loads(connections[62].expect(TEXT))["command"]["contents"]["secret"]
    audit = peer.server.command("audit", "--limit=1000", "--json")
    first = [entry["detail"] for entry in json.loads(audit)]
    assert sorted(each for each in first if each.startswith("host-")) == sorted(
        f"{name} connected first" for name in names
    )
    rows = {row["name"]: row for row in listed(peer, "agent")}
    assert all(rows[name]["connected"] for name in names)
