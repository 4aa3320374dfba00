"""Orders: placed, retried, rolled back, refused; and that what waits is sent when it may be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from workspace_support import OURS, STORE_PATHS, Peer, Server, running

from cachix_protocol import CANCELLED, FAILED, IN_PROGRESS, PENDING, SUCCEEDED, Spec
from cachix_workspace import agents, audit, deployments, freeze, orders, runs
from cachix_workspace.database import Database, note_change, open_database
from cachix_workspace.deployments import DeploymentRow
from cachix_workspace.orders import Actor, Back, Order, Wanted
from cachix_workspace.refusal import Refusal
from cachix_workspace.reports import Report
from cachix_workspace.runs import Source
from cachix_workspace.settings import Settings

A, B, C, SCRIPT, OTHER_SCRIPT = STORE_PATHS
ANNA = Actor("anna", "10.0.0.9")
SIGNATURE = {"key": "ci-1", "sequence": 1, "signature": "c2ln"}
TIME = "2026-11-24T01:02:03.000000Z"


class Fleet:
    """Agents in a database: `web` and `db` have connected, `new` was added only."""

    def __init__(self, database: Database) -> None:
        self.database = database
        with database.write() as connection:
            agents.register(connection, "web", "x86_64-linux", "1.11.1", "0.1.0")
            agents.register(connection, "db", "aarch64-linux", "1.11.1", "0.1.0")
            agents.add(connection, "new")

    def order(self, spec: dict[str, str], scripts: Any = None, **more: Any) -> Order:
        """Order as CI does."""
        with self.database.write() as connection:
            return orders.order(connection, Spec(spec, scripts or {}, **more), ANNA)

    def end(self, row: DeploymentRow, status: str, outcome: str | None = None) -> DeploymentRow:
        """Let an agent report the end of a deployment."""
        with self.database.write() as connection:
            report = Report(status, TIME, outcome=outcome)
            return deployments.apply_report(connection, row, report)[0]

    def deploy(self, name: str, path: str, status: str = SUCCEEDED, **more: Any) -> DeploymentRow:
        """Order a deployment, and let it end."""
        return self.end(self.order({name: path}, **more).rows[name], status)

    def now(self, row: DeploymentRow) -> DeploymentRow:
        with self.database.read() as connection:
            return deployments.find(connection, row.id)

    def call(self, function: Any, *arguments: Any, **more: Any) -> Any:
        """Call what takes a connection to the database."""
        with self.database.write() as connection:
            return function(connection, *arguments, **more)

    def refused(self, function: Any, *arguments: Any, **more: Any) -> Refusal:
        """Call what is to be refused, without any trace."""
        before = self.traces()
        with pytest.raises(Refusal) as caught:
            self.call(function, *arguments, **more)
        assert self.traces() == before
        return caught.value

    def traces(self) -> tuple[Any, ...]:
        with self.database.read() as connection:
            entries = audit.list_some(connection, 1000)
            rows = deployments.list_some(connection, 1000)
            return runs.list_some(connection, 1000), rows, entries, agents.list_all(connection)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    database = open_database(Settings(tmp_path), create=True)
    yield Fleet(database)
    database.close()


# --- place ----------------------------------------------------------------------------------------


def test_one_order_is_one_run(fleet: Fleet) -> None:
    scripts = {"x86_64-linux": SCRIPT, "aarch64-linux": OTHER_SCRIPT}
    source = Source("a1b2c3", "main", "Mend it")
    with fleet.database.write() as connection:
        spec = Spec({"web": A, "db": B}, scripts)
        order = orders.order(connection, spec, ANNA, source)
    web, db = order.rows["web"], order.rows["db"]
    assert (web.store_path, web.rollback_script, web.status) == (A, SCRIPT, PENDING)
    assert (db.store_path, db.rollback_script, db.index) == (B, OTHER_SCRIPT, 1)
    assert {row.run_id for row in order.rows.values()} == {order.run_id}
    assert {row.actor for row in order.rows.values()} == {"anna"}
    with fleet.database.read() as connection:
        run = runs.get(connection, order.run_id)
        assert (run.actor, run.action, run.origin, run.of_run) == ("anna", "deploy", source, None)
        assert [each.name for each in runs.members(connection, order.run_id)] == ["db", "web"]
        noted = audit.list_some(connection, 2)
    assert {(each.actor, each.address, each.action) for each in noted} == {
        ("anna", "10.0.0.9", "deploy")
    }


def test_a_later_order_goes_on_with_its_run(fleet: Fleet) -> None:
    first = fleet.order({"web": A})
    later = fleet.call(orders.order, Spec({"db": A, "new": A}, {}), ANNA, None, first.run_id)
    assert later.run_id == first.run_id
    with fleet.database.read() as connection:
        names = [each.name for each in runs.members(connection, first.run_id)]
        assert names == ["db", "new", "web"] and len(runs.list_some(connection, 10)) == 1


@pytest.mark.parametrize("run_id", [0, -1, 2, 10**30, -(10**30)])
def test_an_order_can_not_go_on_with_no_run(fleet: Fleet, run_id: int) -> None:
    fleet.order({"web": A})
    refusal = fleet.refused(orders.order, Spec({"db": A}, {}), ANNA, None, run_id)
    assert refusal.code == 404


def test_an_order_can_not_go_on_with_the_run_of_others(fleet: Fleet) -> None:
    first = fleet.order({"web": A})
    bert = Actor("bert", "10.0.0.9")
    assert fleet.refused(orders.order, Spec({"db": A}, {}), bert, None, first.run_id).code == 403
    again = fleet.call(orders.deploy_path, ["web"], B, ANNA, "roll-back")
    assert fleet.refused(orders.order, Spec({"db": A}, {}), ANNA, None, again.run_id).code == 403


def test_a_newer_order_replaces_what_waits(fleet: Fleet) -> None:
    first = fleet.order({"web": A, "db": A})
    second = fleet.order({"web": B})
    assert second.replaced == [first.rows["web"].id]
    replaced = fleet.now(first.rows["web"])
    assert (replaced.status, replaced.reason) == (CANCELLED, "replaced by deployment 2")
    assert fleet.now(first.rows["db"]).status == PENDING


def test_what_runs_is_not_replaced(fleet: Fleet) -> None:
    begun = fleet.end(fleet.order({"web": A}).rows["web"], IN_PROGRESS)
    assert fleet.order({"web": B}).replaced == []
    assert fleet.now(begun).status == IN_PROGRESS


def test_unknown_agents_are_named_and_nothing_is_ordered(fleet: Fleet) -> None:
    spec = Spec({"web": A, "mail": A, "ftp": A}, {})
    refusal = fleet.refused(orders.order, spec, ANNA)
    assert refusal.code == 400 and "unknown agents: ftp, mail" in str(refusal)


def test_what_ran_before_is_noted(fleet: Fleet) -> None:
    assert fleet.deploy("web", A).before is None
    assert fleet.deploy("web", B).before == A
    assert fleet.deploy("web", C, FAILED).before == B
    assert fleet.order({"web": C}).rows["web"].before == B


# --- retry ----------------------------------------------------------------------------------------


def test_retry_repeats_what_failed(fleet: Fleet) -> None:
    failed = fleet.deploy("web", A, FAILED, scripts={"x86_64-linux": SCRIPT})
    order = fleet.call(orders.retry, {"web": failed}, ANNA, of_run=failed.run_id)
    row = order.rows["web"]
    assert (row.store_path, row.rollback_script, row.index) == (A, SCRIPT, 2)
    assert (row.retry_of, row.status, row.id != failed.id) == (1, PENDING, True)
    with fleet.database.read() as connection:
        run = runs.get(connection, order.run_id)
        assert (run.action, run.of_run) == ("retry", failed.run_id)
        assert audit.list_some(connection, 1)[0].action == "retry"


@pytest.mark.parametrize("status", [PENDING, IN_PROGRESS])
def test_what_has_not_ended_is_not_retried(fleet: Fleet, status: str) -> None:
    row = fleet.order({"web": A}).rows["web"]
    row = fleet.end(row, status) if status == IN_PROGRESS else row
    refusal = fleet.refused(orders.retry, {"web": row}, ANNA)
    assert refusal.code == 409 and "web has not ended" in str(refusal)


def test_nothing_is_not_retried(fleet: Fleet) -> None:
    refusal = fleet.refused(orders.retry, {}, ANNA)
    assert refusal.code == 409 and "nothing failed" in str(refusal)


def test_what_was_cancelled_can_be_ordered_again(fleet: Fleet) -> None:
    row = fleet.order({"web": A}).rows["web"]
    cancelled, _ = fleet.call(deployments.cancel, row.id)
    assert fleet.call(orders.retry, {"web": cancelled}, ANNA).rows["web"].retry_of == 1


def test_a_retry_for_an_agent_that_never_connected_keeps_all_scripts(fleet: Fleet) -> None:
    scripts = {"x86_64-linux": SCRIPT, "aarch64-linux": OTHER_SCRIPT}
    row = fleet.order({"new": A}, scripts).rows["new"]
    cancelled, _ = fleet.call(deployments.cancel, row.id)
    again = fleet.call(orders.retry, {"new": cancelled}, ANNA).rows["new"]
    agent = fleet.call(agents.register, "new", "aarch64-linux", "1.11.1", "0.1.0")
    fleet.call(orders.choose_scripts, agent)
    assert fleet.now(again).rollback_script == OTHER_SCRIPT


# --- roll back ------------------------------------------------------------------------------------


def test_rolling_a_run_back_returns_each_agent_to_what_it_ran(fleet: Fleet) -> None:
    fleet.deploy("web", A, scripts={"x86_64-linux": SCRIPT})
    fleet.deploy("db", B)
    run = fleet.order({"web": C, "db": C})
    rows = {name: fleet.end(row, SUCCEEDED) for name, row in run.rows.items()}
    plan = fleet.call(orders.plan_back, rows)
    assert plan == [Back("db", C, B), Back("web", C, A)]
    order = fleet.call(orders.roll_back, rows, ANNA, of_run=run.run_id)
    result = {name: (row.store_path, row.rollback_script) for name, row in order.rows.items()}
    assert result == {"db": (B, None), "web": (A, SCRIPT)}  # A with the check it had then
    assert {row.retry_of for row in order.rows.values()} == {None}
    with fleet.database.read() as connection:
        back = runs.get(connection, order.run_id)
        assert (back.action, back.of_run) == ("roll-back", run.run_id)
        assert {each.action for each in audit.list_some(connection, 2)} == {"roll back"}


def test_agents_that_can_not_go_back_say_why_and_the_others_go(fleet: Fleet) -> None:
    fleet.deploy("web", A)
    fleet.deploy("db", A)
    run = fleet.order({"web": B, "db": B, "new": B})
    rows = {name: fleet.end(row, SUCCEEDED) for name, row in run.rows.items()}
    fleet.order({"db": C})
    plan = fleet.call(orders.plan_back, rows)
    assert plan == [
        Back("db", B, None, "deployment 3 is newer"),
        Back("new", B, None, "nothing is known to have run before"),
        Back("web", B, A),
    ]
    assert set(fleet.call(orders.roll_back, rows, ANNA).rows) == {"web"}


def test_a_run_that_changed_nothing_is_not_rolled_back(fleet: Fleet) -> None:
    fleet.deploy("web", A)
    failed = fleet.deploy("web", B, FAILED)
    assert fleet.call(orders.plan_back, {"web": failed}) == [
        Back("web", A, None, "runs it already")
    ]
    refusal = fleet.refused(orders.roll_back, {"web": failed}, ANNA)
    assert refusal.code == 409 and "nothing to roll back" in str(refusal)


def test_what_the_agent_says_it_runs_counts(fleet: Fleet) -> None:
    """It was changed by hand: back to what ran before that run, not to what is deployed now."""
    fleet.deploy("web", A)
    row = fleet.deploy("web", B)
    with fleet.database.write() as connection:
        change = agents.agents.update().where(agents.agents.c.name == "web").values(running=C)
        connection.execute(change)
    assert fleet.call(orders.plan_back, {"web": row}) == [Back("web", C, A)]
    assert fleet.order({"web": A}).rows["web"].before == C


def test_a_former_path_is_deployed_with_the_check_that_it_had(fleet: Fleet) -> None:
    fleet.deploy("web", A, scripts={"x86_64-linux": SCRIPT})
    fleet.deploy("web", A, scripts={"x86_64-linux": OTHER_SCRIPT})
    fleet.deploy("db", A)
    order = fleet.call(orders.deploy_path, ["web", "db"], A, ANNA)
    result = {name: row.rollback_script for name, row in order.rows.items()}
    assert result == {"web": OTHER_SCRIPT, "db": None}
    with pytest.raises(Refusal, match="unknown agents: mail"):
        fleet.call(orders.deploy_path, ["mail"], A, ANNA)


# --- refused --------------------------------------------------------------------------------------


def test_agents_that_want_signatures_take_orders_of_ci_only(fleet: Fleet) -> None:
    fleet.deploy("web", A)
    fleet.deploy("db", A)
    signed = fleet.deploy("web", B, FAILED, signatures={"web": SIGNATURE})
    unsigned = fleet.deploy("db", B, FAILED)
    rows = {"web": signed, "db": unsigned}
    assert fleet.call(orders.signed_only, ["web", "db"]) == ["web"]
    refusals = [
        fleet.refused(orders.retry, rows, ANNA),
        fleet.refused(orders.deploy_path, ["web"], A, ANNA),
        fleet.refused(orders.deploy_path, ["db", "web"], A, ANNA),
    ]
    for refusal in refusals:
        assert refusal.code == 409 and "web take signed deployments only" in str(refusal)
    assert fleet.order({"web": C}, signatures={"web": SIGNATURE}).rows["web"].signature


def test_a_signed_run_is_not_rolled_back_here(fleet: Fleet) -> None:
    fleet.deploy("web", A)
    row = fleet.deploy("web", B, signatures={"web": SIGNATURE})
    assert fleet.call(orders.plan_back, {"web": row}) == [Back("web", B, A)]
    assert fleet.refused(orders.roll_back, {"web": row}, ANNA).code == 409


def test_a_frozen_workspace_takes_no_orders_from_anybody(fleet: Fleet) -> None:
    fleet.deploy("web", A)
    row = fleet.deploy("web", B)
    frozen = fleet.call(freeze.freeze, " the database\n moves ", "anna")
    assert fleet.call(freeze.freeze, "another reason", "bob") == frozen  # the first one counts
    attempts: list[tuple[Any, ...]] = [
        (orders.order, Spec({"web": C}, {}), ANNA),
        (orders.place, {"web": Wanted(C)}, ANNA),
        (orders.retry, {"web": row}, ANNA),
        (orders.roll_back, {"web": row}, ANNA),
        (orders.deploy_path, ["web"], A, ANNA),
    ]
    for function, *arguments in attempts:
        refusal = fleet.refused(function, *arguments)
        assert (refusal.code, str(refusal)) == (423, frozen.sentence)
    assert frozen.sentence.endswith(" by anna: the database moves")
    assert fleet.call(freeze.thaw) and not fleet.call(freeze.thaw)
    assert fleet.order({"web": C}).rows["web"].status == PENDING


@pytest.mark.parametrize("reason", ["", "  \n"])
def test_a_freeze_has_a_reason(fleet: Fleet, reason: str) -> None:
    assert fleet.refused(freeze.freeze, reason, "anna").code == 400


# --- sent when it may be --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with running(revocation_interval=0.1) as server:
        yield Peer(server)


def beside(server: Server, function: Any, *arguments: Any) -> None:
    """Change the database as a command beside the server does."""
    database = open_database(Settings(server.data))
    with database.write() as connection:
        function(connection, *arguments)
        note_change(connection)
    database.close()


def test_a_paused_agent_is_sent_what_waits_once_it_is_resumed(peer: Peer) -> None:
    agent = peer.registered("web", **OURS)
    beside(peer.server, agents.pause, ["web"], "anna")
    first = peer.activate({"web": A})["web"]
    assert agent.is_silent(1.0)
    facts = peer.status(first)
    assert facts["status"] == PENDING and facts["agentPausedSince"] is not None
    second = peer.activate({"web": B})["web"]
    assert peer.status(first)["status"] == CANCELLED
    again = peer.registered("web", **OURS)  # nor when it connects
    assert again.is_silent(0.5)
    beside(peer.server, agents.resume, ["web"])
    sent = again.expect_text()["command"]["contents"]
    assert (sent["id"], sent["storePath"]) == (second, B)
    assert again.is_silent()
    assert peer.status(second)["agentPausedSince"] is None


def test_what_a_paused_agent_has_begun_goes_on(peer: Peer) -> None:
    agent = peer.registered("busy", **OURS)
    begun = peer.activate({"busy": A})["busy"]
    agent.expect_text()
    beside(peer.server, agents.pause, ["busy"], "anna")
    assert peer.report("busy", begun, IN_PROGRESS, step="downloading").status_code == 200
    resumed = peer.registered("busy", **OURS)
    assert resumed.expect_text()["command"]["contents"]["resumed"] is True
    assert peer.report("busy", begun, SUCCEEDED).status_code == 200


def test_an_added_agent_gets_the_rollback_script_of_its_system(peer: Peer) -> None:
    beside(peer.server, agents.add, "fresh")
    scripts = {"x86_64-linux": SCRIPT, "aarch64-linux": OTHER_SCRIPT}
    ordered = peer.activate({"fresh": A}, scripts)["fresh"]
    facts = peer.status(ordered)
    assert (facts["status"], facts["agentOnline"], facts["agentOfflineSince"]) == (
        PENDING,
        False,
        None,
    )
    agent = peer.registered("fresh", system="aarch64-linux", **OURS)
    sent = agent.expect_text()["command"]["contents"]
    assert (sent["id"], sent["rollbackScript"]) == (ordered, OTHER_SCRIPT)


def test_an_added_agent_of_a_system_without_a_script(peer: Peer) -> None:
    beside(peer.server, agents.add, "other")
    ordered = peer.activate({"other": A}, {"x86_64-linux": SCRIPT})["other"]
    agent = peer.registered("other", system="riscv64-linux", **OURS)
    sent = agent.expect_text()["command"]["contents"]
    assert (sent["id"], sent["rollbackScript"]) == (ordered, None)


def test_ci_is_told_why_a_frozen_workspace_takes_nothing(peer: Peer) -> None:
    peer.registered("ice", **OURS)
    beside(peer.server, freeze.freeze, "the database moves", "anna")
    for version in ("v1", "v2"):
        path = f"/api/{version}/deploy/activate"
        answer = peer.http("POST", path, json={"agents": {"ice": A}})
        assert answer.status_code == 423
        assert answer.json()["error"].endswith("by anna: the database moves")
    beside(peer.server, freeze.thaw)
    assert peer.activate({"ice": A})["ice"]


def test_ci_says_who_it_is(peer: Peer) -> None:
    peer.registered("named", **OURS)
    source = {"commit": "a1b2c3d4e5f6", "branch": "main", "url": "javascript:alert(1)"}
    body = {"agents": {"named": A}, "source": source}
    answer = peer.http("POST", "/api/v2/deploy/activate", json=body)
    ordered = answer.json()["agents"]["named"]["id"]
    facts = peer.status(ordered)
    assert facts["startedBy"].startswith("CI (token ") and "main@a1b2c3d" in facts["startedBy"]
    database = open_database(Settings(peer.server.data))
    with database.read() as connection:
        origin = runs.get(connection, facts["run"]).origin
    database.close()
    assert (origin.commit, origin.branch, origin.url) == ("a1b2c3d4e5f6", "main", "")
    for wrong in ([], "x", {"commit": 5}):
        answer = peer.http("POST", "/api/v2/deploy/activate", json={**body, "source": wrong})
        assert answer.status_code == 400 and "`source`" in answer.json()["error"]


def test_ci_goes_on_with_its_run(peer: Peer) -> None:
    for agent in ("first", "second"):
        peer.registered(agent, **OURS)
    path, source = "/api/v2/deploy/activate", {"commit": "a1b2c3d4e5f6", "actor": "anna"}
    answer = peer.http("POST", path, json={"agents": {"first": A}, "source": source}).json()
    run = answer["run"]
    assert answer["runUrl"].endswith(f"/runs/{run}")
    body = {"agents": {"second": A}, "source": source, "run": run}
    again = peer.http("POST", path, json=body).json()
    assert again["run"] == run and again["runUrl"] == answer["runUrl"]
    facts = peer.http("GET", f"/api/v1/runs/{run}").json()
    assert [each["agent"] for each in facts["deployments"]] == ["first", "second"]
    assert facts["source"]["actor"] == "anna"
    other = peer.server.token("activate")
    for status, change, token in (
        (400, {"run": "1"}, None),
        (400, {"run": True}, None),
        (404, {"run": 10**9}, None),
        (403, {"source": {"commit": "f" * 12}}, None),
        (403, {}, other),
    ):
        answer = peer.http("POST", path, token, json={**body, **change})
        assert answer.status_code == status, (change, answer.text)
