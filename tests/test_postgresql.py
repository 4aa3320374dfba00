"""PostgreSQL in place of SQLite: how it is named, what moves there, transactions that meet."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import clusters
import partitions
import pytest
from clusters import Cluster
from partitions import Wire
from sqlalchemy import Connection, inspect, select, text
from sqlalchemy.exc import SQLAlchemyError
from workspace_support import DEADLINE, OURS, Peer, Server, command, wait_for

from cachix_protocol import IN_PROGRESS, PENDING, Spec
from cachix_workspace import (
    agents,
    deployments,
    nodes,
    orders,
    owners,
    people,
    tables,
    tokens,
    webhooks,
)
from cachix_workspace import database as database_module
from cachix_workspace.database import Database, Lock, get_meta, open_database, prepare, put_meta
from cachix_workspace.orders import Actor
from cachix_workspace.refusal import Refusal
from cachix_workspace.reports import Report
from cachix_workspace.settings import Settings

pytestmark = pytest.mark.long
PATH = "/nix/store/" + 32 * "a" + "-system"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    clusters.require()
    cluster = Cluster()
    cluster.make_template()
    yield cluster
    cluster.remove()


@pytest.fixture
def database(cluster: Cluster) -> Iterator[Database]:
    database = Database(cluster.create(clusters.TEMPLATE))
    yield database
    database.close()


# --- where the database is ------------------------------------------------------------------------


def test_a_data_directory_names_its_database(cluster: Cluster, tmp_path: Path) -> None:
    data, url = tmp_path / "data", cluster.create()
    command("init", f"--data={data}", f"--database={url}")
    assert not (data / "workspace.db").exists()
    note = data / "database.json"
    assert note.stat().st_mode & 0o077 == 0 and json.loads(note.read_text()) == {"url": url}
    secret = command("token", "create", "agent", "--name=web", f"--data={data}").stdout
    assert secret.startswith("agent-")
    name = url.partition("@/")[2].partition("?")[0]
    assert cluster.sql(name, "SELECT count(*) FROM tokens").strip() == "1"


def test_a_file_has_the_url(cluster: Cluster, tmp_path: Path) -> None:
    data, file = tmp_path / "data", tmp_path / "url"
    file.write_text(cluster.create() + "\n")
    command("init", f"--data={data}", f"--database-file={file}")
    assert json.loads((data / "database.json").read_text()) == {"file": str(file)}
    command("token", "list", f"--data={data}")
    file.write_text("postgresql://nowhere.invalid/x")
    process = command("token", "list", f"--data={data}", status=1)
    assert "the database x of PostgreSQL at nowhere.invalid can't be used" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("postgresql://u:secret@h/d", "write the URL into a file"),
        ("postgresql://h/d?password=secret", "write the URL into a file"),
        ("sqlite:///secret", "must be a URL of PostgreSQL"),
        ("secret", "is no URL of a database"),
    ],
)
def test_urls_that_are_refused(url: str, sentence: str, tmp_path: Path) -> None:
    process = command("init", f"--data={tmp_path}", f"--database={url}", status=64)
    assert sentence in process.stderr and "secret" not in process.stderr


def test_a_directory_with_a_database_of_its_own_keeps_it(cluster: Cluster, tmp_path: Path) -> None:
    command("init", f"--data={tmp_path / 'data'}")
    url = f"--database={cluster.create()}"
    process = command("init", f"--data={tmp_path / 'data'}", url, status=1)
    assert "migrate-database" in process.stderr


# --- backups and the move -------------------------------------------------------------------------


def test_a_backup_is_restored(cluster: Cluster, tmp_path: Path) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    server = Server(data, f"--database={cluster.create()}")
    try:
        peer = Peer(server)
        peer.registered("web").close()
        deployment = peer.activate({"web": PATH})["web"]
        assert peer.log("web", deployment, 0, ["one", "two"]).status_code == 200
        server.command("backup", str(tmp_path / "backup"))
    finally:
        server.kill()
    url = cluster.create()
    arguments = ("restore", str(tmp_path / "backup"), f"--data={other}", f"--database={url}")
    assert "1 deployments had not ended" in command(*arguments).stderr
    assert "has a workspace: name an empty database" in command(*arguments, status=1).stderr
    server = Server(other)
    try:
        peer.server = server
        assert peer.lines(deployment) == ["one", "two"]
        assert peer.status(deployment)["status"] == "Cancelled"
        peer.registered("new").close()  # numbers go on
    finally:
        server.kill()


def test_a_workspace_moves_while_its_agents_wait(cluster: Cluster, tmp_path: Path) -> None:
    data = tmp_path / "data"
    server = Server(data)
    peer = Peer(server)
    try:
        peer.registered("web").close()
        peer.activate({"web": PATH})
        deployment = peer.activate({"web": PATH})["web"]
        peer.report("web", deployment, IN_PROGRESS)
        peer.log("web", deployment, 0, ["before"])
        url = cluster.create()
        serving = command("migrate-database", f"--to={url}", f"--data={data}", status=1)
        assert "another server serves" in serving.stderr
    finally:
        assert server.stop() == 0
    command("migrate-database", f"--to={url}", f"--data={data}")
    assert not (data / "workspace.db").exists() and (data / "workspace.db.moved").exists()
    server.start()
    try:
        agent = peer.registered("web", **OURS)
        assert agent.expect_text()["command"]["contents"]["id"] == deployment
        assert peer.log("web", deployment, 1, ["after"]).status_code == 200
        assert peer.report("web", deployment, "Succeeded").status_code == 200
        assert peer.lines(deployment) == ["before", "after"]
        following = peer.activate({"web": PATH})["web"]
        assert peer.status(following)["index"] == 3
        assert server.token("agent")  # a number that nothing has yet
    finally:
        server.kill()


def test_a_move_into_a_database_in_use_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    data = tmp_path / "data"
    command("init", f"--data={data}")
    to = f"--to={cluster.create(clusters.TEMPLATE)}"
    process = command("migrate-database", to, f"--data={data}", status=1)
    assert "has tables: name an empty one" in process.stderr
    assert (data / "workspace.db").exists() and not (data / "database.json").exists()


# --- transactions that meet -----------------------------------------------------------------------


def meet(database: Database, first: Callable[[Any], Any], second: Callable[[Any], Any]) -> Any:
    """Run `second` in a transaction that begins while that of `first` is open; its result."""
    results: list[Any] = []

    def run() -> None:
        with database.write(Lock.ROWS) as connection:
            try:
                results.append(second(connection))
            except Refusal as refusal:
                results.append(refusal)

    thread = threading.Thread(target=run)
    with database.write(Lock.ROWS) as connection:
        first(connection)
        thread.start()
        waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        with database.read() as other:  # until it waits for us, or has ended

            def has_met() -> bool:
                count = other.exec_driver_sql("SELECT pg_stat_clear_snapshot()") and int(
                    other.exec_driver_sql(waits).scalar_one()
                )
                return bool(count) or not thread.is_alive()

            wait_for(has_met)
    thread.join(DEADLINE)
    return results[0]


def known(database: Database, name: str = "web") -> agents.AgentRow:
    with database.write() as connection:
        return agents.register(connection, name, "x86_64-linux", "1", "1")


def ordered(connection: Any, name: str = "web") -> deployments.DeploymentRow:
    spec = Spec.from_json({"agents": {name: PATH}})
    return orders.order(connection, spec, Actor("a test")).rows[name]


def test_orders_for_an_agent_get_numbers_in_turn(database: Database) -> None:
    known(database)
    second = meet(database, ordered, ordered)
    assert second.index == 2
    with database.read() as connection:
        rows = deployments.list_some(connection, 10, "web")
    assert [(row.index, row.status) for row in rows] == [(2, PENDING), (1, "Cancelled")]


def test_a_report_and_an_order_meet(database: Database) -> None:
    agent = known(database)
    with database.write() as connection:
        row = ordered(connection)
    report = Report.from_json({"status": IN_PROGRESS, "time": "2026-01-01T00:00:00Z"})

    def reported(connection: Any) -> Any:
        own = deployments.find_own(connection, "web", row.id)
        return deployments.apply_report(connection, own, report)

    after, accepted = meet(database, ordered, reported)
    assert (after.status, accepted) == ("Cancelled", False)
    with database.read() as connection:
        is_open = deployments.find_open(connection, [agent.id])[agent.id]
    assert is_open.running is None and is_open.waiting is not None


def test_only_one_deployment_of_an_agent_runs(database: Database) -> None:
    known(database)
    report = Report.from_json({"status": IN_PROGRESS, "time": "2026-01-01T00:00:00Z"})

    def reported(id: str) -> Callable[[Any], Any]:
        def apply(connection: Any) -> Any:
            own = deployments.find_own(connection, "web", id)
            return deployments.apply_report(connection, own, report)

        return apply

    with database.write() as connection:
        first = ordered(connection)
    with database.write() as connection:
        reported(first.id)(connection)
        second = ordered(connection)
    meet(database, reported(second.id), reported(first.id))
    with database.read() as connection:
        rows = deployments.list_some(connection, 10, status=IN_PROGRESS)
    assert [row.id for row in rows] == [second.id]


@pytest.mark.parametrize(
    ("terms", "names", "sentence"),
    [
        ({"agents": "web-*", "most": 1}, ("web-1", "web-2"), "has had them"),
        ({"agents": ""}, ("web", "db"), "belongs to agent web"),
    ],
    ids=["enrolment", "unbound"],
)
def test_of_two_agents_that_come_together_a_token_admits_one(
    database: Database, terms: Any, names: tuple[str, str], sentence: str
) -> None:
    with database.write() as connection:
        _, secret = tokens.create(connection, "agent", **terms)
        token = tokens.find_by_secret(connection, secret)
    assert token is not None
    rows = {name: known(database, name) for name in names}

    def admit(name: str) -> Callable[[Any], Any]:
        return lambda connection: owners.admit(connection, token, rows[name])

    refusal = meet(database, admit(names[0]), admit(names[1]))
    assert isinstance(refusal, Refusal) and sentence in str(refusal)


def test_two_first_connections_make_one_agent(database: Database) -> None:
    def register(connection: Any) -> agents.AgentRow:
        return agents.register(connection, "web", "x86_64-linux", "1", "1")

    second = meet(database, register, register)
    with database.read() as connection:
        assert [row.id for row in agents.list_all(connection)] == [second.id]


def test_a_link_signs_in_once(database: Database) -> None:
    with database.write() as connection:
        secret = people.make_link(connection, people.first_admin(connection))

    def use(connection: Any) -> Any:
        link = people.use_link(connection, secret)
        return link and link.state

    assert meet(database, use, use) == "used"


def test_notes_in_the_meta_table_meet(database: Database) -> None:
    meet(database, lambda one: put_meta(one, "key", "1"), lambda two: put_meta(two, "key", "2"))
    with database.read() as connection:
        assert get_meta(connection, "key") == "2"


def test_texts_sort_by_their_bytes_and_have_no_nul(database: Database) -> None:
    for name in ("b", "B", "a-b", "a.b"):
        known(database, name)
    with database.write() as connection:
        agents.describe(connection, "b", "one\0two")
        names = [row.name for row in agents.list_all(connection)]
        assert agents.find(connection, "b").description == "one\N{REPLACEMENT CHARACTER}two"
    assert names == sorted(names)


def test_nodes_that_start_together_make_one_schema(cluster: Cluster) -> None:
    url = cluster.create()
    failures: list[BaseException] = []

    def start() -> None:
        database = Database(url)
        try:
            with database.write() as connection:
                prepare(connection)
        except BaseException as error:
            failures.append(error)
        finally:
            database.close()

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert failures == []


def test_a_database_that_restarts_is_no_traceback(cluster: Cluster, tmp_path: Path) -> None:
    own = Cluster("max_connections=50")
    server = Server(tmp_path / "data", f"--database={own.create()}")
    try:
        peer = Peer(server)
        agent = peer.registered("web")
        own.stop("immediate")
        answer = peer.http("GET", "/api/v1/deploy/deployments")
        assert answer.status_code == 503 and "can't use its database" in answer.json()["error"]
        own.start()
        wait_for(lambda: peer.http("GET", "/api/v1/deploy/deployments").status_code == 200)
        deployment = peer.activate({"web": PATH})["web"]
        with_agent = agent.expect_text()
        assert with_agent["command"]["contents"]["id"] == deployment
        assert not any("Traceback" in line for line in server.lines)
    finally:
        server.kill()
        own.remove()


def test_settings_do_not_show_the_url() -> None:
    assert "secret" not in repr(Settings(Path("x"), database="postgresql://u:secret@h/d"))


def test_a_late_word_of_one_node_does_not_take_an_agent_from_another(database: Database) -> None:
    agent = known(database)
    early, late = "2026-01-01T00:00:01.000000Z", "2026-01-01T00:00:02.000000Z"

    def here(node: str, number: int, time: str) -> tuple[str | None, int | None, bool]:
        with database.write(Lock.ROWS) as connection:
            agents.mark_here(connection, node, {agent.id: agents.Arrived(number, time)})
            row = agents.find(connection, "web")
        return row.node_id, row.connection, row.connected

    with database.write() as connection:
        agents.mark_here(connection, "", {agent.id: agents.Arrived(0, early)})
    assert here("two", 7, late) == ("two", 7, True)
    assert here("one", 5, early) == ("two", 7, True)  # it was written late
    with database.write() as connection:
        assert agents.mark_gone(connection, "one", [5]) == []
        assert agents.mark_gone(connection, "two", [7]) == [agent.id]
    assert here("one", 9, early) == ("one", 9, True)  # now it is nowhere else
    assert here("one", 8, early) == ("one", 8, True)


# --- nodes ----------------------------------------------------------------------------------------


def test_one_node_does_what_is_done_for_all(database: Database) -> None:
    def leads(node: str, task: str = "webhooks", seconds: float = 60.0) -> bool:
        with database.write(Lock.ROWS) as connection:
            return nodes.leads(connection, task, node, seconds)

    assert leads("one") and leads("one") and not leads("two")
    assert leads("two", "retention") and not leads("one", "retention")
    with database.write() as connection:
        nodes.resign(connection, "one")
    assert leads("two") and not leads("one")
    assert leads("two", seconds=-1.0) and leads("one")  # its time was over


def test_nodes_that_begin_to_lead_together(database: Database) -> None:
    def leads(node: str) -> Callable[[Any], Any]:
        return lambda connection: nodes.leads(connection, "webhooks", node, 60.0)

    assert meet(database, leads("one"), leads("two")) is False


def test_a_message_is_claimed_once(database: Database) -> None:
    with database.write() as connection:
        hook = webhooks.create(connection, "http://hook.invalid/x", "json", ["failed"], None)
        webhooks.test(connection, hook.id, "http://w")
    with database.read() as connection:
        [(_, message)] = webhooks.due(connection)

    def claim(connection: Any) -> bool:
        return webhooks.claim(connection, message)

    assert meet(database, claim, claim) is False


def test_agents_of_a_node_that_is_dead_are_offline(database: Database) -> None:
    settings = Settings(Path("x"), has_shared_directory=True, node_timeout=0.5)
    with database.write() as connection:
        starts = {node: nodes.enter(connection, settings, node) for node in ("one", "two")}
        for name, node in (("web", "one"), ("db", "two")):
            agents.register(connection, name, "x", "1", "1", place=(node, 1))
    time.sleep(0.6)
    with database.write() as connection:
        assert nodes.beat(connection, settings, "two", starts["two"])
        dead = nodes.bury(connection, settings)
        rows = {row.name: row.connected for row in agents.list_all(connection)}
        assert len(dead) == 1 and rows == {"web": False, "db": True}
        assert nodes.bury(connection, settings) == []
        assert nodes.beat(connection, settings, "one", starts["one"])  # it was only slow
        again = nodes.enter(connection, settings, "one")
        assert again > starts["one"]
        assert not nodes.beat(connection, settings, "one", starts["one"])


def test_an_older_schema_of_postgresql_is_migrated(cluster: Cluster, tmp_path: Path) -> None:
    settings = Settings(tmp_path / "data", database=cluster.create())
    open_database(settings, create=True).close()
    new = structure(settings.database)
    database = Database(settings.database)
    with database.engine.begin() as connection:
        for statement in (
            "DROP TABLE nodes",
            "DROP SEQUENCE connection_numbers",
            "ALTER TABLE agents DROP COLUMN node_id, DROP COLUMN connection",
            "ALTER TABLE deployments DROP COLUMN sent_to",
            "UPDATE meta SET value = '9' WHERE key = 'version'",
        ):
            connection.exec_driver_sql(statement)
    database.close()
    assert structure(settings.database) != new
    open_database(settings).close()
    assert structure(settings.database) == new
    assert (tmp_path / "data" / "workspace.dump.schema-9").stat().st_size > 1000


def structure(url: str) -> object:
    """The columns, indexes and sequences of a database."""
    database = Database(url)
    found = inspect(database.engine)
    tables = {
        name: (
            sorted((each["name"], str(each["type"])) for each in found.get_columns(name)),
            sorted(str(each["name"]) for each in found.get_indexes(name)),
        )
        for name in found.get_table_names()
        if name != "alembic_version"
    }
    sequences = found.get_sequence_names()
    database.close()
    return tables, sorted(sequences)


def test_a_node_that_is_cut_off_in_a_transaction_holds_up_nobody() -> None:
    partitions.require()
    wire = Wire(partitions.address())
    cluster = Cluster(f"listen_addresses={wire.address}")
    url = cluster.create()
    near, far = Database(url), Database(wire.url(url))
    has_begun, may_end = threading.Event(), threading.Event()

    def hold() -> None:
        with contextlib.suppress(SQLAlchemyError), far.write():
            has_begun.set()
            may_end.wait(60)

    holder = threading.Thread(target=hold, daemon=True)
    try:
        with near.write() as connection:
            prepare(connection)
        holder.start()
        assert has_begun.wait(DEADLINE)
        wire.cut()
        with near.write() as connection:  # it raises where the lock can't be had
            put_meta(connection, "key", "value")
    finally:
        wire.mend()
        may_end.set()
        holder.join(DEADLINE)
        cluster.remove()


def test_a_migration_is_tried_again_where_a_node_is_in_the_way(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here a reader has the one table, and wants the other."""
    has_read, has_locked, attempts = threading.Event(), threading.Event(), []

    def read() -> None:
        with database.read() as connection:
            connection.execute(select(tables.deployments))
            has_read.set()
            assert has_locked.wait(DEADLINE)
            connection.execute(select(tables.agents))

    def migrate(connection: Connection) -> None:
        attempts.append(connection)
        connection.execute(text("SET LOCAL deadlock_timeout = '50ms'"))  # it is the one that fails
        connection.execute(text("LOCK TABLE agents"))
        has_locked.set()
        time.sleep(0.3)
        connection.execute(text("LOCK TABLE deployments"))

    monkeypatch.setattr(database_module, "migrate", migrate)
    reader = threading.Thread(target=read)
    reader.start()
    assert has_read.wait(DEADLINE)
    database_module._upgrade(database)
    reader.join(DEADLINE)
    assert len(attempts) == 2
