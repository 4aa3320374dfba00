"""Signs of life of deployments: what is sent again, what is given up, what counts as lost."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from workspace_support import OURS, STORE_PATHS, Connection, Peer, running, wait_for

from cachix_workspace import life
from cachix_workspace.deployments import DeploymentRow, Open
from cachix_workspace.life import REPEATS, Decision, Sent, Signs

PATIENCE = 15.0


def row(index: int, status: str) -> DeploymentRow:
    text = f"deployment-{index}"
    return DeploymentRow(
        text, "a", index, "/nix/store/x", None, status, None, None, "", None, None, 0
    )


WAITING = row(2, "Pending")
RUNNING = row(1, "InProgress")
NEW, OLD = Sent(), Sent(index=1, is_new=False)


@pytest.mark.parametrize("is_ours", [True, False])
@pytest.mark.parametrize("silence", [0.0, 100.0])
def test_what_waits_is_sent_once(is_ours: bool, silence: float) -> None:
    now = Open(None, WAITING)
    assert life.decide(now, is_ours, NEW, silence, PATIENCE) == Decision(send=WAITING)
    sent = life.after(NEW, Decision(send=WAITING))
    assert sent == Sent(index=2, is_new=False)
    assert life.decide(now, is_ours, sent, silence, PATIENCE) == Decision()
    assert life.decide(Open(None, None), is_ours, NEW, silence, PATIENCE) == Decision()


@pytest.mark.parametrize("waiting", [None, WAITING])
@pytest.mark.parametrize("silence", [0.0, 100.0])
def test_our_agent_is_sent_what_runs_when_it_registers(
    waiting: DeploymentRow | None, silence: float
) -> None:
    now = Open(RUNNING, waiting)
    assert life.decide(now, True, NEW, silence, PATIENCE) == Decision(send=RUNNING)
    assert life.decide(now, True, OLD, silence, PATIENCE) == Decision()


@pytest.mark.parametrize("sent", [NEW, OLD])
@pytest.mark.parametrize("waiting", [None, WAITING])
def test_another_agent_is_left_alone_while_it_is_at_work(
    sent: Sent, waiting: DeploymentRow | None
) -> None:
    for silence in (0.0, 5.0, 14.9):
        decision = life.decide(Open(RUNNING, waiting), False, sent, silence, PATIENCE)
        assert decision == Decision(pause=PATIENCE - silence)


@pytest.mark.parametrize("sent", [NEW, OLD])
def test_a_silent_deployment_makes_way(sent: Sent) -> None:
    decision = life.decide(Open(RUNNING, WAITING), False, sent, 15.0, PATIENCE)
    assert decision == Decision(send=WAITING, end=RUNNING)


def test_a_silent_deployment_is_repeated_some_times() -> None:
    sent, now = OLD, Open(RUNNING, None)
    for _ in range(REPEATS):
        decision = life.decide(now, False, sent, 15.0, PATIENCE)
        assert decision == Decision(send=RUNNING, pause=PATIENCE)
        sent = life.after(sent, decision)
    assert life.decide(now, False, sent, 15.0, PATIENCE) == Decision()
    other = replace(RUNNING, id="another")
    assert life.decide(Open(other, None), False, sent, 15.0, PATIENCE).send == other


def test_every_decision_is_bounded() -> None:
    for is_ours, sent, running_, waiting, silence in itertools.product(
        (True, False), (NEW, OLD), (None, RUNNING), (None, WAITING), (0.0, 14.0, 16.0)
    ):
        decision = life.decide(Open(running_, waiting), is_ours, sent, silence, PATIENCE)
        assert decision.end is None or decision.send is not None
        assert decision.pause is None or 0 < decision.pause <= PATIENCE


@contextlib.contextmanager
def opened(signs: Signs, id: str) -> Iterator[None]:
    """A socket that is open during the block."""
    signs.enter(id)
    yield
    signs.leave(id)


def test_signs() -> None:
    signs = Signs()
    start = signs.last("a")
    assert signs.last("b", "a") == start  # a server that has just started knows nothing
    signs.note("a")
    assert signs.last("a", "b").moment >= start.moment and signs.last("b") == start
    with opened(signs, "b"), opened(signs, "b"):
        assert signs.silence("b") < 0.01
    assert signs.last("b").moment >= signs.last("a").moment
    signs.forget("b")
    assert signs.last("b") == start


def test_only_what_runs_is_lost() -> None:
    signs = Signs()
    lost = replace(RUNNING, id="x")
    assert signs.lost_since(lost, 60.0) is None
    assert signs.lost_since(lost, 0.0) == signs.last("x").time
    assert signs.lost_since(replace(lost, status="Pending"), 0.0) is None
    with opened(signs, "a"):  # its agent is connected
        assert signs.lost_since(lost, 1.0) is None


# --- real sockets ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with running(patience=1.0, lost_after=1.5) as server:
        yield Peer(server)


def order(peer: Peer, name: str, path: int = 0) -> str:
    return peer.activate({name: STORE_PATHS[path]})[name]


def sent(agent: Connection) -> tuple[str, bool]:
    contents = agent.expect_text()["command"]["contents"]
    return contents["id"], contents.get("resumed", False)


def test_our_agent_that_is_connected_is_at_work(peer: Peer) -> None:
    agent = peer.registered("ours", **OURS)
    first = order(peer, "ours")
    assert sent(agent) == (first, False)
    peer.report("ours", first, "InProgress", step="downloading")
    second = order(peer, "ours", 1)
    assert agent.is_silent(2.0)
    assert peer.status(first)["lostSince"] is None
    peer.report("ours", first, "Succeeded")
    assert sent(agent) == (second, False)


def test_our_agent_that_is_gone_has_lost_its_deployment_for_now(peer: Peer) -> None:
    agent = peer.registered("gone", **OURS)
    deployment = order(peer, "gone")
    assert sent(agent) == (deployment, False)
    peer.report("gone", deployment, "InProgress", step="activating")
    agent.close()
    wait_for(lambda: peer.status(deployment)["lostSince"])
    status = peer.status(deployment)
    assert status["status"] == "InProgress" and status["agentOnline"] is False
    assert status["lostSince"] >= status["createdOn"] and status["agentOfflineSince"]
    assert peer.report("gone", deployment, "InProgress", step="checking").status_code == 200
    assert peer.status(deployment)["lostSince"] is None
    assert peer.report("gone", deployment, "Succeeded").json()["status"] == "Succeeded"
    assert peer.status(deployment)["lostSince"] is None


@pytest.mark.slow
def test_the_open_websocket_of_another_agent_is_no_sign(peer: Peer) -> None:
    agent = peer.registered("foreign")
    first = order(peer, "foreign")
    assert sent(agent) == (first, False)
    peer.report("foreign", first, "InProgress")
    assert sent(agent) == (first, True)
    second = order(peer, "foreign", 1)
    while (deployment := sent(agent)) == (first, True):
        pass
    assert deployment == (second, False)
    assert peer.status(first)["status"] == "Failed"
    assert f"deployment {2} was waiting" in peer.status(first)["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/ws-deployment", "/api/v1/deploy/log/{}"])
def test_the_sockets_of_its_deployment_are(peer: Peer, path: str) -> None:
    name = f"foreign-{len(path)}"
    agent = peer.registered(name)
    deployment = order(peer, name)
    assert sent(agent) == (deployment, False)
    work = peer.agent(name, path.format(deployment))
    peer.report(name, deployment, "InProgress")
    assert agent.is_silent(2.5) and peer.status(deployment)["lostSince"] is None
    work.close()
    began = time.monotonic()
    assert sent(agent) == (deployment, True) and time.monotonic() - began > 0.5


@pytest.mark.slow
def test_log_lines_by_requests_are(peer: Peer) -> None:
    agent = peer.registered("lines")
    deployment = order(peer, "lines")
    assert sent(agent) == (deployment, False)
    peer.report("lines", deployment, "InProgress")
    for number in range(6):
        assert peer.log("lines", deployment, number, ["x"]).status_code == 200
        assert agent.is_silent(0.4)
    assert sent(agent) == (deployment, True)


def test_a_late_report_of_a_lost_deployment_is_accepted(peer: Peer) -> None:
    agent = peer.registered("late")
    deployment = order(peer, "late")
    assert sent(agent) == (deployment, False)
    peer.report("late", deployment, "InProgress")
    agent.close()
    wait_for(lambda: peer.status(deployment)["lostSince"])
    assert peer.report("late", deployment, "Failed", reason="it failed").status_code == 200
    status = peer.status(deployment)
    assert (status["status"], status["reason"], status["lostSince"]) == (
        "Failed",
        "it failed",
        None,
    )
