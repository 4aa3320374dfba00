"""Orderly ends in every step: shutdown, SIGTERM to the agent, SIGTERM to the switch process.

None of them counts as an attempt, so that they may happen more often than there are attempts.
"""

import os
import signal
import time

import pytest
import scenes
from hosts import wait_until
from test_matrix import POINTS, STEPS
from world import Visit

pytestmark = pytest.mark.promise(1, 2, 6, 8, 10)
OFTEN = 4  # one more than there are attempts
# The points at which a deployment still succeeds. At all others it is rolled back.
HARMLESS = "received downloading ready committing profile-set booting booted"
SUCCEEDS = {
    "shutdown": HARMLESS.split(),
    "stop-agent": f"{HARMLESS} activating activated checking".split(),
    "stop-switch": HARMLESS.split(),
}
IN_ACTIVATION = {"home_manager": {"profile-set"}}  # points that belong to the activation here


def cases():
    for kind, points in POINTS.items():
        for point in points:
            for ending in scenes.ENDINGS:
                yield kind, point, ending, 1
                if kind == "nixos":
                    yield kind, point, ending, OFTEN


def expected(kind, point, ending):
    activation = point in IN_ACTIVATION.get(kind, ())
    return "S" if ("activating" if activation else point) in SUCCEEDS[ending] else "B"


def case_id(case):
    return "-".join([*case[:3], "once" if case[3] == 1 else "often"])


@pytest.mark.parametrize("case", list(cases()), ids=case_id)
def test_an_orderly_end_in_a_step(make_world, finish, case):
    kind, point, ending, times = case
    world = make_world(kind)
    pattern, how = POINTS[kind][point]
    order = world.order(pattern, scenes.ENDINGS[ending], times)
    deployment = scenes.deploy(world, "second", how)
    end = world.ended(deployment)
    assert end == STEPS[expected(kind, point, ending)], world.workspace.deployment(deployment)
    assert order.times < times, "the fault has not happened"
    finish(world)


@pytest.mark.parametrize("command", [r"--realise --dry-run", r"--realise (?!--dry-run)"])
def test_a_command_of_the_download_is_stopped_a_little_before_its_agent(
    make_world, finish, command
):
    """systemd sends SIGTERM to all processes of a unit, one after the other."""
    world = make_world()

    def stop(world, visit: Visit) -> str:
        os.killpg(visit.session, signal.SIGTERM)
        time.sleep(0.1)
        return scenes.stop_agent(world, visit)

    order = world.order(f"^nix-store {command}", stop, OFTEN)
    deployment = scenes.deploy(world, "second")
    assert world.ended(deployment) == "succeeded", world.workspace.deployment(deployment)
    assert order.times == 0
    finish(world)


@pytest.mark.parametrize("kind", list(POINTS))
@pytest.mark.parametrize("how", [scenes.GOOD, scenes.BAD_CHECK])
@pytest.mark.promise(4)
def test_the_power_goes_right_after_the_end_was_reported(make_world, finish, kind, how):
    world = make_world(kind)
    deployment = scenes.deploy(world, "second", how)
    world.workspace.wait(deployment)
    world.lose_power()
    world.connected()
    assert world.ended(deployment) == ("succeeded" if how == scenes.GOOD else "rolled-back")
    finish(world)


@pytest.mark.parametrize("point", list(POINTS["nixos"]))
def test_the_workspace_asks_the_agent_to_stop(make_world, scripted, finish, point):
    """The agent finishes the deployment and reports its end before it exits."""
    world = make_world(workspace=scripted)
    pattern, how = POINTS["nixos"][point]

    def close(world, visit: Visit) -> str:
        scripted.peer.agent().close(1000)
        return "go"

    order = world.order(pattern, close)
    deployment = scenes.deploy(world, "second", how)
    assert world.agent.wait(30) == 0 and order.times == 0
    assert scripted.ends(deployment) == ["Succeeded" if how == scenes.GOOD else "Failed"]
    world.start()
    world.connected()
    assert world.ended(deployment) == ("succeeded" if how == scenes.GOOD else "rolled-back")
    finish(world)


@pytest.mark.parametrize("point", ["activating", "committing", "rolling-back"])
def test_nobody_enters_a_step_while_the_system_stops(make_world, finish, point):
    """The agent and its switch process still run for a while during a shutdown."""
    world = make_world()
    pattern, how = POINTS["nixos"][point]
    before = {
        "activating": r"^nix-store .*--add-root \S+/previous",
        "committing": "^script",
        "rolling-back": "^test",
    }

    def stopping(world, visit: Visit) -> str:
        (world.faults / "system").write_text("stopping\n")
        return "go"

    world.order(before[point], stopping)
    deployment = scenes.deploy(world, "second", how)
    wait_until(lambda: (world.faults / "system").read_text() == "stopping\n", 30)
    time.sleep(1)
    assert not [visit for visit in world.visits if visit.step == point], "a step was entered"
    world.shut_down()
    world.ended(deployment)
    finish(world)
