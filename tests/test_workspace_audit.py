"""The audit: who did what when, refused tokens, and when each token was used last."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from workspace_support import DEADLINE, STORE_PATHS, Peer, running

from cachix_workspace import app, audit, tokens
from cachix_workspace.audit import Refusals
from cachix_workspace.context import Workspace
from cachix_workspace.database import open_database
from cachix_workspace.hub import Hub
from cachix_workspace.life import Signs
from cachix_workspace.settings import Settings


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with running() as server:
        yield Peer(server)


def entries(peer: Peer, action: str) -> list[dict[str, str]]:
    records = json.loads(peer.server.command("audit", "--limit=1000", "--json"))
    assert [entry["id"] for entry in records] == sorted(entry["id"] for entry in records)
    return [entry for entry in records if entry["action"] == action]


@pytest.mark.long
def test_what_is_ordered_and_cancelled(peer: Peer) -> None:
    peer.registered("web").close()
    deployment = peer.activate({"web": STORE_PATHS[0]})["web"]
    assert peer.http("POST", f"/api/v1/deploy/deployment/{deployment}/cancel").status_code == 200
    (connected,) = entries(peer, "agent")
    assert connected["detail"] == "web connected first" and "(agent" in connected["actor"]
    (ordered,) = entries(peer, "deploy")
    assert ordered["detail"] == f"web, deployment 1: {STORE_PATHS[0]}"
    assert "(activate" in ordered["actor"] and ordered["address"] == "127.0.0.1"
    (cancelled,) = entries(peer, "cancel")
    assert cancelled["detail"] == "web, deployment 1: now Cancelled"


@pytest.mark.long
def test_what_commands_do(peer: Peer) -> None:
    secret = peer.server.command("token", "create", "agent", "--name=db", "--description=the db")
    number = json.loads(peer.server.command("token", "list", "--json"))[-1]["id"]
    peer.server.command("token", "revoke", str(number))
    peer.server.command("cache", "create", "main", "--private")
    creation, revoked = entries(peer, "token create")[-1], entries(peer, "token revoke")[-1]
    assert creation["detail"] == f"{number} (agent, for agents db) the db"
    assert revoked["detail"] == str(number)
    assert entries(peer, "cache create")[-1]["detail"] == "main (private)"
    assert creation["actor"].startswith("command of ") and creation["address"] == ""
    assert secret.strip() not in peer.server.command("audit", "--limit=1000")


def test_refused_tokens_are_noted_once_a_minute(peer: Peer) -> None:
    path = "/api/v1/deploy/deployments"
    for number in range(20):
        assert peer.http("GET", path, f"guess-{number}").status_code == 401
    (refused,) = entries(peer, "token refused")
    assert "this token is unknown here" in refused["detail"] and refused["address"] == "127.0.0.1"
    lines = [line for line in peer.server.lines if "refused a token from 127.0.0.1" in line]
    assert len(lines) == 1 and "guess" not in "".join(peer.server.lines)
    # who brings no token has none refused
    assert requests.get(peer.server.url + path, timeout=DEADLINE).status_code == 401
    assert len(entries(peer, "token refused")) == 1


def test_the_table_shows_the_newest(peer: Peer) -> None:
    for number in range(3):
        peer.server.command("token", "create", "agent", f"--description=table {number}")
    table = peer.server.command("audit", "--limit=2").splitlines()
    assert table[0].split() == ["TIME", "WHO", "FROM", "WHAT", "DETAIL"] and len(table) == 3


def test_many_addresses_take_a_bounded_place(monkeypatch: pytest.MonkeyPatch) -> None:
    refusals, now = Refusals(), [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert refusals.is_due("a") and not refusals.is_due("a")
    due = sum(refusals.is_due(f"address-{number}") for number in range(5000))
    assert due == audit.MOST_ADDRESSES - 1
    now[0] += audit.PAUSE + 1
    assert refusals.is_due("a") and refusals.is_due("another")


def test_when_a_token_was_used_last(tmp_path: Path) -> None:
    settings = Settings(tmp_path / "data")
    database = open_database(settings, create=True)
    with database.write() as connection:
        numbers = [tokens.create(connection, "agent")[0] for _ in range(2)]
    workspace = Workspace(settings, database, Hub(10), Signs())
    workspace.used[numbers[0]] = "2026-11-27T01:02:03.000000Z"
    app._write_used(workspace)
    with database.read() as connection:
        used = {token.id: token.used_on for token in tokens.list_all(connection)}
    assert used == {numbers[0]: "2026-11-27T01:02:03.000000Z", numbers[1]: None}
    assert workspace.used == {}
    database.close()
