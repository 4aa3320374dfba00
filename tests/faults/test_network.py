"""Network faults at every message of a deployment, in both directions.

The deployment ends as if nothing had happened.
"""

import json

import closures
import pytest
import scenes
from hosts import wait_until
from invariants import assert_invariants
from proxy import FAULTS, Proxy
from world import ALWAYS, WAITS

from cachix_protocol import SUCCESS_LINE

pytestmark = pytest.mark.promise(2, 3, 6, 7, 10)
BRIEF = {**WAITS, "ping": 0.3, "silence": 0.8, "connect": 0.7, "call": 0.7}
QUICK = ("--activation-timeout=5", "--confirm-timeout=5")
STATUS, LOG = r"PUT /api/v1/deploy/deployment/\S+/status", r"PUT /api/v1/deploy/log/"


def connecting(world, proxy, order):
    """Make the agent connect anew, and wait until it does so in spite of the fault."""
    before = world.agent.text().count("is connected to")
    order.times = 1
    proxy.refuse()
    proxy.listen()
    wait_until(
        lambda: world.agent.text().count("is connected to") > before,
        what=f"a connection in spite of {order}",
    )


def at_once(world, proxy, order):
    order.times = 1


def at_the_end(world, proxy, order):
    """Make the fault ready after the last effect on the machine."""

    def ready(*_):
        order.times = 1
        return "go"

    world.order(r"^boot\.end", ready)


# The messages of a deployment with our workspace, and how each fault is made ready.
MESSAGES = {
    "handshake": (connecting, "^> GET /ws$"),
    "welcome": (connecting, "^< 101 GET /ws$"),
    "registered": (connecting, "^< ws /ws text"),
    "deployment": (at_once, "^< ws /ws text"),
    "ping": (at_once, "^> ws /ws ping"),
    "pong": (at_once, "^< ws /ws pong"),
    "status": (at_once, f"^> {STATUS}"),
    "status-answer": (at_once, f"^< 200 {STATUS}"),
    "log": (at_once, f"^> {LOG}"),
    "log-answer": (at_once, f"^< 200 {LOG}"),
    "reach": (at_once, "^> GET /ws-deployment$"),
    "reach-answer": (at_once, "^< 101 GET /ws-deployment$"),
    "reach-ping": (at_once, "^> ws /ws-deployment ping"),
    "reach-pong": (at_once, "^< ws /ws-deployment pong"),
    "end": (at_the_end, f"^> {STATUS}"),
    "end-answer": (at_the_end, f"^< 200 {STATUS}"),
    "last-line": (at_the_end, f"^> {LOG}"),
    "last-line-answer": (at_the_end, f"^< 200 {LOG}"),
}
# The same with Cachix's protocol.
FRAMES, LOGS = "/ws-deployment", r"/api/v1/deploy/log/\S+"
HOSTED = {
    "report-handshake": f"^> GET {FRAMES}$",
    "report-welcome": f"^< 101 GET {FRAMES}$",
    "report": f"^> ws {FRAMES} text",
    "report-ping": f"^> ws {FRAMES} ping",
    "report-pong": f"^< ws {FRAMES} pong",
    "log-handshake": f"^> GET {LOGS}$",
    "log-welcome": f"^< 101 GET {LOGS}$",
    "log-line": f"^> ws {LOGS} text",
    "log-ping": f"^> ws {LOGS} ping",
    "log-pong": f"^< ws {LOGS} pong",
}


@pytest.fixture
def proxy(live):
    with Proxy(live.url) as proxy:
        proxy.delay = 0.9  # longer than a call may take: the call is repeated, and arrives twice
        yield proxy


def happened(order):
    wait_until(lambda: order.times == 0, 20, f"{order.kind} at a message {order.pattern}")


@pytest.mark.parametrize("message", MESSAGES)
def test_a_fault_at_a_message(make_world, proxy, finish, message):
    """The deployment still succeeds, and is activated just once."""
    ready, pattern = MESSAGES[message]
    world = make_world(url=proxy.url, args=QUICK, waits=BRIEF)
    for fault in FAULTS:
        order = proxy.order(pattern, fault, times=0)
        ready(world, proxy, order)
        deployment = scenes.deploy(world, fault)
        end = world.ended(deployment)
        assert end == "succeeded", (order, world.workspace.deployment(deployment))
        happened(order)
        activated = [visit.argument for visit in world.visits if visit.point == "test"]
        assert activated == [asked.path for asked in world.asked], order
        assert_invariants(world)
    finish(world)


@pytest.mark.promise(3, 5)
@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ("reach", "reset"),
        ("reach-answer", "half-open"),
        ("reach-answer", "slow"),
        ("reach-ping", "truncate"),
        ("reach-pong", "cut"),
    ],
)
def test_a_system_from_which_the_workspace_is_never_reached(
    make_world, proxy, finish, message, fault
):
    world = make_world(
        url=proxy.url, args=("--activation-timeout=5", "--confirm-timeout=2"), waits=BRIEF
    )
    order = proxy.order(MESSAGES[message][1], fault, ALWAYS)
    deployment = scenes.deploy(world, "second")
    assert world.ended(deployment) == "rolled-back", world.workspace.deployment(deployment)
    assert order.times < ALWAYS
    assert "could not be reached" in world.workspace.deployment(deployment)["reason"]
    proxy.heal()
    finish(world)


# --- Cachix's protocol ----------------------------------------------------------------------------


@pytest.mark.parametrize("message", HOSTED)
def test_a_fault_with_the_hosted_protocol(host, cache, peer, message):
    """Nothing is acknowledged there, so lines may arrive twice; no line is lost, nor the end."""
    script = closures.script(cache, "talks", closures.lines(300))
    with Proxy(peer.url) as proxy:
        proxy.delay = 0.9
        env = {"CACHIX_DEPLOY_WAITS": json.dumps(BRIEF)}
        host.agent("web", proxy.url, "t0ken", *QUICK, env=env)
        peer.agent()
        for fault in FAULTS:
            path = closures.plain(cache, fault)
            host.fetch(cache.url, cache.key.public, path, script)
            order = proxy.order(HOSTED[message], fault)
            deployment = peer.deploy(path, script)
            assert peer.finished(deployment), order
            happened(order)
            arrived(host, peer, deployment)
            assert host.profile() == path


def arrived(host, peer, deployment):
    """Check that each line arrived at least once, and that all final reports agree."""
    reported = host.state / "deployments" / deployment / "reported.json"
    wait_until(lambda: json.loads(reported.read_text())["logged"], what="the log's end")
    ends = peer.messages(deployment, "DeploymentFinished")
    assert {end["command"]["hasSucceeded"] for end in ends} == {True}
    lines = [line for line in peer.log(deployment) if line.startswith("line ")]
    assert list(dict.fromkeys(lines)) == [f"line {number}" for number in range(1, 301)]
    assert peer.log(deployment)[-1] == SUCCESS_LINE
