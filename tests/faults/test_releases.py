"""An agent that is replaced by another release's inside its own deployment, forwards and back.

`tests/releases` has the agent's side of an earlier release, as its commit has it.
"""

import tarfile

import pytest
import scenes
from chains import GOOD, PATIENT, go_on, kill_agent, system
from closures import wait_for
from hosts import PROJECT, wait_until
from world import OPTIONS

ARCHIVE = PROJECT / "tests" / "releases" / "e7a871c.tar.xz"
ORDERS = {"upgrade": ("earlier", "this"), "downgrade": ("this", "earlier")}


@pytest.fixture
def start_release(make_world, tmp_path):
    """A machine without an agent, and a function that starts one of a release on it."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path / "earlier")
    world = make_world(args=PATIENT)
    assert world.agent.stop() == 0

    def start(release):
        if release == "this":
            world.start()
        else:
            program = [PROJECT / ".venv/bin/python", tmp_path / "earlier" / "cachix_deploy.py"]
            argv = [
                *map(str, program),
                "--host",
                world.workspace.url,
                "agent",
                world.name,
                *PATIENT,
            ]
            environment = {"CACHIX_AGENT_TOKEN": world.token}
            world.agents.append(world.host.start(f"agent-{world.name}", argv, environment))
        world.connected()

    return world, start


def restart(world, start, release):
    kill_agent(world)
    start(release)


@pytest.mark.promise(1, 8)
@pytest.mark.parametrize("order", ORDERS)
def test_the_other_release_adopts_the_deployment(start_release, finish, order):
    world, start = start_release
    before, after = ORDERS[order]
    start(before)
    hold = wait_for("/run/go-on")
    deployment = world.deploy(system(world, hold), scenes.script(world.files))
    wait_until(lambda: "test second" in world.story(), 30, "the activation")
    restart(world, start, after)
    go_on(world)
    assert world.ended(deployment) == "succeeded"
    assert world.story() == GOOD
    if after == "earlier":
        restart(world, start, "this")
    finish(world)


@pytest.mark.promise(2, 8)
@pytest.mark.parametrize("order", ORDERS)
def test_the_other_release_rolls_back_what_was_interrupted(start_release, finish, order):
    world, start = start_release
    before, after = ORDERS[order]
    start(before)

    def interrupt(world, visit):
        kill_agent(world)
        world.kill(switch=True)
        start(after)
        return "hang"

    world.order(r"^test\.end \S+-second", interrupt)
    deployment = scenes.deploy(world, "second")
    assert world.ended(deployment) == "rolled-back"
    assert world.story().splitlines()[1:] == [
        "activating: test second, test second (done) -> hang",
        "rolling-back: test first",
    ]
    if after == "earlier":
        restart(world, start, "this")
    world.args = OPTIONS
    finish(world)
