"""The seam between nodes: both of its implementations, through the same cases."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable
from unittest import mock

import clusters
import pytest
from clusters import Cluster
from workspace_support import wait_for

from cachix_workspace import notify, websocket
from cachix_workspace.context import Workspace
from cachix_workspace.database import Database
from cachix_workspace.hub import Hub
from cachix_workspace.life import Signs
from cachix_workspace.notify import DUE, GROWN, InProcess, Losses, Notifier, PostgreSQL
from cachix_workspace.settings import Settings

KINDS = [
    pytest.param("in-process", id="in-process"),
    pytest.param("postgresql", id="postgresql", marks=pytest.mark.long),
]


class Ear:
    """Notes what is heard."""

    def __init__(self) -> None:
        self.news: list[tuple[str, tuple[str, ...]]] = []
        self.looks = self.losses = 0

    def hear(self, kind: str, ids: tuple[str, ...]) -> None:
        self.news.append((kind, ids))

    def look(self, all_were_lost: bool) -> None:
        self.looks += 1
        self.losses += all_were_lost

    def ids(self, kind: str) -> list[str]:
        return [each for one, ids in list(self.news) if one == kind for each in ids]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    clusters.require()
    cluster = Cluster()
    yield cluster
    cluster.remove()


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Iterator[Callable[[str], tuple[Notifier, Ear]]]:
    """Start a notifier of a kind. Those of one test share a database."""
    started: list[Any] = []
    databases: list[Database] = []

    def start(kind: str, hear: Any = None, interval: float = 10.0) -> tuple[Notifier, Ear]:
        ear = Ear()
        notifier: Any = InProcess()
        if kind == "postgresql":
            if not databases:
                cluster: Cluster = request.getfixturevalue("cluster")
                databases.append(Database(cluster.create()))
            name = f"node-{len(started)}"
            notifier = PostgreSQL(databases[0].connect_apart, name, interval)
        started.append(notifier)
        notifier.start(hear or ear.hear, ear.look)
        if kind == "postgresql":
            assert notifier.is_connected.wait(10)
        return notifier, ear

    yield start
    for notifier in started:
        notifier.close()
    for database in databases:
        database.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_node_has_heard_its_own_news_at_once(kind: str, start: Any) -> None:
    notifier, ear = start(kind)
    notifier.publish(DUE, ["a", "b"])
    notifier.publish(GROWN, ["c"])
    assert ear.news == [(DUE, ("a", "b")), (GROWN, ("c",))]


@pytest.mark.parametrize("kind", KINDS)
def test_an_id_is_heard_once(kind: str, start: Any) -> None:
    notifier, ear = start(kind)
    notifier.publish(DUE, ["a", "b", "a"])
    assert ear.news == [(DUE, ("a", "b"))]


@pytest.mark.parametrize("kind", KINDS)
def test_news_without_ids_are_news(kind: str, start: Any) -> None:
    notifier, ear = start(kind)
    notifier.publish(notify.REVOKED)
    assert ear.news == [(notify.REVOKED, ())]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_told_to_others_is_not_heard_here(kind: str, start: Any) -> None:
    notifier, ear = start(kind)
    notifier.tell(notify.ALIVE, ["a"])
    notifier.publish(DUE, ["b"])
    assert ear.news == [(DUE, ("b",))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_hearer_that_fails_stops_nobody(kind: str, start: Any) -> None:
    calls = []

    def fail(kind: str, ids: tuple[str, ...]) -> None:
        calls.append(ids)
        raise ValueError("no")

    notifier, _ = start(kind, fail)
    notifier.publish(DUE, ["a"])
    notifier.publish(DUE, ["b"])
    assert calls == [("a",), ("b",)]


@pytest.mark.parametrize("kind", KINDS)
def test_many_threads_publish(kind: str, start: Any) -> None:
    notifier, ear = start(kind)
    names = [[f"{thread}-{number}" for number in range(200)] for thread in range(4)]

    def publish(ids: list[str]) -> None:
        for each in ids:
            notifier.publish(GROWN, [each])

    threads = [threading.Thread(target=publish, args=(ids,)) for ids in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    heard = ear.ids(GROWN)
    assert sorted(heard) == sorted(each for ids in names for each in ids)
    for ids in names:
        assert [each for each in heard if each in set(ids)] == ids  # in the order of each thread


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_is_revoked_ends_at_once(kind: str, start: Any, tmp_path: Path) -> None:
    """Its sockets are closed on all nodes, which forget it, and look nothing up for that."""
    database: Any = None
    count = 2 if kind == "postgresql" else 1
    nodes = [Workspace(Settings(tmp_path), database, Hub(9), Signs()) for _ in range(count)]
    notifier = [start(kind, node.hear)[0] for node in nodes][0]
    socks = {}
    for node in nodes:
        socks[id(node)] = [mock.Mock(token_id=number, log_id=None) for number in (7, 8)]
        for sock in socks[id(node)]:
            node.hub.enter(sock.token_id, 1)
            node.hub.add(sock)
        node.known.tokens.put("hash", mock.Mock())
    notifier.publish(notify.REVOKED, ["7"])
    for node in nodes:
        mine, other = socks[id(node)]
        wait_for(lambda mine=mine: mine.end.call_args_list == [mock.call(*websocket.REVOKED)])
        assert not other.end.called and not node.revoked.is_set()
        assert node.known.tokens.get("hash") is None
    notifier.publish(notify.REVOKED)  # of some token: now they look
    for node in nodes:
        wait_for(node.revoked.is_set)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_heard_after_the_end(kind: str, start: Any) -> None:
    notifier, ear = start(kind)
    notifier.close()
    notifier.publish(DUE, ["a"])
    notifier.tell(DUE, ["b"])
    assert ear.news == []


# --- several nodes --------------------------------------------------------------------------------


@pytest.mark.long
def test_other_nodes_hear_all_of_it_and_once(start: Any) -> None:
    (first, own), (_, second), (_, third) = (start("postgresql") for _ in range(3))
    ids = [f"{number:036}" for number in range(1000)]  # more than one notification takes
    first.publish(DUE, ids)
    first.publish(GROWN, ["log"])
    first.tell(notify.ALIVE, ["alive"])
    first.publish(notify.REVOKED)
    for ear in (second, third):
        wait_for(lambda ear=ear: (notify.REVOKED, ()) in ear.news)
        assert ear.ids(DUE) == ids and ear.ids(GROWN) == ["log"]
        assert ear.ids(notify.ALIVE) == ["alive"]
    assert own.ids(DUE) == ids and own.ids(notify.ALIVE) == []


@pytest.mark.long
def test_a_node_looks_when_its_connection_was_cut(start: Any, cluster: Cluster) -> None:
    (first, _), (second, ear) = start("postgresql"), start("postgresql")
    wait_for(lambda: ear.losses == 1)
    theirs = "FROM pg_stat_activity WHERE datname LIKE 'tests%'"
    terminate = f"SELECT pg_terminate_backend(pid) {theirs}"
    cluster.sql("postgres", terminate)
    wait_for(lambda: ear.losses == 2)
    assert second.is_connected.wait(10)
    wait_for(lambda: first.is_connected.is_set())
    first.publish(DUE, ["after"])
    wait_for(lambda: "after" in ear.ids(DUE))


@pytest.mark.long
def test_a_node_looks_now_and_then(start: Any) -> None:
    _, ear = start("postgresql", interval=0.2)
    wait_for(lambda: ear.looks > 3)


@pytest.mark.long
def test_a_notification_that_is_lost_is_missed(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (first, _), (_, ear) = (start("postgresql", interval=1.0) for _ in range(2))
    first.publish(DUE, ["before"])
    wait_for(lambda: "before" in ear.ids(DUE))
    looks = ear.looks
    wait_for(lambda: ear.looks > looks + 2)
    losses = ear.losses
    wait_for(lambda: ear.looks > looks + 5)
    assert ear.losses == losses  # none is lost
    with monkeypatch.context() as patch:
        patch.setattr(first, "_send", lambda *_: None)
        first.publish(DUE, ["lost"])
        wait_for(lambda: not first._waiting)
    wait_for(lambda: ear.losses > losses)
    assert "lost" not in ear.ids(DUE)


def test_what_is_missed_is_known_by_numbers() -> None:
    losses = Losses(10.0)
    for number in (1, 2, 3):
        losses.note("one", "life", number, 100.0)
    losses.note("two", "life", 1, 100.0)
    assert not losses.take(100.0)
    losses.note("one", "life", 5, 101.0)
    assert losses.take(102.0) and not losses.take(102.0)
    losses.note("one", "next life", 1, 109.0)
    assert losses.take(111.5)  # the first life, and the other node, may have died
    assert not losses.take(118.0)
    losses.end("one", "next life")
    assert not losses.take(1000.0)
    losses.note("late", "life", 9, 1000.0)  # its first ones were not heard
    assert losses.take(1000.0)


@pytest.mark.long
def test_a_strange_notification_is_no_end(start: Any, cluster: Cluster) -> None:
    (first, _), (_, ear) = start("postgresql"), start("postgresql")
    name = cluster.sql("postgres", "SELECT max(oid) FROM pg_database").strip()
    database = cluster.sql(
        "postgres", f"SELECT datname FROM pg_database WHERE oid = {name}"
    ).strip()
    strange = '{"node": "x", "kind": "due", "ids": [], "life": "y", "number": "z"}'
    for payload in ("", "no json", "[]", '{"node": "x"}', strange):
        cluster.sql(database, f"SELECT pg_notify('{notify.CHANNEL}', '{payload}')")
    first.publish(DUE, ["a"])
    wait_for(lambda: ear.ids(DUE) == ["a"])
