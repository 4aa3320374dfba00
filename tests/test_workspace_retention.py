"""Old deployments are removed, and logs written into fewer rows."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
from sqlalchemy import func, select, update
from workspace_support import OURS, STORE_PATHS, Peer, command, running, wait_for

from cachix_workspace import logs, retention
from cachix_workspace.database import Database, open_database
from cachix_workspace.retention import Limits, Past, too_old
from cachix_workspace.settings import Settings
from cachix_workspace.tables import deployments, log_chunks, runs

LETTERS = {"S": "Succeeded", "F": "Failed", "C": "Cancelled", "P": "Pending", "I": "InProgress"}


def history(text: str) -> list[Past]:
    """Deployments, oldest first, such as `Sa F Sb P`: status and path, a day each, today's last."""
    words = text.split()
    return [
        Past(
            str(index),
            index,
            LETTERS[word[0]],
            word[1:] or "x",
            f"2026-11-{10 + index - len(words):02}T00:00:00Z",
        )
        for index, word in enumerate(words, 1)
    ]


@pytest.mark.parametrize(
    ("text", "limits", "surplus"),
    [
        ("Sa Sb Sc Sd", Limits(), ""),
        ("Sa Sb Sc Sd", Limits(1), "1 2"),  # what runs, and the one before it
        ("Sa Sb Sc Sd", Limits(3), "1"),
        ("Sa Sb F F F F", Limits(1), "3 4 5"),
        ("Sa Sb Sb Sb F", Limits(1), "2 3"),  # the newest of the same path
        ("F F F", Limits(1), "1 2"),
        ("I F F P", Limits(1), "2 3"),
        ("C C Sa", Limits(2), "1"),
        ("Sa Sb Sc Sd", Limits(days=2), "1 2"),
        ("Sa Sb Sc Sd", Limits(days=9), ""),
        ("F F F F F", Limits(4, 2), "1 2 3"),
        ("F", Limits(1, 0.001), ""),  # the newest one stays
        ("", Limits(1), ""),
    ],
)
def test_what_is_too_old(text: str, limits: Limits, surplus: str) -> None:
    now = datetime.datetime(2026, 11, 10, 12)
    oldest = (now - datetime.timedelta(days=limits.days or 1)).strftime("%Y-%m-%dT%H:%M:%S")
    assert sorted(too_old(history(text), limits, oldest)) == surplus.split()


def chunks(database: Database, deployment: str) -> int:
    mine = log_chunks.c.deployment_id == deployment
    with database.read() as connection:
        query = select(func.count()).select_from(log_chunks).where(mine)
        return int(connection.execute(query).scalar_one())


@pytest.mark.long
def test_prune_beside_a_server() -> None:
    with running() as server:
        peer = Peer(server)
        agent = peer.registered("web", **OURS)
        ids = []
        for number in range(6):
            deployment = peer.activate({"web": STORE_PATHS[number % 2]})["web"]
            ids.append(deployment)
            agent.expect_text()
            peer.report("web", deployment, "InProgress", step="activating")
            for line in range(20):
                peer.log("web", deployment, line, [f"line {line}"])
            if number < 5:
                peer.report("web", deployment, "Succeeded" if number < 4 else "Failed")
        database = open_database(Settings(server.data))
        with database.write() as connection:
            long_ago = {"ended_on": "2026-01-01T00:00:00Z"}
            ended = deployments.c.ended_on.is_not(None)
            connection.execute(update(deployments).where(ended).values(**long_ago))
            connection.execute(update(runs).values(created_on="2026-01-01T00:00:00Z"))
        assert chunks(database, ids[3]) == 20
        command("prune", f"--data={server.data}", status=64)
        dry = command("prune", "--keep-deployments=1", "--dry-run", f"--data={server.data}")
        assert dry.stderr == "3 deployments would be removed\n"
        result = command("prune", "--keep-deployments=1", f"--data={server.data}")
        assert result.stderr.startswith("removed 3 deployments, made 2 logs compact")
        listed = json.loads(server.command("deployment", "list", "--json"))
        assert sorted(one["index"] for one in listed) == [3, 4, 6]
        assert [chunks(database, each) for each in ids] == [0, 0, 1, 1, 0, 20]
        assert peer.lines(ids[3]) == [f"line {line}" for line in range(20)]
        assert len(json.loads(server.command("run", "list", "--json"))) == 3
        assert server.command("audit").count("prune") == 1
        # the one under way goes on
        assert peer.log("web", ids[5], 20, ["the last"]).ok
        assert peer.report("web", ids[5], "Succeeded").json()["status"] == "Succeeded"
        assert peer.lines(ids[5])[-1] == "the last"
        database.close()


def test_a_log_that_is_compact_can_grow(tmp_path: Path) -> None:
    """Lines may still come: the offsets are the same."""
    with running() as server:
        peer = Peer(server)
        agent = peer.registered("web")
        deployment = peer.activate({"web": STORE_PATHS[0]})["web"]
        agent.expect_text()
        for line in range(30):
            peer.log("web", deployment, line, [f"line {line}"])
        peer.report("web", deployment, "Failed")
        database = open_database(Settings(server.data))
        with database.write() as connection:
            retention._make_compact(connection, deployment)
        assert chunks(database, deployment) == 1
        assert peer.log("web", deployment, 30, ["more"]).ok
        with database.read() as connection:
            assert len(logs.read(connection, deployment, 0)) == 31
        assert peer.lines(deployment)[29:] == ["line 29", "more"]
        database.close()


def test_numbers_of_runs_are_given_once() -> None:
    with running() as server:
        peer = Peer(server)
        for name in ("web", "db"):
            peer.registered(name)
        for name in ("web", "web", "web", "db"):
            peer.activate({name: STORE_PATHS[0]})
        server.command("agent", "remove", "db")
        database = open_database(Settings(server.data))
        with database.write() as connection:
            connection.execute(update(runs).values(created_on="2026-01-01T00:00:00Z"))
        database.close()
        server.command("prune", "--keep-deployments=1")
        order = {"agents": {"web": STORE_PATHS[1]}}
        answer = peer.http("POST", "/api/v2/deploy/activate", json=order).json()
        assert answer["run"] == 5


def test_by_night() -> None:
    with running("--keep-deployments=2") as server:
        database = open_database(Settings(server.data))
        now = datetime.datetime.now(datetime.timezone.utc)
        wait_for(lambda: not retention.is_due(database, now))
        tomorrow = now.replace(hour=4) + datetime.timedelta(days=1)
        assert retention.is_due(database, tomorrow)
        assert not retention.is_due(database, now.replace(hour=1))
        database.close()


@pytest.mark.parametrize("option", ["--keep-deployments=0", "--keep-days=-1", "--keep-days=x"])
def test_wrong_limits(tmp_path: Path, option: str) -> None:
    for name in ("serve", "prune"):
        refused = command(name, option, f"--data={tmp_path}/data", status=64)
        assert option.partition("=")[0] in refused.stderr
