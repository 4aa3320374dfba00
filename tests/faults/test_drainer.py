"""The drainer is killed, its disk is full, or a service keeps its pipe: no command may notice.

The programs here mind: they fail if they can't write.
"""

import contextlib
import os
import signal

import closures
import pytest
import scenes
import test_state
from hosts import wait_until
from test_matrix import ENDS, POINTS, STEPS
from world import ALWAYS

from activate.switch.drainer import TITLE

pytestmark = pytest.mark.promise(1, 2, 3, 6, 9)
MINDS = 'for i in 1 2 3; do echo "out $i" && echo "err $i" >/dev/stderr || exit 101; done'
CHANGED = [point for point in POINTS["nixos"] if point not in ("received", "downloading", "ready")]
KILLED_BOTH = {  # the end of each point if the switch process is killed there, once
    row.split()[0]: row.split()[4][0] for row in ENDS.strip().split("\n\n")[0].splitlines()[1:]
}


def drainers(world):
    """Return the process ids of the drainers."""
    return [pid for pid, line in world.host.processes().items() if TITLE.decode() in line]


def kill_drainer(world, visit):
    """Kill the drainer, which the switch process replaces at once."""
    for pid in drainers(world):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return "go"


def kill_drainer_and_switch(world, visit):
    """Kill both, so that a command which still writes sees a broken pipe."""
    switches = world.switches()
    for pid in [*switches, *drainers(world)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    world.kill(switch=True)
    return scenes.LINGER


def minding(world, version, how=scenes.GOOD):
    """Return a system whose programs fail if they can't write."""
    after = f"{MINDS}; {scenes._visit('test.end')}; {MINDS}"
    after += "; exit 1" if how == scenes.BAD else ""
    after_boot = f"{MINDS}; {scenes._visit('boot.end')}"
    after_boot += "; exit 1" if how == scenes.BAD_COMMIT else ""
    before, boot = (f"{MINDS}; {scenes._visit(point)}" for point in ("test", "boot"))
    return closures.nixos(world.files, version, before, after, boot, after_boot, parts=1)


def end_services(world, words):
    """Kill what an activation has left running, and see the drainers end."""
    for pid, line in world.host.processes().items():
        if words in line:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not drainers(world), 5, "the drainers to end")


@pytest.fixture
def minder(make_world):
    """Make a machine that runs a system with programs that mind."""

    def make(size=None):
        world = make_world(start=False)
        world.install(minding(world, "first"))
        if size is not None:
            world.separate_state(size)
        world.start()
        world.connected()
        return world

    return make


def deploy(world, how):
    script = closures.script(world.files, f"minds-{how}", f"{scenes._visit('script')}; {MINDS}")
    return world.deploy(minding(world, "second", how), script)


@pytest.mark.parametrize("point", CHANGED)
@pytest.mark.parametrize("times", [1, ALWAYS])
def test_the_drainer_is_killed(minder, finish, point, times):
    world = minder()
    pattern, how = POINTS["nixos"][point]
    order = world.order(pattern, kill_drainer, times)
    deployment = deploy(world, how)
    end = "S" if how == scenes.GOOD else "B"
    assert world.ended(deployment) == STEPS[end], world.workspace.deployment(deployment)
    assert order.times < times, "the fault has not happened"
    finish(world)


@pytest.mark.parametrize("point", CHANGED)
def test_the_drainer_and_the_switch_process_are_killed(minder, finish, point):
    world = minder()
    pattern, how = POINTS["nixos"][point]
    world.order(pattern, kill_drainer_and_switch)
    deployment = deploy(world, how)
    end = KILLED_BOTH[point]
    assert world.ended(deployment) == STEPS[end], world.workspace.deployment(deployment)
    finish(world)


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk is a mount, which needs root")
@pytest.mark.parametrize("point", CHANGED)
def test_the_disk_is_full(minder, point):
    """No journal can be written, so that no step forward is made; the rollback is whole."""
    world = minder("512k")

    def fill(world, visit):
        world.blind = True
        world.lost = {asked.id for asked in world.asked}
        test_state.full(world)
        return "go"

    pattern, how = POINTS["nixos"][point]
    world.order(pattern, fill)
    deployment = deploy(world, how)
    assert test_state.outcome(world, deployment) == "B", world.workspace.deployment(deployment)
    wait_until(lambda: not world.switches(), 10, "the switch process to end")
    assert test_state.machine(world) == "first first first"
    test_state.assert_goes_on(world, "full", False, how)


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk is a mount, which needs root")
@pytest.mark.parametrize("how", [scenes.GOOD, scenes.BAD, scenes.BAD_COMMIT])
@pytest.mark.parametrize("source", ["activation", "service"])
def test_the_output_is_more_than_the_disk_takes(minder, finish, how, source):
    """It does not take the journal's room: the deployment ends as it would with another disk."""
    world = minder("1m")
    # long lines: it takes a slow machine minutes to report hundreds of thousands of short ones
    service = f"setsid yes {'y' * 2000} & sleep 0.5"
    flood = closures.long_line(3_000_000) if source == "activation" else service
    after = f"{flood}\n{MINDS}; {scenes._visit('test.end')}; {MINDS}"
    after += "; exit 1" if how == scenes.BAD else ""
    after_boot = f"{MINDS}; {scenes._visit('boot.end')}"
    after_boot += "; exit 1" if how == scenes.BAD_COMMIT else ""
    path = closures.nixos(
        world.files, "second", scenes._visit("test"), after, scenes._visit("boot"), after_boot
    )
    deployment = world.deploy(path)
    end = "succeeded" if how == scenes.GOOD else "rolled-back"
    assert world.ended(deployment) == end, world.workspace.deployment(deployment)
    report = world.workspace.deployment(deployment)
    assert "output are missing" in f"{report['reason']}{world.workspace.text(deployment)}"
    end_services(world, "yes")
    finish(world)


@pytest.mark.promise(8)
def test_a_service_keeps_the_pipe_of_a_deployment_that_was_killed(minder, finish):
    """It goes on, whatever becomes of the processes that started it."""
    world = minder()
    beat = "while echo beat; do touch /run/beat; sleep 0.05; done"
    after = f"setsid sh -c '{beat}' &\n{scenes._visit('test.end')}"
    path = closures.nixos(world.files, "second", scenes._visit("test"), after)
    world.order(r"^test\.end", scenes.kill_both)
    deployment = world.deploy(path)
    assert world.ended(deployment) == "rolled-back"
    mark = world.host.path("/run/beat")
    mark.unlink()
    wait_until(mark.exists, 5, "the service to go on")
    wait_until(lambda: len(drainers(world)) == 1, 5, "the drainer of the rollback to end")
    end_services(world, "beat")
    finish(world)
