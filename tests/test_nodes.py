"""Three nodes of one workspace, behind nginx, with one PostgreSQL."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import partitions
import pytest
from nodes_support import PATH, Nodes, assert_all_is_there, at_work
from pages_support import Browser
from partitions import Proxy, Wire
from test_workspace_directory import fill
from workspace_support import DEADLINE, OURS, Peer, open_socket, wait_for

pytestmark = [pytest.mark.long, pytest.mark.slow]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    # nodes learn of revoked tokens by the news alone
    more = {"revocation_interval": 300.0, "look_interval": 1.0}
    with Nodes(tmp_path_factory.mktemp("nodes"), **more) as nodes:
        yield nodes


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Nodes]:
    """Nodes of one test, which breaks them."""
    with Nodes(tmp_path) as nodes:
        yield nodes


def test_a_deployment_posted_to_one_node_reaches_an_agent_on_another(nodes: Nodes) -> None:
    one, other = nodes.peer_of(0), nodes.peer_of(1)
    agent = one.registered("far", **OURS)
    deployment = other.activate({"far": PATH})["far"]
    assert agent.expect_text()["command"]["contents"]["id"] == deployment
    assert agent.is_silent()
    third = nodes.peer_of(2)
    assert third.status(deployment)["agentOnline"] is True
    agent.close()
    wait_for(lambda: third.status(deployment)["agentOnline"] is False)


def test_viewers_on_any_node_see_a_log_grow(nodes: Nodes) -> None:
    peers = [nodes.peer_of(number) for number in range(3)]
    peers[0].registered("logs", **OURS)
    deployment = peers[1].activate({"logs": PATH})["logs"]
    viewers = [peer.view(deployment) for peer in peers]
    for number, peer in enumerate(peers):
        assert peer.log("logs", deployment, number, [f"line {number}"]).status_code == 200
        for viewer in viewers:
            assert viewer.expect_text()["line"] == f"line {number}"
    peers[0].report("logs", deployment, "Succeeded")
    last = "Successfully deployed"
    peers[1].log("logs", deployment, 3, [last])
    for viewer in viewers:
        assert viewer.expect_text()["line"] == last
        assert viewer.expect_close() == 1000


def test_a_second_connection_replaces_the_first_on_another_node(nodes: Nodes) -> None:
    one, other = nodes.peer_of(0), nodes.peer_of(1)
    first = one.registered("twice", **OURS)
    second = other.registered("twice", **OURS)
    assert first.expect_close() == 4001
    deployment = nodes.peer_of(2).activate({"twice": PATH})["twice"]
    assert second.expect_text()["command"]["contents"]["id"] == deployment
    assert one.status(deployment)["agentOnline"] is True  # the end of the first changes nothing


def test_a_token_that_is_revoked_on_one_node_ends_on_all(nodes: Nodes) -> None:
    server = nodes.servers[0]
    number, secret = server.new_token("agent")
    socks = []
    for place in range(3):
        fields = {"name": f"revoked-{place}", "version": "1", "system": "x"}
        socks.append(open_socket(nodes.servers[place], "/ws", secret, **fields))
        assert socks[-1].expect_text()["method"] == "AgentRegistered"
    admin = server.token("admin")
    answer = nodes.peer_of(1).http("DELETE", f"/api/v1/tokens/{number}", admin)
    assert answer.status_code in (200, 204), answer.text
    for sock in socks:
        assert sock.expect_close() == 4003


def test_an_agent_of_cachix_is_not_sent_again_what_it_logs_elsewhere(nodes: Nodes) -> None:
    """Its log socket is its sign of life, on whatever node that is."""
    one, other = nodes.peer_of(0), nodes.peer_of(1)
    agent = one.registered("theirs")
    deployment = one.activate({"theirs": PATH})["theirs"]
    assert agent.expect_text()["command"]["contents"]["id"] == deployment
    one.report("theirs", deployment, "InProgress")
    log = other.agent("theirs", path=f"/api/v1/deploy/log/{deployment}")
    assert agent.is_silent(25.0)  # its patience is 15 s
    log.close()


def test_one_node_sends_a_message_of_a_webhook(nodes: Nodes) -> None:
    bodies: list[bytes] = []

    class Taker(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            time.sleep(0.3)  # others look meanwhile
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Taker)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    node = nodes.servers[0]
    try:
        node.command("webhook", "add", f"http://127.0.0.1:{server.server_port}/hook")
        number = json.loads(node.command("webhook", "list", "--json"))[0]["id"]
        for _ in range(3):
            node.command("webhook", "test", str(number))
        wait_for(lambda: len(bodies) >= 3, 30.0)
        time.sleep(5.0)  # looks of each node
        assert len(set(bodies)) == len(bodies) == 3
    finally:
        server.shutdown()


def test_a_page_on_one_node_hears_of_changes_on_another(nodes: Nodes) -> None:
    browser = Browser(nodes.servers[1])
    nodes.peer_of(0).registered("paged", **OURS).close()
    url = f"{nodes.servers[1].url}/events?since=0"
    with browser.session.get(url, stream=True, timeout=DEADLINE) as stream:
        assert stream.status_code == 200, stream.text
        lines = stream.iter_lines(1, decode_unicode=True)
        assert any('"all"' in line for line in lines)  # it has begun
        deployment = nodes.peer_of(2).activate({"paged": PATH})["paged"]
        nodes.peer_of(0).report("paged", deployment, "InProgress")
        wanted = f"deployment:{deployment}"
        assert any(wanted in line for line in lines)


def test_a_page_hears_of_a_change_whose_notification_was_lost(nodes: Nodes) -> None:
    browser = Browser(nodes.servers[1])
    nodes.peer_of(0).registered("lost", **OURS).close()
    with nodes.swallowing() as swallow:
        time.sleep(3.0)  # the connections were new: all have looked
        url = f"{nodes.servers[1].url}/events?since={time.time_ns() // 1000}"
        with browser.session.get(url, stream=True, timeout=DEADLINE) as stream:
            lines = stream.iter_lines(1, decode_unicode=True)
            assert any('"all"' in line for line in lines)  # it has begun
            with swallow():
                deployment = nodes.peer_of(2).activate({"lost": PATH})["lost"]
                nodes.peer_of(0).report("lost", deployment, "InProgress")
                time.sleep(0.5)
            assert any('"all"' in line for line in lines)


def test_a_node_with_a_cache_of_its_own_is_refused(nodes: Nodes, tmp_path: Path) -> None:
    data = tmp_path / "data"
    argv = ["serve", f"--data={data}", "--listen=127.0.0.1:0", f"--database={nodes.database}"]
    argv = [nodes.servers[0].argv[0], "-m", "cachix_workspace", *argv]
    process = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert process.returncode == 1
    *_, last = process.stderr.splitlines()
    assert last.startswith("error: another node serves this workspace") and "--cache-shared" in last


def test_the_copy_of_a_data_directory_takes_the_place_of_the_original(own: Nodes) -> None:
    original = own.servers[0]
    copy = own.add()
    copy.stop()
    shutil.copy(original.data / "node", copy.data / "node")
    copy.start()
    assert original.process.wait(DEADLINE) == 0
    wait_for(lambda: any("another server has started as this node" in x for x in original.lines))


def test_a_node_is_killed_under_load(own: Nodes) -> None:
    with at_work(own, 12) as (agents, ci):
        for victim in (own.servers[1], own.servers[0]):
            wait_for(lambda: len(ci.accepted) % 7 == 5, 30)
            victim.kill()
            time.sleep(2.0)
            victim.start()
        time.sleep(1.0)
        assert_all_is_there(own, agents, ci)


def test_a_node_is_stopped_in_order_under_load(own: Nodes) -> None:
    with at_work(own, 6) as (agents, ci):
        time.sleep(1.0)
        assert own.servers[2].stop() == 0
        own.servers[2].start()
        assert_all_is_there(own, agents, ci)
    assert any(agent.codes[1012] for agent in agents) or len(agents) < 3


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_the_database_is_restarted_under_load(own: Nodes, mode: str) -> None:
    with at_work(own, 8) as (agents, ci):
        time.sleep(1.0)
        own.cluster.stop(mode)
        time.sleep(0.5)
        own.cluster.start()
        count = len(ci.accepted)
        wait_for(lambda: len(ci.accepted) > count + 5, 30)
        assert_all_is_there(own, agents, ci)


def test_a_node_that_is_cut_off_its_database_serves_nobody(own: Nodes) -> None:
    proxy = Proxy(own.cluster)
    try:
        cut = own.add(database=proxy.url(own.database))
        peer = Peer.__new__(Peer)
        peer.server = cut
        peer.agent_token, peer.ci_token = own.peer.agent_token, own.peer.ci_token
        agent = peer.registered("cut", **OURS)
        viewer_of = own.peer_of(1)
        deployment = viewer_of.activate({"cut": PATH})["cut"]
        assert agent.expect_text()["command"]["contents"]["id"] == deployment
        proxy.send(signal.SIGSTOP)
        assert agent.expect_close(15.0) == 1012
        wait_for(lambda: peer.http("GET", "/api/v1/deploy/deployments").status_code == 503)
        wait_for(lambda: viewer_of.status(deployment)["agentOnline"] is False)
        elsewhere = viewer_of.registered("cut", **OURS)
        assert elsewhere.expect_text()["command"]["contents"]["id"] == deployment
        assert viewer_of.report("cut", deployment, "Succeeded").status_code == 200
        proxy.send(signal.SIGCONT)
        wait_for(lambda: peer.http("GET", "/api/v1/deploy/deployments").status_code == 200, 30)
        assert peer.status(deployment)["status"] == "Succeeded"
        assert peer.status(deployment)["agentOnline"] is True  # on the other node, still
        assert own.tracebacks() == []
    finally:
        proxy.send(signal.SIGCONT)
        proxy.close()


def test_a_partition_under_load(own: Nodes) -> None:
    """Agents of the node come back elsewhere, with what they have to report."""
    proxy = Proxy(own.cluster)
    try:
        own.servers[0].move_to(proxy.url(own.database))
        with at_work(own, 9) as (agents, ci):
            time.sleep(1.0)
            proxy.send(signal.SIGSTOP)
            time.sleep(6.0)
            proxy.send(signal.SIGCONT)
            assert_all_is_there(own, agents, ci)
    finally:
        proxy.send(signal.SIGCONT)
        proxy.close()


@pytest.mark.parametrize("ways", ["both", "from"])
def test_packets_between_a_node_and_its_database_are_lost(tmp_path: Path, ways: str) -> None:
    """For longer than the node's patience, on both ways or on one, while agents deploy."""
    partitions.require()
    wire = Wire(partitions.address())
    with contextlib.closing(wire), Nodes(tmp_path, listen=wire.address) as nodes:
        cut = nodes.servers[0]
        cut.move_to(wire.url(nodes.database))
        peer = nodes.peer_of(0)
        agent = peer.registered("apart", **OURS)
        with at_work(nodes, 6) as (agents, ci):
            wait_for(lambda: len(ci.accepted) > 5, 30)
            wire.cut(ways)
            assert agent.expect_close(20.0) == 1012
            wait_for(lambda: peer.http("GET", "/healthz").status_code == 503)
            elsewhere = nodes.peer_of(1).registered("apart", **OURS)
            before = len(ci.accepted)
            wait_for(lambda: len(ci.accepted) > before + 5, 60)  # the others go on
            wire.mend()
            wait_for(lambda: peer.http("GET", "/healthz").status_code == 200, 30)
            deployment = peer.activate({"apart": PATH})["apart"]
            assert elsewhere.expect_text()["command"]["contents"]["id"] == deployment
            assert_all_is_there(nodes, agents, ci)


@pytest.mark.parametrize("ends", [False, True], ids=["serves", "ends"])
def test_the_disk_of_the_database_is_full(tmp_path: Path, ends: bool) -> None:
    """PostgreSQL refuses what needs room; for lack of room for its log of writes it ends."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a small disk")
    order = {"json": {"agents": {"agent-0": PATH}}}
    with Nodes(tmp_path, disk=160) as nodes, at_work(nodes, 6) as (agents, ci):
        wait_for(lambda: len(ci.accepted) > 5, 30)
        ballast = fill(nodes.cluster.directory)
        if ends:
            nodes.cluster.panic()
            pid = nodes.cluster.data / "postmaster.pid"
            wait_for(lambda: not pid.exists())
        for peer in map(nodes.peer_of, range(3)):

            def is_refused(peer: Peer = peer) -> bool:
                answer = peer.http("POST", "/api/v2/deploy/activate", **order)
                return answer.status_code in (503, 507)

            wait_for(is_refused, 60)
        time.sleep(1.0)
        ballast.unlink()
        nodes.cluster.revive()
        assert_all_is_there(nodes, agents, ci)
        assert all(node.process.poll() is None for node in nodes.servers)
