"""An agent whose stderr hangs, because journald or a supervisor does.

Each step goes on, and SIGTERM ends the agent.
"""

import json
import os

import pytest
import scenes
import test_endings
from hosts import command, wait_until
from test_matrix import POINTS, STEPS

pytestmark = pytest.mark.promise(2, 6, 8, 10)
FAULTS = {**scenes.ENDINGS, "kill-agent": scenes.kill_agent}
# How a deployment ends if the agent is killed; the other ends are those of any other agent.
ENDS = {point: "S" for point, (_, how) in POINTS["nixos"].items() if how == scenes.GOOD}


class Full:
    """A named pipe that is full, and that nobody reads."""

    def __init__(self, path):
        os.mkfifo(path)
        self.path, self.fd = path, os.open(path, os.O_RDWR | os.O_NONBLOCK)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(self.fd, b"x" * 64)


@pytest.fixture
def deaf(make_world):
    """A world whose agents have a stderr that hangs."""
    world = make_world(start=False)
    pipe = Full(world.directory / "stderr")

    def start():
        program = [*command("cachix-deploy"), "--host", world.workspace.url, "agent", world.name]
        argv = ["sh", "-c", 'exec "$@" 2<>"$0"', str(pipe.path), *program, *world.args]
        env = {"CACHIX_AGENT_TOKEN": world.token}
        number = len(world.agents)
        world.agents.append(world.host.start(f"agent-{number}", argv, env))
        return world.agent

    def is_connected():
        mark = world.host.state / f"registered-{world.name}.json"
        return mark.exists() and json.loads(mark.read_text())["pid"] == world.agent.pid

    world.start, world.connected = start, lambda: wait_until(is_connected, 30, "a connection")
    start()
    world.connected()
    yield world
    os.close(pipe.fd)


@pytest.mark.parametrize("point", list(POINTS["nixos"]))
@pytest.mark.parametrize("fault", list(FAULTS))
def test_in_a_step(deaf, finish, point, fault):
    pattern, how = POINTS["nixos"][point]
    order = deaf.order(pattern, FAULTS[fault])
    deployment = scenes.deploy(deaf, "second", how)
    is_ending = fault in scenes.ENDINGS
    end = test_endings.expected("nixos", point, fault) if is_ending else ENDS.get(point, "B")
    assert deaf.ended(deployment) == STEPS[end], deaf.workspace.deployment(deployment)
    assert order.times == 0, "the fault has not happened"
    finish(deaf)
