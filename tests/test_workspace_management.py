"""The management API: every operation, whom it is for, and its document."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from flask import Flask
from hypothesis import HealthCheck, given, settings
from workspace_support import DEADLINE, OURS, STORE_PATHS, Peer, Server, running

from cachix_workspace import tokens
from cachix_workspace.app import create_app
from cachix_workspace.database import open_database
from cachix_workspace.management.access import ALLOWED
from cachix_workspace.management.document import BLUEPRINTS
from cachix_workspace.settings import Settings
from cachix_workspace.tokens import ACTIVATE, ADMIN

FAILED, SUCCEEDED = "Failed", "Succeeded"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def peer(server: Server) -> Peer:
    return Peer(server)


class Client:
    """A program with a token."""

    def __init__(self, server: Server, token: str | None) -> None:
        self.server, self.token = server, token

    def __call__(self, method: str, path: str, status: int = 200, **body: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        url = f"{self.server.url}/api/v1{path}"
        answer = requests.request(method, url, json=body or None, headers=headers, timeout=DEADLINE)
        assert answer.status_code == status, (method, path, answer.status_code, answer.text)
        is_json = answer.headers.get("Content-Type", "").startswith("application/json")
        return answer.json() if is_json and answer.content else answer.text


@pytest.fixture(scope="module")
def admin(server: Server) -> Client:
    return Client(server, server.token("admin"))


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return re.sub(r"[^0-9A-Za-z]+", "-", request.node.name).strip("-")[:100]


def test_an_agent_is_added_changed_and_removed(admin: Client, name: str) -> None:
    secret = admin("POST", "/agents", 201, name=name, labels=["prod"])["secret"]
    assert secret.startswith("agent-")
    admin("POST", "/agents", 409, name=name)
    found = admin("GET", "/agents?label=prod&state=never")["agents"]
    assert name in [agent["name"] for agent in found]
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
    found, page = [], 1
    while page is not None:
        answer = admin("GET", f"/agents?text={name}&limit=2&page={page}")
        found += [agent["name"] for agent in answer["agents"]]
        page = answer["next"]
    assert found == [f"{name}-{number}" for number in range(5)]


def test_tokens_caches_people_webhooks_and_the_freeze(admin: Client) -> None:
    made = admin("POST", "/tokens", 201, kind="agent", agents="x-*", count=2, expiresInDays=7)
    assert made["secret"] not in str(admin("GET", "/tokens"))
    after = admin("POST", f"/tokens/{made['id']}/rotate", 201)
    assert after["id"] > made["id"]
    admin("DELETE", f"/tokens/{after['id']}", 204)
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


# --- whom it is for -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Flask:
    data: Path = tmp_path_factory.mktemp("data") / "data"
    return create_app(Settings(data))


def operations(app: Flask) -> list[tuple[str, str, str]]:
    """The function, method and path of each operation."""
    names = {blueprint.name for blueprint in BLUEPRINTS}
    found = []
    for rule in app.url_map.iter_rules():
        blueprint, _, function = rule.endpoint.partition(".")
        if blueprint in names:
            path = re.sub("<(int:)?[a-z_]+>", "1", rule.rule)
            found += [
                (function, method, path) for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
            ]
    return found


def test_each_operation_says_whom_it_is_for(app: Flask) -> None:
    assert {function for function, _, _ in operations(app)} == set(ALLOWED)


def test_wrong_credentials_get_nothing(app: Flask, server: Server) -> None:
    database = open_database(Settings(server.data))
    with database.write() as connection:
        _, expired = tokens.create(connection, ADMIN, expires_in=-1)
        number, revoked = tokens.create(connection, ADMIN)
        tokens.revoke(connection, number)
    database.close()
    secrets = {None: 401, "wrong": 401, expired: 401, revoked: 401, server.token("agent"): 403}
    ci = server.token("activate")
    for function, method, path in operations(app):
        wanted = dict(secrets) | ({} if ACTIVATE in ALLOWED[function] else {ci: 403})
        for secret, status in wanted.items():
            headers = {"Authorization": f"Bearer {secret}"} if secret else {}
            body = valid_body(function)
            answer = requests.request(
                method, server.url + path, headers=headers, json=body, timeout=DEADLINE
            )
            assert answer.status_code == status, (method, path, secret, answer.text)


def valid_body(function: str) -> dict[str, Any] | None:
    """A body with what the operation needs: whoever may not gets no hint of what is missing."""
    return {
        "add_agent": {"name": "x"},
        "change_agent": {},
        "start_deployments": {"agents": ["x"], "storePath": STORE_PATHS[0]},
        "roll_back_run": {},
        "create_token": {"kind": "admin"},
        "create_cache": {"name": "x"},
        "add_person": {"name": "x", "role": "viewer"},
        "change_role": {"role": "viewer"},
        "create_webhook": {"url": "https://x"},
        "freeze_workspace": {"reason": "x"},
    }.get(function)


def test_a_token_for_some_agents_reaches_no_other(
    server: Server, peer: Peer, admin: Client, name: str
) -> None:
    mine, other = f"{name}-mine", f"{name}-other"
    for each in (mine, other):
        peer.registered(each, **OURS)
    body = {"agents": [mine, other], "storePath": STORE_PATHS[0]}
    run = admin("POST", "/deployments", 201, **body)["id"]
    secret = admin("POST", "/tokens", 201, kind="activate", agents=mine)["secret"]
    client = Client(server, secret)
    assert [agent["name"] for agent in client("GET", "/agents?limit=1000")["agents"]] == [mine]
    shown = client("GET", f"/runs/{run}")
    assert [one["agent"] for one in shown["deployments"]] == [mine]
    found = client("GET", "/deployments?limit=1000")["deployments"]
    assert {one["agent"] for one in found} == {mine}
    client("PATCH", f"/agents/{mine}", paused=False)
    for method, path, more in (
        ("GET", f"/agents/{other}", {}),
        ("PATCH", f"/agents/{other}", {"paused": True}),
        ("PATCH", f"/agents/{mine}", {"name": "another"}),
        ("GET", f"/agents/{other}/deployments/1", {}),
        ("GET", f"/agents/{other}/deployments/1/log", {}),
        ("POST", f"/agents/{other}/deployments/1/cancel", {}),
        ("POST", f"/agents/{other}/deployments/1/retry", {}),
        ("POST", f"/runs/{run}/roll-back", {}),
        ("POST", "/deployments", body),
        ("DELETE", f"/agents/{mine}", {}),
    ):
        client(method, path, 403, **more)


def test_a_cookie_is_no_key_to_it(server: Server) -> None:
    from pages_support import Browser

    browser = Browser(server)
    answer = browser.session.get(f"{server.url}/api/v1/agents", timeout=DEADLINE)
    assert answer.status_code == 401


# --- the document ---------------------------------------------------------------------------------


def test_the_document_has_every_operation_and_people_can_read_it(app: Flask) -> None:
    client = app.test_client()
    document = client.get("/api/v1/openapi.json").get_json()
    assert document["openapi"] == "3.1.0"
    described = {
        (method.upper(), re.sub("{[a-z_]+}", "1", path))
        for path, item in document["paths"].items()
        for method in item
        if method != "parameters"
    }
    assert described == {(method, path) for _, method, path in operations(app)}
    page = client.get("/api/v1/docs").get_data(as_text=True)
    for _, path in described:
        assert path.split("/1")[0] in page
    assert "<script" not in page


@pytest.mark.long
def test_whatever_is_sent_is_answered_as_the_document_says(app: Flask) -> None:
    secret = "admin-for-schemathesis"
    with app.extensions["workspace"].database.write() as connection:
        tokens.create(connection, ADMIN, secret=secret)
    document = schemathesis.openapi.from_wsgi("/api/v1/openapi.json", app)
    tried = 0
    for found in document.get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy())
        @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
        def try_it(case: Any) -> None:
            answer = case.call(headers={"Authorization": f"Bearer {secret}"})
            assert answer.status_code < 500, answer.text
            if answer.status_code >= 400:
                assert "error" in answer.json(), answer.text
            elif answer.status_code in (200, 201, 202) and "log" not in case.path:
                case.operation.validate_response(answer)

        try_it()
        tried += 1
    assert tried == len(operations(app))
