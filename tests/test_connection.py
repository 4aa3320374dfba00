"""The agent's connection: kept alive, broken, refused, redirected, proxied, encrypted, ended."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import zlib

import pytest
from closures import nixos, plain, wait_for
from hosts import wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from peer import AGENT_ID, message, transcript
from servers import answering, drip, listen

import cachix_connection
import cachix_deploy
import cachix_protocol
from cachix_connection import Answer, Peer, Waits, backoff, connect
from cachix_protocol import Undecodable, Unreachable, decode_from_agent, decode_to_agent

TOKEN = "peer-agent-token"
BROKEN = ("abrupt TCP EOF", "server close 1001, TCP left open by server")


def start(host, peer, *args, url="", waits=None, **env):
    waits = json.dumps({"backoff": 0.05, "slowest": 0.2, **(waits or {})})
    return host.agent(
        "web", url or peer.url, TOKEN, *args, env={"CACHIX_DEPLOY_WAITS": waits, **env}
    )


def another(peer, number, timeout=20.0):
    """Wait for the agent's connection of this number to /ws, and return it."""
    wait_until(lambda: len(peer.heads("/ws")) >= number, timeout, f"connection {number}")
    return peer.agent()


def present(host, cache, path):
    host.fetch(cache.url, cache.key.public, path)
    return path


# --- alive ----------------------------------------------------------------------------------------


def test_it_pings_and_connects_again_when_nothing_is_heard(host, peer):
    agent = start(host, peer, waits={"ping": 0.25, "silence": 0.8})
    first = peer.agent()
    wait_until(lambda: len(peer.frames("/ws", "ping")) >= 5, what="five pings")
    pings = peer.frames("/ws", "ping")
    assert all(ping["payload"] == "" and ping["conn"] == first.number for ping in pings)
    gaps = [later["t"] - earlier["t"] for earlier, later in zip(pings, pings[1:])]
    assert sorted(gaps)[len(gaps) // 2] > 0.2, gaps
    first.pongs = False
    stopped = time.monotonic()
    another(peer, 2)
    assert 0.5 < time.monotonic() - stopped < 30
    agent.wait_for("no answer for 1 s, connecting again")

    def pinged_again():
        return [ping for ping in peer.frames("/ws", "ping") if ping["conn"] != first.number]

    wait_until(pinged_again, what="a ping on the second connection")


def test_any_frame_keeps_the_connection_alive(host, peer):
    agent = start(host, peer, waits={"ping": 0.5, "silence": 2.0})
    connection = peer.agent()
    connection.pongs = False
    began = time.monotonic()
    while time.monotonic() - began < 2:
        frames = [("ping", b"x"), ("pong", b"unasked"), ("text", message("Nothing", {}))]
        connection.send(*random.choice(frames))
        time.sleep(0.1)
    assert len(peer.heads("/ws")) == 1 and agent.process.poll() is None
    assert len(peer.frames("/ws", "ping")) >= 4


def test_a_workspace_that_pings_is_pinged_only_when_it_is_quiet(host, peer):
    peer.reports = "http"
    agent = start(host, peer, waits={"ping": 0.6, "silence": 3})
    agent.wait_for("is connected to")
    connection, began = peer.agent(), time.monotonic()
    sent = len(peer.frames("/ws", "ping"))
    while time.monotonic() - began < 2:
        connection.send("ping", b"x")
        time.sleep(0.1)
    assert len(peer.frames("/ws", "ping")) <= sent + 1  # a busy machine may be late once
    wait_until(lambda: len(peer.frames("/ws", "ping")) >= sent + 3, what="pings of the agent")
    assert len(peer.heads("/ws")) == 1


def test_pings_are_answered_with_their_payload(host, peer):
    start(host, peer)
    connection = peer.agent()
    payloads = [b"srv-ping-payload", b"", b"x" * 125]
    for payload in payloads:
        connection.send("ping", payload)
    wait_until(lambda: len(peer.frames("/ws", "pong")) == 3, what="three pongs")
    assert [pong["payload"].encode() for pong in peer.frames("/ws", "pong")] == payloads


# --- broken and closed ----------------------------------------------------------------------------


def test_it_survives_every_close_that_cachix_survives(host, peer):
    """As recorded in agent-close-codes. It answers a close, and drops the connection at once.

    The answer has the code that it was closed with.
    """
    labels = [e["label"] for e in transcript("agent-close-codes") if e.get("event") == "scenario"]
    assert labels[-1] == "close without code"
    agent = start(host, peer)
    codes = [re.search(r"\d{4}", label)[0] for label in labels[:-1] if label not in BROKEN]
    codes = [*map(int, codes), *(None for _ in BROKEN)]
    for number, code in enumerate([*codes, 1002, 1003, 1008, 1013, 3000, 4003, 4999], 1):
        connection = another(peer, number)
        if code is None:
            connection.end()
            continue
        connection.send("close", struct.pack(">H", code) + b"some reason")
        assert connection.ended.wait(5), code
        answers = [f for f in peer.frames("/ws", "close") if f["conn"] == connection.number]
        assert [answer["close_code"] for answer in answers] == [code]
        assert agent.process.poll() is None
        agent.wait_for(rf"closed the connection \({code}\): some reason")
    last = peer.agent()
    last.close(None)
    assert agent.wait(12) == 0 and last.ended.wait(5)
    assert peer.frames("/ws", "close")[-1]["payload"] == ""


@pytest.mark.parametrize(
    "payload", [b"\x03", b"\x00\x00", b"\x03\xed", b"\x03\xee", b"\xff\xff", b"\x03\xe9\xff\xfe"]
)
def test_closes_that_break_the_protocol(host, peer, payload):
    agent = start(host, peer)
    peer.agent().send("close", payload)
    another(peer, 2)
    assert agent.process.poll() is None and "Traceback" not in agent.text()


@pytest.mark.parametrize(
    "raw",
    [
        b"\x83\x00",  # reserved opcode 3
        b"\xc1\x00",  # a reserved bit
        b"\x80\x00",  # a continuation of nothing
        b"\x89\x7e\x00\x80" + b"x" * 128,  # a ping that is too long
        b"\x09\x00",  # a fragmented ping
        b"\x81\xff" + b"\xff" * 8,  # a length that can't be
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ],
)
def test_frames_that_break_the_protocol(host, peer, raw):
    agent = start(host, peer, waits={"silence": 1.5, "ping": 0.5})
    peer.agent().raw(raw)
    another(peer, 2)
    assert agent.process.poll() is None and "Traceback" not in agent.text()


def test_replaced_it_warns_and_reconnects_slowly(host, peer):
    agent = start(host, peer, waits={"slowest": 6.0})
    peer.agent().close(4001)
    began = time.monotonic()
    agent.wait_for(r"\(4001\): another agent named web has connected")
    another(peer, 2)
    assert time.monotonic() - began > 2.9
    peer.agent().close(1012)
    began = time.monotonic()
    agent.wait_for(r"\(1012\): it restarts")
    another(peer, 3)
    assert time.monotonic() - began < 2.9


def test_replaced_while_it_bootstraps_it_finishes_and_ends(host, cache, peer):
    system = present(host, cache, nixos(cache, 1, after=wait_for("/run/go-on")))
    agent = start(host, peer, "--bootstrap")
    deployment = peer.deploy(system)
    wait_until(lambda: host.running() == system, what="the activation")
    peer.agent().close(4001)
    agent.wait_for("another agent of this name has taken over")
    host.path("/run/go-on").touch()
    assert peer.finished(deployment)
    assert agent.wait(12) == 0 and len(peer.heads("/ws")) == 1
    assert peer.log(deployment)[-1] == "Successfully activated the deployment."


# --- asked to stop --------------------------------------------------------------------------------


@pytest.mark.promise(6)
@pytest.mark.parametrize("reports", ["http", None])
@pytest.mark.parametrize("code", [1000, None])
def test_asked_to_stop_it_finishes_and_reports_first(host, cache, peer, reports, code):
    peer.reports = reports
    paths = [
        present(host, cache, nixos(cache, number, after=wait_for(f"/run/go-{number}")))
        for number in (1, 2)
    ]
    agent = start(host, peer)
    first = peer.deploy(paths[0])
    wait_until(lambda: host.running() == paths[0], what="the activation")
    second = peer.deploy(paths[1])
    connection = peer.agent()
    connection.send("ping", b"second")
    wait_until(lambda: peer.frames("/ws", "pong"), what="the second deployment's arrival")
    connection.close(code)
    agent.wait_for("asked this agent to stop, after the deployment in progress")
    assert connection.ended.wait(5) and len(peer.frames("/ws", "close")) == 1
    time.sleep(0.5)
    assert agent.process.poll() is None
    host.path("/run/go-1").touch()
    assert peer.finished(first)
    wait_until(lambda: host.running() == paths[1], what="the second activation")
    host.path("/run/go-2").touch()
    assert agent.wait(20) == 0
    for deployment in (first, second):
        assert peer.finished(deployment)
        assert peer.log(deployment)[-1] == "Successfully activated the deployment."
    assert len(peer.heads("/ws")) == 1 and host.profile() == paths[1]


@pytest.mark.promise(6)
def test_asked_to_stop_it_delivers_what_is_not_reported_yet(host, cache, peer):
    peer.reports = "http"
    path = present(host, cache, plain(cache, 1))
    agent = start(host, peer)
    connection = peer.agent()
    fault = peer.misbehave("^/api/", "503")
    deployment = peer.deploy(path)
    wait_until(lambda: host.step(deployment) == "succeeded", what="the end")
    connection.close(1000)
    time.sleep(0.5)
    assert agent.process.poll() is None and not peer.statuses.get(deployment)
    fault.times = 0
    assert agent.wait(20) == 0
    assert peer.finished(deployment)
    assert peer.log(deployment)[-1] == "Successfully activated the deployment."


@pytest.mark.promise(10)
def test_asked_to_stop_twice(host, cache, peer):
    """The operator's SIGTERM ends an agent that is still finishing for the workspace."""
    system = present(host, cache, nixos(cache, 1, after=wait_for("/run/go-on")))
    agent = start(host, peer)
    peer.deploy(system)
    wait_until(lambda: host.running() == system, what="the activation")
    peer.agent().close(1000)
    agent.wait_for("after the deployment in progress")
    stop_in_time(agent)
    host.path("/run/go-on").touch()


@pytest.mark.parametrize("code", [1000, 1001, 4001])
def test_the_answer_to_its_own_close_asks_for_nothing(capsys, code):
    """Whatever ends the agent has said so itself, such as a hand-over."""
    agent = types.SimpleNamespace(stop=threading.Event())
    agent.stop.set()
    with pytest.raises(cachix_deploy.Stopped):
        cachix_deploy.Agent.handle_close(agent, struct.pack(">H", code))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("registers", [True, False])
def test_asked_to_stop_with_nothing_to_do_it_exits_at_once(host, peer, registers):
    peer.registers = registers
    agent = start(host, peer)
    connection = peer.agent()
    if registers:
        agent.wait_for("is connected")
    connection.close(1000)
    assert agent.wait(12) == 0
    assert agent.text().endswith("the workspace asked this agent to stop\n")


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["301", "302", "307", "308"])
def test_a_redirect_is_reported_and_not_followed(host, peer, status):
    peer.misbehave("/ws$", status, times=1)
    agent = start(host, peer)
    redirect = f"and points to {peer.url}/elsewhere, which is not followed: give it as --host"
    agent.wait_for(f"{peer.url}/ws answered HTTP {status} instead of a websocket {redirect}")
    another(peer, 2)
    assert not peer.heads("/elsewhere") and TOKEN not in agent.text()


@pytest.mark.parametrize("status", ["401", "403"])
def test_a_token_that_is_refused_later_is_retried_slowly(host, peer, status):
    agent = start(host, peer, waits={"slowest": 0.6})
    first = peer.agent()
    fault = peer.misbehave("/ws$", status, times=2)
    first.close(4003)
    agent.wait_for(rf"(?s)refused the token \(HTTP {status}\).*; still trying")
    another(peer, 4)
    assert fault.times == 0 and agent.process.poll() is None and TOKEN not in agent.text()
    tries = [e["t"] for e in peer.events if e.get("event") == "http-request"]
    assert tries[2] - tries[1] > 0.5 and tries[3] - tries[2] > 0.5


def test_a_broken_connection_is_dropped_before_the_next_attempt(host, peer):
    agent = start(host, peer, waits={"slowest": 60.0})
    first = peer.agent()
    first.send("close", struct.pack(">H", 4001))
    assert first.ended.wait(5) and len(peer.heads("/ws")) == 1
    assert agent.stop() == 0


def test_a_workspace_that_is_down_at_first(host, peer):
    peer.stop()
    agent = start(host, peer)
    agent.wait_for("no connection to .*/ws: .*Connection refused")
    peer.restart()
    agent.wait_for("web is connected to")
    assert agent.stop() == 0


@pytest.mark.promise(10)
@pytest.mark.parametrize(
    "serve",
    [
        lambda connection: time.sleep(30),
        drip(b"HTTP/1.1 101 Switching Protocols\r\n" + b"X-A: b\r\n" * 1000),
        drip(b"HTTP/1.1 500 No\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100000),
    ],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_connecting_has_a_deadline(serve, scheme):
    listener, url = listen(serve)
    began = time.monotonic()
    with pytest.raises(Unreachable, match="no connection to|instead of a websocket"):
        connect(Peer(url.replace("http", scheme, 1), TOKEN), "/ws", timeout=0.6)
    assert time.monotonic() - began < 20
    listener.close()


@pytest.mark.promise(10)
def test_reaching_has_a_deadline(peer):
    for kind in ("no-pong", "half-open", "silent"):
        peer.misbehave("/ws-deployment", kind, times=1)
        began = time.monotonic()
        with pytest.raises(Unreachable):
            cachix_connection.reach(Peer(peer.url, TOKEN, "web"), 0.5)
        assert time.monotonic() - began < 20
    cachix_connection.reach(Peer(peer.url, TOKEN, "web"), 5)


def test_an_agent_connects_without_what_it_does_not_use(peer):
    code = f"""
import sys
from cachix_connection import Peer, reach
reach(Peer({peer.url!r}, {TOKEN!r}, "web"), 5)
print("inspect" in sys.modules)
"""
    argv = [sys.executable, "-I", "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}"]
    assert subprocess.run(argv, capture_output=True, text=True).stdout == "False\n"


def test_requests_of_several_threads_share_their_connections(peer):
    ways = []

    def ask():
        cachix_connection.http(Peer(peer.url, TOKEN, "web"), "GET", "/nothing")
        ways.append(cachix_connection._sessions[-1])

    for _ in range(3):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert len(set(map(id, ways))) == 1


# --- messages -------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)
# the fields of all messages, with values of the right types
FIELDS = {"id": AGENT_ID, "time": "t", "closureSize": 1, "hasSucceeded": True, "reports": "http"}
FIELDS |= {"storePath": "/nix/store/x", "index": 1, "rollbackScript": None, "resumed": True}
FIELDS |= {"cache": None, "cacheName": "c", "publicKey": "k", "isPublic": True, "uri": "http://a"}
CONTENTS = st.dictionaries(st.sampled_from(list(FIELDS)), JSON, max_size=3).map(
    lambda changes: {**FIELDS, **changes}
)
TAGS = st.sampled_from(
    ["AgentRegistered", "Deployment", "DeploymentStarted", "DeploymentFinished", "Other"]
)
COMMANDS = st.builds(
    lambda tag, c: {"command": {"tag": tag, "contents": c, **c}},
    TAGS,
    CONTENTS | JSON.map(lambda v: {"cache": v}),
)
TEXTS = st.one_of(st.text(), JSON.map(json.dumps), COMMANDS.map(json.dumps))


@pytest.mark.promise(13)
@settings(deadline=None, max_examples=300)
@given(
    st.one_of(st.binary(), TEXTS, TEXTS.map(lambda text: text.encode("utf-16", "surrogatepass")))
)
def test_decoders_raise_undecodable_and_nothing_else(text):
    for decode in (decode_to_agent, decode_from_agent):
        with contextlib.suppress(Undecodable):
            value = decode(text)
            assert cachix_protocol.UUID.fullmatch(value.id)
            if decode is decode_to_agent:
                assert decode(cachix_protocol.encode_to_agent(value)) == value
            else:
                assert decode(cachix_protocol.encode_from_agent(AGENT_ID, value)) == value


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 200_000, "9" * 10_000, b"\xff\xfe", b"\0", "\ud800"]
)
def test_texts_that_break_parsers(text):
    with pytest.raises(Undecodable):
        decode_to_agent(text)


def odd_messages(rng):
    """Messages that are nearly right. They depend on `rng` alone."""
    odd = [None, True, -1, 0, 1.5, 10**30, [], {}, [[]]]
    odd += ["", "x", "\0", "\ud800", "a\nb", "/nix/store/../etc", "--help"]
    for _ in range(150):
        contents = {**FIELDS, "id": rng.choice([AGENT_ID, "x", 1])}
        for name in rng.sample(list(FIELDS), rng.randint(0, 3)):
            contents[name] = rng.choice(odd)
        tag = rng.choice(["AgentRegistered", "Deployment", "Deployment", ""])
        yield json.dumps({"command": {"tag": tag, "contents": contents}})
    for _ in range(50):
        yield "".join(rng.choice('{}[]",:0\\u\n') for _ in range(rng.randint(0, 60)))


@pytest.mark.promise(13)
def test_it_survives_garbage(host, cache, peer):
    rng = random.Random(2026)
    path = present(host, cache, plain(cache, 1))
    agent = start(host, peer)
    connection = peer.agent()
    for text in odd_messages(rng):
        kind = rng.choice(["text", "binary"])
        connection.send_text(text, rng.randint(1, 3), kind)
    connection.send("text", bytes(rng.randrange(256) for _ in range(1000)))
    peer.register(connection, cache=None)
    deployment = peer.deploy(path)
    assert peer.finished(deployment), peer.log(deployment)
    assert agent.process.poll() is None and len(peer.heads("/ws")) == 1
    assert "Traceback" not in agent.text(), agent.text()


@pytest.mark.promise(6, 13)
def test_every_order_with_an_odd_value_gets_its_report(host, cache, peer):
    """Every order that can be decoded is reported, and Nix sees none of these values."""
    agent = start(host, peer)
    peer.agent()
    good = present(host, cache, plain(cache, 1))
    bad_paths = ["", "--help", "\ud800", "a\0b", "x" * 100_000]
    bad_paths += ["/nix/store/..", f"{good}/..", f"{good}\n"]
    bad_scripts = ["", "--option", "\0", "/bin/sh"]
    orders = [(path, None) for path in bad_paths] + [(good, script) for script in bad_scripts]
    for path, script in orders:
        deployment = peer.deploy(path, script)
        assert not peer.finished(deployment, 20)
        wait_until(
            lambda d=deployment: peer.log(d)[-1:] and "is not a store path" in peer.log(d)[-1],
            20,
            "its reason",
        )
    for index in (-1, 0, 10**30):
        assert peer.finished(peer.deploy(good, index=index), 20)
    assert "Traceback" not in agent.text() and host.record() == []


@pytest.mark.promise(13)
@pytest.mark.parametrize(
    ("odd", "public"),
    [
        ({"uri": "http://["}, True),
        ({"uri": "http://["}, False),
        ({"uri": "http://a:b"}, False),
        ({"uri": "\0"}, True),
        ({"uri": "--help"}, False),
        ({"cacheName": "a]", "uri": None}, False),
        ({"publicKey": "\ud800"}, True),
        ({"publicKey": "\0"}, False),
    ],
)
def test_an_impossible_cache_fails_the_deployment_with_a_reason(host, cache, peer, odd, public):
    peer.cache = {**cache.wire(), "isPublic": public, **odd}
    agent = start(host, peer)
    deployment = peer.deploy("/nix/store/00000000000000000000000000000000-nope")
    assert not peer.finished(deployment, 20)
    wait_until(
        lambda: [line for line in peer.log(deployment) if line.startswith("Failed to")],
        what="its reason",
    )
    assert agent.process.poll() is None and "Traceback" not in agent.text()
    assert not [name for name in os.listdir(host.state) if "netrc" in name]


@pytest.mark.parametrize("size", [0, 100, 200, 70_000])
def test_masked_frames_are_accepted(host, cache, peer, size):
    path = present(host, cache, plain(cache, 1))
    start(host, peer)
    contents = {"storePath": path, "id": AGENT_ID, "index": 1, "rollbackScript": None}
    data = message("Deployment", {**contents, "padding": "x" * size}).encode()
    mask = b"\x01\x80\xff\x00"
    masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))
    is_short = len(data) < 1 << 16
    length = struct.pack(">BH" if is_short else ">BQ", 254 if is_short else 255, len(data))
    peer.agent().raw(b"\x81" + length + mask + masked)
    assert peer.finished(AGENT_ID)


# --- ended ----------------------------------------------------------------------------------------


def stop_in_time(agent):
    """Send SIGTERM, and check that the agent exits within its deadline."""
    began = time.monotonic()
    agent.signal(signal.SIGTERM)
    assert agent.wait(12) == 0
    assert time.monotonic() - began < 20
    assert "Traceback" not in agent.text()


@pytest.mark.promise(10)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may listen on the port of name servers")
def test_it_ends_while_the_name_server_hangs(host):
    address = f"127.{random.randint(1, 254)}.{random.randint(1, 254)}.77"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((address, 53))
        server.settimeout(20)
        conf = host.directory / "resolv.conf"
        conf.write_text(f"nameserver {address}\noptions timeout:30 attempts:5\n")
        host.output("mount", "--bind", str(conf), "/etc/resolv.conf")
        agent = start(host, None, url="http://workspace.example")
        assert server.recv(1000)
        stop_in_time(agent)


@pytest.mark.promise(10)
def test_it_ends_while_it_downloads(host, cache, peer):
    peer.cache = cache.wire()
    path = nixos(cache, 1)
    cache.misbehave("/nar/", "stall")
    agent = start(host, peer)
    deployment = peer.deploy(path)
    wait_until(lambda: cache.count("/nar/"), what="the download")
    stop_in_time(agent)
    assert host.step(deployment) == "downloading" and host.record() == []
    wait_until(lambda: not host.processes(), 10, "the end of everything that it had started")
    assert not [name for name in os.listdir(host.state) if "netrc" in name]
    cache.heal()
    cache.ended.set()
    start(host, peer)
    assert peer.finished(deployment) and host.running() == path


@pytest.mark.promise(10)
def test_it_ends_while_it_waits_to_connect_again(host, peer):
    peer.stop()
    agent = start(host, peer, waits={"backoff": 60.0, "slowest": 60.0})
    agent.wait_for("no connection")
    began = time.monotonic()
    stop_in_time(agent)
    assert time.monotonic() - began < 20


def test_it_says_goodbye(host, peer):
    agent = start(host, peer)
    agent.wait_for("is connected")
    stop_in_time(agent)
    closes = wait_until(lambda: peer.frames("/ws", "close"), what="the goodbye")
    assert [frame["close_code"] for frame in closes] == [1000]


# --- patience -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failures", "most"), [(0, 1), (1, 2), (2, 4), (5, 32), (6, 60), (7, 60), (16, 60), (10**6, 60)]
)
def test_backoff_is_exponential_with_full_jitter(failures, most):
    random.seed(failures)
    pauses = [backoff(failures, Waits()) for _ in range(400)]
    assert 0 <= min(pauses) < most * 0.05 and most * 0.95 < max(pauses) <= most
    assert 0.4 * most < sum(pauses) / len(pauses) < 0.6 * most


def test_waits_of_the_environment(monkeypatch):
    monkeypatch.delenv("CACHIX_DEPLOY_WAITS", raising=False)
    assert Waits.from_environment() == Waits()
    assert (Waits().ping, Waits().silence, Waits().slowest) == (30, 60, 60)
    monkeypatch.setenv("CACHIX_DEPLOY_WAITS", '{"ping": 1, "unknown": 2}')
    assert Waits.from_environment() == Waits(ping=1.0)


# --- answers --------------------------------------------------------------------------------------


def test_an_answer_is_a_frozen_value():
    headers = ["content-type: application/json; charset=utf-8", "RETRY-AFTER: 7"]
    listener, url = listen(answering(503, headers, b'{"a": 1}'))
    answer = cachix_connection.http(Peer(url, TOKEN), "GET", "/x", 5)
    listener.close()
    assert (answer.status, answer.body, answer.is_json) == (503, b'{"a": 1}', True)
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    assert answer.retry_after == 7
    with pytest.raises(AttributeError):
        answer.body = b""


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("7", 7),
        ("0.5", 0.5),
        ("-1", 0),
        ("1e9", 3600),
        ("inf", 3600),
        ("nan", 0),
        ("soon", 0),
        ("Tue, 24 Nov 2026 03:00:00 GMT", 0),
    ],
)
def test_retry_after(text, seconds):
    assert Answer(503, {"Retry-After": text}, b"").retry_after == seconds
    assert Answer(503, {}, b"").retry_after == 0


@pytest.mark.parametrize("excess", [0, 1])
def test_a_body_that_is_too_large_is_reported_as_that(monkeypatch, excess):
    monkeypatch.setattr(cachix_connection, "MAX_BODY", 1 << 20)
    listener, url = listen(answering(200, [], b"x" * ((1 << 20) + excess)))
    if excess:
        with pytest.raises(Unreachable, match="GET .*/x failed: the answer is larger than 1 MiB$"):
            cachix_connection.http(Peer(url, TOKEN), "GET", "/x", 10)
    else:
        assert len(cachix_connection.http(Peer(url, TOKEN), "GET", "/x", 10).body) == 1 << 20
    listener.close()


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"


def test_a_compressed_answer_is_not_unpacked():
    """urllib3 before 2.8 never comes to the end of this one, and no deadline ends that."""
    packed = zlib.compress(bytes(300_000)) + b"trailing bytes"
    head = CHUNKED + b"Content-Encoding: deflate\r\n\r\n"
    heads = []

    def serve(connection):
        heads.append(connection.recv(1 << 16))
        connection.sendall(head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(packed), packed))

    listener, url = listen(serve)
    with pytest.raises(Unreachable, match="the answer is encoded as 'deflate', which we never"):
        cachix_connection.http(Peer(url, TOKEN), "GET", "/x", 10)
    assert b"\r\nAccept-Encoding: identity\r\n" in heads[0]
    listener.close()


@pytest.mark.parametrize("before", [b"", b"2\r\nok\r\n"])
def test_a_line_between_chunks_does_not_fill_the_memory(before):
    sent = []

    def serve(connection):
        connection.recv(1 << 16)
        connection.sendall(CHUNKED + b"\r\n" + before)
        while sum(sent) < 1 << 28:
            sent.append(connection.send(b"0" * (1 << 16)))

    listener, url = listen(serve)
    with pytest.raises(Unreachable):
        cachix_connection.http(Peer(url, TOKEN), "GET", "/x", 10)
    listener.close()
    assert sum(sent) < 1 << 26


def test_an_answer_in_chunks():
    chunks = b"".join(b"%x\r\n%s\r\n" % (size, b"x" * size) for size in (1, 70_000, 300_000))

    def serve(connection):
        connection.recv(1 << 16)
        connection.sendall(CHUNKED + b"\r\n" + chunks + b"0\r\n\r\n")

    listener, url = listen(serve)
    assert cachix_connection.http(Peer(url, TOKEN), "GET", "/x", 10).body == b"x" * 370_001
    listener.close()
