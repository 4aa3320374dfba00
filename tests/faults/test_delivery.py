"""A workspace that is down, slow or broken: no activation waits, and all reports arrive later."""

import contextlib
import json
import os
import socket
import threading

import closures
import pytest
import scenes
from hosts import wait_until
from machines import FINAL
from proxy import Answer, Proxy
from world import ALWAYS, WAITS

from cachix_connection import Peer, http
from cachix_protocol import Unreachable

pytestmark = pytest.mark.promise(6, 7, 9)
BRIEF = {**WAITS, "ping": 0.3, "silence": 0.8, "connect": 0.7, "call": 0.5}
JSON = "Content-Type: application/json\r\n"
REPORT = "^> PUT /api/v1/deploy/"
# What happens to every report: the messages, the fault, and the number of calls to wait for.
TREATMENTS = {
    "500": (REPORT, Answer(500, body=b"<h1>Internal Server Error</h1>" * 1000), 20),
    "401": (REPORT, Answer(401, JSON, b"{}"), 20),
    "HTML": (REPORT, Answer(200, body=b"<h1>Please log in to this network</h1>"), 20),
    "no answer": (REPORT, "half-open", 6),
    "not read": (REPORT, "stall", 6),
    "reset": (REPORT, "reset", 20),
    "slow": (r"^< \d+ PUT /api/v1/deploy/", "slow", 8),
}


@pytest.fixture
def proxy(live):
    with Proxy(live.url) as proxy:
        yield proxy


def deploy(world, version, output):
    """Order a system whose activation runs shell code that prints something. Returns its id."""
    system = scenes.nixos(world.files, version, extra=output)
    return world.deploy(system, scenes.script(world.files))


def ends(world, deployment):
    """Wait until a deployment has ended on the machine, reported or not. Returns its last step."""
    wait_until(lambda: world.host.step(deployment) in FINAL, 30, f"the end of {deployment}")
    return world.host.step(deployment)


def is_unreported(world, deployment):
    """Whether the workspace has acknowledged nothing of a deployment."""
    path = world.host.state / "deployments" / deployment / "reported.json"
    reported = json.loads(path.read_text()) if path.exists() else {}
    return not (reported.get("started") or reported.get("line") or reported.get("ended"))


def threads(world):
    return len(os.listdir(f"/proc/{world.agent.pid}/task"))


def assert_no_growth(world, count, calls):
    """Wait for more calls, and check that the agent then has hardly more threads and memory.

    `count` returns the number of calls so far.
    """
    start, memory, most = count(), world.agent.memory(), threads(world)
    wait_until(lambda: count() >= start + calls, 30, f"{calls} calls")
    assert threads(world) <= most + 2  # one call, and one that has not ended yet
    assert world.agent.memory() < memory + (8 << 20)  # memory that was freed is kept for reuse


@pytest.mark.parametrize("name", TREATMENTS)
def test_reports_that_fail_delay_nothing_and_arrive_in_the_end(make_world, proxy, finish, name):
    pattern, kind, calls = TREATMENTS[name]
    world = make_world(url=proxy.url, waits=BRIEF)
    proxy.order(pattern, kind, ALWAYS)
    deployment = deploy(world, "second", closures.lines(3000))
    assert ends(world, deployment) == "succeeded"
    assert is_unreported(world, deployment), "the activation has waited for its reports"
    assert_no_growth(world, lambda: proxy.count(REPORT), calls)
    assert is_unreported(world, deployment)
    proxy.heal()
    assert world.ended(deployment) == "succeeded"
    finish(world)


@pytest.mark.long
def test_a_workspace_that_asks_to_be_left_alone_is_left_alone(make_world, proxy, finish):
    """The agent waits at least the requested time between two calls."""
    world = make_world(url=proxy.url, waits=BRIEF)
    proxy.order(REPORT, Answer(429, "Retry-After: 1\r\n" + JSON, b"{}"), ALWAYS)
    deployment = deploy(world, "second", "echo a")
    assert ends(world, deployment) == "succeeded"
    start = proxy.count(REPORT)
    wait_until(lambda: proxy.count(REPORT) >= start + 3, 30, "three calls")
    times = [call.time for call in proxy.seen if call.label.startswith("> PUT")][start:]
    assert all(later - earlier >= 1.0 for earlier, later in zip(times, times[1:])), times
    proxy.heal()
    assert world.ended(deployment) == "succeeded"
    finish(world)


@pytest.mark.promise(3, 5)
def test_a_workspace_that_is_down_from_the_activation_on(make_world, proxy, finish):
    """A system that can't reach it is rolled back, and this is reported once it is up again."""
    world = make_world(
        url=proxy.url,
        waits=BRIEF,
        args=("--activation-timeout=5", "--confirm-timeout=2", "--verbose"),
    )

    def down(*_):
        proxy.refuse()
        return "go"

    world.order(r"^test \S+-second", down)
    deployment = deploy(world, "second", closures.lines(3000))
    assert ends(world, deployment) == "rolled-back"
    assert_no_growth(world, lambda: world.agent.text().count("next attempt in"), 11)
    assert world.agent.text().count("not reported yet") < 5
    proxy.listen()
    assert world.ended(deployment) == "rolled-back"
    assert "could not be reached" in world.workspace.deployment(deployment)["reason"]
    finish(world)


def test_a_log_that_fails_holds_back_neither_the_end_nor_the_next_deployment(
    make_world, proxy, finish
):
    """Not even if the workspace asks for an hour's pause; a new agent tries again at once."""
    world = make_world(url=proxy.url, waits=BRIEF)
    proxy.order(f"{REPORT}log/", Answer(429, "Retry-After: 3600\r\n" + JSON, b"{}"), ALWAYS)

    def refused(*_):
        path = f"{REPORT}log/{world.asked[-1].id}"
        wait_until(lambda: proxy.count(path), what="a log that is refused")
        return "go"

    world.order(r"^test\.end", refused, 2)
    for version in ("second", "third"):
        deployment = deploy(world, version, closures.lines(3000))
        assert world.workspace.wait(deployment, 20) == "Succeeded"
    assert [world.workspace.log(asked.id) for asked in world.asked] == [[], []]
    proxy.heal()
    assert world.agent.stop() == 0
    world.start()
    for asked in world.asked:
        assert world.ended(asked.id) == "succeeded"
    finish(world)


@pytest.mark.parametrize("kind", ["stall", "half-open", "slow"])
@pytest.mark.long
def test_any_log_while_the_workspace_takes_nothing(make_world, proxy, finish, kind):
    """An activation prints megabytes of any bytes without waiting, and nothing is lost."""
    world = make_world(url=proxy.url, waits=BRIEF)
    proxy.order(f"{REPORT}log/", kind, ALWAYS)
    strange = bytes(range(256)) + b"\0\n\n\xc3\n\xff\xfe\0\r\n" + "\u2028\U0001f600\n".encode()
    code = [closures.output(strange), *3 * [closures.long_line(1 << 20)], closures.lines(50_000)]
    deployment = deploy(world, "second", "\n".join([*code, closures.output(strange)]))
    assert ends(world, deployment) == "succeeded"
    assert world.workspace.log(deployment) == []
    assert_no_growth(world, lambda: proxy.count(f"{REPORT}log/"), 3)
    assert world.agent.memory("VmHWM") < 100 << 20
    proxy.heal()
    assert world.ended(deployment) == "succeeded"
    assert len(world.workspace.log(deployment)) > 50_000
    finish(world)


# --- one call -------------------------------------------------------------------------------------


class Drip:
    """A server that answers with `first`, and then byte by byte without an end."""

    def __init__(self):
        self.first = b""
        self.ended = []  # the connections that have ended
        self.closing = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection):
        with contextlib.suppress(OSError):
            connection.recv(1 << 16)
            connection.sendall(self.first)
            while not self.closing.wait(0.02):
                connection.sendall(b"x")
        self.ended.append(connection)
        connection.close()

    def close(self):
        self.closing.set()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


@pytest.fixture
def drip():
    server = Drip()
    yield server
    server.close()


@pytest.mark.promise(10)
@pytest.mark.parametrize(
    ("url", "first"),
    [
        ("http://127.0.0.1:{}", b""),
        ("http://127.0.0.1:{}", b"HTTP/1.1 200 OK\r\nX-Long: "),
        ("http://127.0.0.1:{}", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
        ("http://workspace.example", b"HTTP/1.1 200 OK\r\nX-Long: "),
        ("https://workspace.example", b"HTTP/1.1 200 Connection established\r\nX-Long: "),
        ("https://127.0.0.1:{}", b"\x16\x03\x03\x3f\xff\x02\x00\x3f\xfb"),
    ],
    ids=["status", "header", "chunk", "proxy", "tunnel", "TLS"],
)
def test_a_call_that_is_late_leaves_no_thread_and_no_connection(drip, monkeypatch, url, first):
    """Each byte arrives in time, so that no limit of a single read ends the call."""
    drip.first = first
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{drip.port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for _ in range(3):
        with pytest.raises(Unreachable):
            http(Peer(url.format(drip.port), "t"), "GET", "/", timeout=0.2)
    wait_until(
        lambda: not [thread for thread in threading.enumerate() if thread.name == "call"],
        10,
        "the calls' threads to end",
    )
    wait_until(lambda: len(drip.ended) == 3, 10, "the connections to end")
