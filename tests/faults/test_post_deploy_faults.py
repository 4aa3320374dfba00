"""The post-deployment command with faults in it: the result stays, and it runs once for that."""

import contextlib

import pytest
import scenes
from hosts import wait_until
from test_by_hand import begin, ended
from world import OPTIONS, WAITS

pytestmark = [pytest.mark.promise(2, 4, 7), pytest.mark.long]
HOOK = """#!/bin/sh
visit hook "$CACHIX_DEPLOY_OUTCOME" || exit $?
visit hook.end "$CACHIX_DEPLOY_OUTCOME" || exit $?
"""
FAULTS = {**scenes.FAULTS, "stop-agent": scenes.stop_agent}
del FAULTS["kill-switch"], FAULTS["die"]  # it has ended by then; the shell's parent is the agent


@pytest.fixture
def world(make_world):
    """A machine whose agent runs a command after each deployment."""
    world = make_world(start=False, waits={**WAITS, "post_deploy": 1.0, "look": 0.3})
    path = world.faults / "bin/hook"
    path.write_text(HOOK)
    path.chmod(0o755)
    world.args = (*OPTIONS, f"--post-deploy={path}")
    world.start()
    world.connected()
    return world


def hooks(world):
    return [visit.argument for visit in world.visits if visit.point == "hook"]


@pytest.mark.parametrize(("how", "end"), [(scenes.GOOD, "succeeded"), (scenes.BAD, "rolled-back")])
@pytest.mark.parametrize("point", ["hook ", r"hook\.end"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault(world, finish, fault, point, how, end):
    order = world.order(f"^{point}", FAULTS[fault])
    deployment = scenes.deploy(world, "second", how)
    assert world.ended(deployment) == end
    name = point.strip().replace("\\", "")
    wait_until(lambda: name in [visit.point for visit in world.visits], 30, "the fault")
    assert order.times == 0
    world.connected()
    finish(world)
    wait_until(
        lambda: len(hooks(world)) == 2, 30, f"the command after the next one: {hooks(world)}"
    )
    assert hooks(world) == [end, "succeeded"]
    assert world.journals()[deployment]["step"] == end


def test_a_rollback_by_hand_is_a_result_too(world, finish):
    assert world.ended(scenes.deploy(world, "second")) == "succeeded"
    wait_until(lambda: len(hooks(world)) == 1, 30)
    world.args = OPTIONS  # the command takes no options of the agent
    assert begin(world, "rollback").wait() == 0
    ended(world)
    wait_until(lambda: len(hooks(world)) == 2, 30, "the command after the rollback")
    finish(world)


def test_what_ended_while_no_agent_ran_is_caught_up_with(world, finish):
    world.order(r"^boot\.end \S+-second", lambda world, visit: _stop(world))
    deployment = scenes.deploy(world, "second")
    wait_until(lambda: world.host.step(deployment) == "succeeded", 60)
    assert hooks(world) == []
    world.start()
    world.connected()
    wait_until(lambda: hooks(world) == ["succeeded"], 30)
    assert world.ended(deployment) == "succeeded"
    finish(world)


def _stop(world):
    with contextlib.suppress(ProcessLookupError):
        world.agent.stop(20)
    return "go"
