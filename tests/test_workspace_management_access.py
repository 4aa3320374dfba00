"""Whom the management API is for: every operation, tried with every kind of credentials."""

from __future__ import annotations

import base64
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from management_support import BODIES, Client, Operation, operations
from pages_support import cookie_of
from workspace_support import OURS, STORE_PATHS, Peer, Server

from cachix_workspace import tokens
from cachix_workspace.app import create_app
from cachix_workspace.database import open_database
from cachix_workspace.management.access import ALLOWED
from cachix_workspace.pages.access import COOKIE
from cachix_workspace.settings import Settings
from cachix_workspace.tokens import ACTIVATE, ADMIN, AGENT, KINDS

# what shows something in an empty workspace
LISTS = {"list_agents", "list_deployments", "list_runs", "list_caches"} | {
    "show_freeze",
    "show_workspace",
}


def all_operations() -> list[Operation]:
    with tempfile.TemporaryDirectory() as directory:
        return operations(create_app(Settings(Path(directory, "data"))))


ALL = all_operations()
FOR_ADMINS = [one for one in ALL if ALLOWED.get(one.function) == {ADMIN}]
FOR_OPERATORS = [one for one in ALL if one not in FOR_ADMINS]


def each(operations: list[Operation]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("one", operations, ids=[one.title for one in operations])


@pytest.fixture(scope="module")
def peer(server: Server) -> Peer:
    return Peer(server)


@pytest.fixture(scope="module")
def ci(server: Server) -> Client:
    return Client(server, server.token("activate"))


@pytest.fixture(scope="module")
def bad(server: Server) -> dict[str, tuple[str | None, int]]:
    """Credentials that are good for nothing here, and the status of the answer."""
    database = open_database(Settings(server.data))
    with database.write() as connection:
        _, expired = tokens.create(connection, ADMIN, expires_in=-1)
        number, revoked = tokens.create(connection, ADMIN)
        tokens.revoke(connection, number)
        _, enrolment = tokens.create(connection, AGENT, agents="x-*")
        others = [kind for kind in KINDS if kind not in (ADMIN, ACTIVATE)]
        secrets = {kind: tokens.create(connection, kind)[1] for kind in others}
    database.close()
    return {
        "none": (None, 401),
        "wrong": ("admin-wrong", 401),
        "expired": (expired, 401),
        "revoked": (revoked, 401),
        "enrolment": (enrolment, 403),
        **{kind: (secret, 403) for kind, secret in secrets.items()},
    }


@pytest.fixture(scope="module")
def limited_admin(server: Server) -> Client:
    database = open_database(Settings(server.data))
    with database.write() as connection:
        _, secret = tokens.create(connection, ADMIN, agents="web-*")
    database.close()
    return Client(server, secret)


def refused(client: Client, one: Operation, status: int, **options: Any) -> None:
    """Assert that an operation is refused with JSON that has a sentence."""
    answer = client.send(one.method, one.path, **options)
    assert answer.status_code == status, (one.title, answer.status_code, answer.text)
    assert list(answer.json()) == ["error"] and " " in answer.json()["error"]
    assert answer.headers["Cache-Control"] == "no-store"


def test_each_operation_says_whom_it_is_for() -> None:
    functions = [one.function for one in ALL]
    assert len(functions) == len(set(functions))  # the name is the key of ALLOWED
    assert set(functions) == set(ALLOWED)
    assert set(BODIES) <= set(functions)
    assert all(kinds <= {ADMIN, ACTIVATE} for kinds in ALLOWED.values())


@each(ALL)
def test_bad_credentials_get_nothing(
    one: Operation, server: Server, bad: dict[str, tuple[str | None, int]]
) -> None:
    """Whether the body is right makes no difference: nobody has looked at it."""
    for secret, status in bad.values():
        client = Client(server, secret)
        for body in (BODIES.get(one.function), {"nonsense": 1}):
            refused(client, one, status, json=body)


@each(FOR_ADMINS)
def test_what_is_for_admins_is_for_those_of_all_agents(
    one: Operation, ci: Client, limited_admin: Client
) -> None:
    for client in (ci, limited_admin):
        refused(client, one, 403, json=BODIES.get(one.function))


@each(ALL)
def test_a_cookie_is_no_key_to_it(one: Operation, server: Server) -> None:
    cookie = {"Cookie": f"{COOKIE}={cookie_of(server, 'anna')}"}
    refused(Client(server, None), one, 401, json=BODIES.get(one.function), headers=cookie)


@each(ALL)
def test_no_page_of_another_site_uses_it(one: Operation, admin: Client) -> None:
    for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        refused(admin, one, 403, json=BODIES.get(one.function), headers=headers)


@each([one for one in ALL if one.function in BODIES])
def test_a_body_is_json_within_bounds(one: Operation, admin: Client) -> None:
    kind = {"Content-Type": "application/json"}
    refused(admin, one, 415, data={"name": "x"})
    for body in (b"{", b"[" * 100_000, b"[]", b'{"nonsense": 1}', b'{"reason": "\\ud800"}'):
        refused(admin, one, 400, data=body, headers=kind)
    refused(admin, one, 413, data=b" " * (2 << 20), headers=kind)
    refused(admin, one, 413, data=iter([b" " * (1 << 20)] * 2), headers=kind)


@each(FOR_OPERATORS)
def test_a_token_of_ci_may_do_what_an_operator_may(one: Operation, ci: Client) -> None:
    """Nothing is called 999999 here, but that is not because of the token."""
    path = one.path.replace("/1", "/999999")
    answer = ci.send(one.method, path, json=BODIES.get(one.function))
    assert answer.status_code == (200 if one.function in LISTS else 404), answer.text


def test_a_misspelled_filter_is_refused(admin: Client) -> None:
    for method, path in (
        ("GET", "/agents?lable=x"),
        ("GET", "/runs?pge=2"),
        ("GET", "/audit?q=x"),
        ("DELETE", "/tokens/1?and_agents=true"),
    ):
        assert "is unknown here" in admin(method, path, 400)["error"]


def test_what_is_wrong_is_named(admin: Client) -> None:
    for body, sentence in (
        ({"description": "x"}, "`name` is missing"),
        ({"name": "x", "labels": [1]}, "`labels.0`: Not a valid string."),
        ({"name": None}, "`name` can't be null"),
        ({"name": "x", "colour": "red"}, "`colour` is unknown here"),
    ):
        assert admin("POST", "/agents", 400, **body)["error"] == sentence


def test_a_token_is_taken_from_its_header_only(server: Server) -> None:
    secret = server.token("admin")
    Client(server, None)("GET", f"/freeze?token={secret}", 401)
    # curl -u, as Nix sends it
    basic = base64.b64encode(f":{secret}".encode()).decode()
    headers = {"Authorization": f"Basic {basic}"}
    assert Client(server, None).send("GET", "/freeze", headers=headers).status_code == 200


def test_a_token_of_another_kind_is_told_which_is_right(ci: Client) -> None:
    assert ci("GET", "/tokens", 403)["error"] == (
        "this needs an admin token, and yours is an activate token"
    )


# --- tokens for some agents -----------------------------------------------------------------------


@pytest.fixture
def two(peer: Peer, request: pytest.FixtureRequest) -> tuple[str, str]:
    """Two agents that are online."""
    name = re.sub(r"[^0-9A-Za-z]+", "-", request.node.name).strip("-")[:80]
    for agent in (f"{name}-mine", f"{name}-other"):
        peer.registered(agent, **OURS)
    return f"{name}-mine", f"{name}-other"


def limited(server: Server, admin: Client, **terms: Any) -> Client:
    """Clients with a token of CI for some agents, or for a cache."""
    return Client(server, admin("POST", "/tokens", 201, kind=ACTIVATE, **terms)["secret"])


def test_a_limited_token_sees_its_agents_only(
    server: Server, admin: Client, two: tuple[str, str]
) -> None:
    mine, other = two
    run = admin("POST", "/deployments", 201, agents=[mine, other], storePath=STORE_PATHS[0])["id"]
    foreign = admin("POST", "/deployments", 201, agents=[other], storePath=STORE_PATHS[1])["id"]
    client = limited(server, admin, agents=mine)
    assert [one["name"] for one in client("GET", "/agents?limit=1000")["agents"]] == [mine]
    assert client("GET", "/workspace")["agents"] == 1
    result = client("GET", "/deployments?limit=1")
    assert [one["agent"] for one in result["deployments"]] == [mine] and result["next"] is None
    runs = client("GET", "/runs")["runs"]
    assert [(one["id"], one["counts"]) for one in runs] == [(run, {"waiting": 1})]
    assert [one["agent"] for one in client("GET", f"/runs/{run}")["deployments"]] == [mine]
    assert [one["agent"] for one in client("GET", f"/runs/{run}/roll-back")["agents"]] == [mine]
    missing = client("GET", "/runs/999999", 404)["error"].replace("999999", str(foreign))
    for method, path in (("GET", ""), ("GET", "/roll-back"), ("POST", "/roll-back")):
        assert client(method, f"/runs/{foreign}{path}", 404)["error"] == missing
    assert client("POST", f"/runs/{foreign}/retry", 404)["error"] == missing


def test_a_limited_token_changes_its_agents_only(
    server: Server, admin: Client, two: tuple[str, str]
) -> None:
    mine, other = two
    body = {"agents": [mine, other], "storePath": STORE_PATHS[0]}
    run = admin("POST", "/deployments", 201, **body)["id"]
    client = limited(server, admin, agents=mine)
    assert client("PATCH", f"/agents/{mine}", paused=True)["pausedBy"].startswith("token")
    for method, path, more in (
        ("GET", f"/agents/{other}", {}),
        ("PATCH", f"/agents/{other}", {"paused": True}),
        ("PATCH", f"/agents/{mine}", {"name": "another"}),
        ("GET", f"/agents/{other}/deployments/1", {}),
        ("GET", f"/agents/{other}/deployments/1/log", {}),
        ("POST", f"/agents/{other}/deployments/1/cancel", {}),
        ("POST", f"/agents/{other}/deployments/1/retry", {}),
        ("POST", "/deployments", body),
        ("DELETE", f"/agents/{mine}", {}),
    ):
        client(method, path, 403, **more)
    facts = client("POST", f"/runs/{run}/roll-back", 403)["error"]
    assert other not in facts and "name those" in facts
    for path in ("roll-back", "retry"):
        client("POST", f"/runs/{run}/{path}", 404, agents=[other])
        client("POST", f"/runs/{run}/{path}", 409, agents=[mine])  # nothing failed, nothing before
    # whether there is such an agent is not told either
    known = client("GET", f"/agents/{other}", 403)["error"]
    assert known == client("GET", "/agents/nobody", 403)["error"].replace("nobody", other)
    assert client("POST", f"/agents/{mine}/deployments/1/cancel")["status"] == "Cancelled"


def test_a_token_for_one_cache_sees_that_one(server: Server, admin: Client) -> None:
    for name in ("first", "second"):
        admin("POST", "/caches", 201, name=name)
    client = limited(server, admin, cache="second")
    assert [one["name"] for one in client("GET", "/caches")["caches"]] == ["second"]
    assert client("GET", "/caches/second")["recent"] == []
    client("GET", "/caches/first", 403)
