"""The management API: every operation against a real server."""

from __future__ import annotations

import pytest
from management_support import Client
from pages_support import Browser
from workspace_support import DEADLINE, OURS, STORE_PATHS, Peer, Server

FAILED, SUCCEEDED = "Failed", "Succeeded"


@pytest.fixture(scope="module")
def peer(server: Server) -> Peer:
    return Peer(server)


def test_an_agent_is_added_changed_and_removed(admin: Client, name: str) -> None:
    secret = admin("POST", "/agents", 201, name=name, labels=["prod"])["secret"]
    assert secret.startswith("agent-")
    admin("POST", "/agents", 409, name=name)
    result = admin("GET", "/agents?label=prod&state=never")["agents"]
    assert name in [agent["name"] for agent in result]
    changed = admin("PATCH", f"/agents/{name}", paused=True, labels=["db"], description="x")
    assert changed["labels"] == ["db"] and changed["pausedSince"]
    assert admin("PATCH", f"/agents/{name}", paused=False)["pausedSince"] is None
    assert admin("PATCH", f"/agents/{name}", name=f"{name}-new")["name"] == f"{name}-new"
    assert "not bound" in admin("POST", f"/agents/{name}-new/move", 409)["error"]
    admin("DELETE", f"/agents/{name}-new", 204)
    admin("GET", f"/agents/{name}-new", 404)


def test_a_deployment_is_started_shown_retried_and_cancelled(
    admin: Client, peer: Peer, name: str
) -> None:
    peer.registered(name, **OURS)
    run = admin("POST", "/deployments", 201, agents=[name], storePath=STORE_PATHS[0])
    [deployment] = run["deployments"]
    assert (deployment["agent"], deployment["state"]) == (name, "waiting")
    peer.log(name, deployment["id"], 0, ["one", "two"])
    peer.report(name, deployment["id"], FAILED, outcome="nothing-changed", reason="no")
    at = f"/agents/{name}/deployments/1"
    assert admin("GET", at)["state"] == "nothing-changed"
    assert admin("GET", f"{at}/log") == "one\ntwo\n"
    assert admin("GET", f"/deployments?agent={name}&status=Failed")["deployments"][0]["index"] == 1
    assert admin("POST", f"{at}/retry", 201)["retryOf"] == 1
    assert admin("POST", f"/agents/{name}/deployments/2/cancel")["status"] == "Cancelled"
    admin("POST", f"{at}/cancel", 409)
    admin("POST", "/deployments", 400, agents=[name], storePath="/etc/passwd")
    admin("POST", "/deployments", 404, agents=["nobody"], storePath=STORE_PATHS[0])


def test_a_run_is_listed_retried_and_rolled_back(admin: Client, peer: Peer, name: str) -> None:
    names = [f"{name}-{letter}" for letter in "ab"]
    for path in (0, 1):
        for each in names:
            peer.registered(each, **OURS)
        run = admin("POST", "/deployments", 201, agents=names, storePath=STORE_PATHS[path])
        for one in run["deployments"]:
            peer.report(one["agent"], one["id"], SUCCEEDED, outcome="succeeded")
    assert admin("GET", "/runs?limit=1")["runs"][0]["counts"] == {"succeeded": 2}
    at = f"/runs/{run['id']}"
    assert admin("GET", at)["counts"] == {"succeeded": 2}
    plan = admin("GET", f"{at}/roll-back")["agents"]
    assert [(one["agent"], one["then"]) for one in plan] == [
        (each, STORE_PATHS[0]) for each in names
    ]
    admin("POST", f"{at}/retry", 409)
    back = admin("POST", f"{at}/roll-back", 201, agents=[names[0]])
    assert [one["storePath"] for one in back["deployments"]] == [STORE_PATHS[0]]
    admin("POST", f"{at}/roll-back", 404, agents=["nobody"])


def test_lists_are_paged(admin: Client, name: str) -> None:
    for number in range(5):
        admin("POST", "/agents", 201, name=f"{name}-{number}")
    result, page = [], 1
    while page is not None:
        answer = admin("GET", f"/agents?text={name}&limit=2&page={page}")
        result += [agent["name"] for agent in answer["agents"]]
        page = answer["next"]
    assert result == [f"{name}-{number}" for number in range(5)]


def test_tokens_caches_people_webhooks_and_the_freeze(admin: Client) -> None:
    answer = admin("POST", "/tokens", 201, kind="agent", agents="x-*", count=2, expiresInDays=7)
    assert answer["secret"] not in str(admin("GET", "/tokens"))
    after = admin("POST", f"/tokens/{answer['id']}/rotate", 201)
    assert after["id"] > answer["id"]
    assert admin("DELETE", f"/tokens/{after['id']}?andAgents=true")["agents"] == 0
    admin("POST", "/tokens", 400, kind="activate", count=2)
    cache = admin("POST", "/caches", 201, name="main", public=False)
    assert cache["secretKey"] not in str(admin("GET", "/caches"))
    assert admin("POST", "/caches/main/rotate", 201)["formerKey"] == cache["publicKey"]
    assert admin("POST", "/caches/main/retire")["formerKey"] is None
    person = admin("POST", "/people", 201, name="vera", role="viewer")
    assert "/sign-in/" in person["link"]
    assert admin("PATCH", "/people/vera", role="operator")["role"] == "operator"
    assert admin("POST", "/people/vera/link", 201)["link"] != person["link"]
    admin("DELETE", "/people/vera", 204)
    hook = admin("POST", "/webhooks", 201, url="https://hooks.example/secret/secret/secret")
    assert hook["key"] not in str(admin("GET", "/webhooks"))
    admin("POST", f"/webhooks/{hook['id']}/test", 202)
    admin("DELETE", f"/webhooks/{hook['id']}", 204)
    assert admin("PUT", "/freeze", reason="the audit")["frozen"]
    assert admin("GET", "/freeze")["reason"] == "the audit"
    assert not admin("DELETE", "/freeze")["frozen"]
    actions = [entry["action"] for entry in admin("GET", "/audit?limit=1000")["entries"]]
    assert {"freeze", "thaw", "webhook create", "person add", "token rotate"} <= set(actions)


def test_an_agent_is_shown_with_all_that_is_known(admin: Client, peer: Peer, name: str) -> None:
    sock = peer.registered(name, **OURS)
    deployment = peer.activate({name: STORE_PATHS[0]})[name]
    peer.report(name, deployment, SUCCEEDED, outcome="succeeded")
    admin("PATCH", f"/agents/{name}", description="in the cellar", paused=True)
    facts = admin("GET", f"/agents/{name}")
    assert facts["description"] == "in the cellar" and facts["pausedBy"].startswith("token")
    assert facts["deployed"] == STORE_PATHS[0] and facts["formerPaths"] == [STORE_PATHS[0]]
    assert facts["lastState"] == "succeeded" and not facts["bound"] and facts["token"]
    listed = admin("GET", f"/agents?text={name}")["agents"][0]
    assert listed == {key: facts[key] for key in listed}
    sock.close()


def test_tokens_are_paged_and_say_who_uses_them(admin: Client, peer: Peer, name: str) -> None:
    peer.registered(name, **OURS)
    result, page = [], 1
    while page is not None:
        answer = admin("GET", f"/tokens?limit=2&page={page}")
        assert len(answer["tokens"]) <= 2
        result += answer["tokens"]
        page = answer["next"]
    numbers = [token["id"] for token in result]
    assert numbers == sorted(set(numbers), reverse=True) and len(numbers) > 2
    assert [name] == [one for token in result for one in token["usedBy"] if one == name]


def test_revoking_an_enrolment_token_ends_what_its_agents_got(server: Server, name: str) -> None:
    admin = Client(server, server.token("admin"))
    answer = admin("POST", "/tokens", 201, kind="agent", agents=f"{name}-*")
    peer = Peer(server)
    peer.agent_token = answer["secret"]
    peer.registered(f"{name}-1", **OURS)
    assert admin("DELETE", f"/tokens/{answer['id']}?andAgents=true")["agents"] == 1
    states = {token["issuedBy"]: token["state"] for token in admin("GET", "/tokens")["tokens"]}
    assert states[answer["id"]] == "revoked"


def test_a_cache_is_shown_and_a_session_ended(server: Server, admin: Client) -> None:
    cache = admin("POST", "/caches", 201, name="shown")
    facts = admin("GET", "/caches/shown")
    assert "secretKey" in cache and facts["recent"] == facts["unsigned"] == []
    assert {**facts, "secretKey": cache["secretKey"]}.items() >= cache.items()
    admin("GET", "/caches/nothing", 404)
    browser = Browser(server, "sam")
    assert "Agents" in browser.get("/")
    [session] = [one for one in admin("GET", "/sessions")["sessions"] if one["name"] == "sam"]
    assert session["browser"] == "a test"
    admin("DELETE", f"/sessions/{session['id']}", 204)
    assert "sam" not in str(admin("GET", "/sessions"))
    assert browser.session.get(f"{server.url}/", timeout=DEADLINE).url.endswith("/sign-in?next=%2F")


def test_the_workspace_is_named_and_counted(server: Server, admin: Client, name: str) -> None:
    admin("POST", "/agents", 201, name=name)
    admin("PATCH", f"/agents/{name}", paused=True)
    assert admin("PATCH", "/workspace", name="  The  Cellar ")["name"] == "The Cellar"
    admin("PATCH", "/workspace", 400, name="\u202e")
    facts = admin("GET", "/workspace")
    assert facts["name"] == "The Cellar" and facts["url"] == server.url
    assert facts["agents"] == sum(facts["states"].values()) and facts["paused"] >= 1
    assert not facts["freeze"]["frozen"]
