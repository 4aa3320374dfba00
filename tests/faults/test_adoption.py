"""The agent that completes a deployment is not always the one that began it.

An agent comes back, an agent takes over the journals of another one, several agents share a
machine, a bootstrapping agent has a successor, and other programs hold the locks.
"""

import contextlib
import json
import time

import pytest
import scenes
from chains import (
    GOOD,
    MACHINE_LOCK,
    PATIENT,
    WAITING,
    agent_lock,
    another_holds,
    deployed,
    go_on,
    kill_agent,
    log_of,
    system,
)
from hosts import wait_until
from world import OPTIONS, WAITS, Asked

from activate import lock

# --- an agent that comes back ---------------------------------------------------------------------


def lines(name):
    return f"seq -f '{name} line %.0f' 300; visit lines.{name} \"$self\""


@pytest.mark.promise(6, 8)
@pytest.mark.long
def test_the_log_goes_on_while_the_agent_is_away(world, finish):
    deployments = []

    def kill(world, visit):
        wait_until(
            lambda: "before line 300" in world.workspace.log(deployments[0]), 20, "the first lines"
        )
        kill_agent(world)
        return "go"

    def come_back(world, visit):
        world.start()
        wait_until(
            lambda: "away line 300" in world.workspace.log(deployments[0]),
            20,
            "the lines in between",
        )
        return "go"

    world.order(r"^lines\.before", kill)
    world.order(r"^lines\.away", come_back)
    extra = "; ".join([lines("before"), lines("away"), lines("after")])
    deployments.append(world.deploy(system(world, extra), scenes.script(world.files)))
    assert world.ended(deployments[0]) == "succeeded"
    log = world.workspace.log(deployments[0])
    assert [line for line in log if " line " in line and "$" not in line] == [
        f"{name} line {i}" for name in ("before", "away", "after") for i in range(1, 301)
    ]
    visits = "test second, lines.before second, lines.away second, lines.after second"
    assert world.story() == GOOD.replace("test second", visits)
    finish(world)


@pytest.mark.promise(6, 8)
def test_the_agent_comes_back_after_the_end(world, finish):
    def kill(world, visit):
        kill_agent(world)
        return "go"

    world.order(r"^boot \S+-second", kill)
    deployment = scenes.deploy(world, "second")
    wait_until(lambda: world.host.step(deployment) == "succeeded", 30, "the end")
    assert world.workspace.deployment(deployment)["status"] == "InProgress"
    world.start()
    assert world.ended(deployment) == "succeeded"
    assert world.story() == GOOD
    finish(world)


# --- journals of others ---------------------------------------------------------------------------

# Keys that the journal of an older release may not have.
OLDER = ("version", "revision", "rooted", "detail", "log_size", "profile_name")
NEWER = {"version": 99, "flavour": {"of": ["another", "release"]}}


def rewrite(world, change):
    """Change the only journal."""
    (path,) = world.host.state.glob("deployments/*/journal.json")
    entry = json.loads(path.read_bytes())
    change(entry)
    path.write_text(json.dumps(entry))


CHANGES = {
    "of-another-agent": lambda entry: entry.update(agent="another-agent"),
    "of-another-workspace": lambda entry: entry.update(host="https://elsewhere.example"),
    "of-an-older-version": lambda entry: [entry.pop(name) for name in OLDER],
    "of-a-newer-version": lambda entry: entry.update(NEWER),
}


@pytest.mark.promise(2, 8)
@pytest.mark.parametrize("change", CHANGES)
def test_an_interrupted_deployment_is_undone(world, finish, change):
    def kill(world, visit):
        kill_agent(world)
        world.kill(switch=True)
        rewrite(world, CHANGES[change])
        world.start()
        return "hang"

    world.order(r"^test\.end \S+-second", kill)
    deployment = scenes.deploy(world, "second")
    assert world.ended(deployment) == "rolled-back"
    assert world.story().splitlines()[1:] == [
        "activating: test second, test second (done) -> hang",
        "rolling-back: test first",
    ]
    if change == "of-a-newer-version":
        assert world.host.journal(deployment)["flavour"] == NEWER["flavour"]
    finish(world)


@pytest.mark.promise(8)
@pytest.mark.parametrize("change", ["of-an-older-version", "of-a-newer-version"])
def test_a_deployment_is_adopted(held, finish, change):
    world, deployment = held()
    kill_agent(world)
    rewrite(world, CHANGES[change])
    world.start()
    wait_until(lambda: world.agent.text().count("is connected to") == 2, 30, "the new agent")
    go_on(world)
    assert world.ended(deployment) == "succeeded"
    assert world.story() == GOOD
    finish(world)


# --- several agents, and other programs -----------------------------------------------------------


@pytest.mark.promise(1)
@pytest.mark.parametrize("option, status", [("--verbose", 75), ("--if-stopped", 0)])
@pytest.mark.long
def test_a_second_agent_of_the_name(held, finish, option, status):
    world, deployment = held()
    second = world.host.agent(world.name, world.workspace.url, world.token, option)
    assert second.wait(20) == status
    go_on(world)
    assert world.ended(deployment) == "succeeded"
    assert world.story() == GOOD
    finish(world)


@contextlib.contextmanager
def another_agent(world):
    """Run an agent of another name on the same machine, with the same state. Yields its name."""
    name = f"{world.name}-b"
    agent = world.host.agent(name, world.workspace.url, world.token, *world.args)
    agent.wait_for("is connected to")
    yield name
    roots = (world.host.state / "deployments").glob
    wait_until(
        lambda: not any(path.is_symlink() for path in roots("*/*")), 10, "the GC roots to go"
    )
    assert agent.stop() == 0
    (world.host.state / f"registered-{name}.json").unlink()


def deploy_to(world, name, version):
    """Order a deployment for an agent of another name, and return its id."""
    path, script = scenes.nixos(world.files, version), scenes.script(world.files)
    world.workspace.push(path, script)
    world.asked.append(Asked(world.workspace.deploy(name, path, script), path, world.running()))
    return world.asked[-1].id


@pytest.mark.promise(1)
def test_two_agents_of_one_profile(held, finish):
    world, first = held()
    with another_agent(world) as name:
        second = deploy_to(world, name, "third")
        wait_until(lambda: WAITING in log_of(world, second), 30, "the other agent to wait")
        assert "test third" not in world.story()
        go_on(world)
        assert [world.ended(first), world.ended(second)] == ["succeeded", "succeeded"]
    assert world.host.journal(second)["previous_running"] == world.asked[0].path
    rest = deployed("third").partition("\n")[2]
    held_up = GOOD.replace("\nchecking", "\ndownloading: download third\nchecking")
    assert world.story() == f"{held_up}\n{rest}"
    finish(world)


@pytest.mark.promise(1)
def test_two_agents_of_one_profile_at_once(make_world, finish):
    world = make_world()
    with another_agent(world) as name:
        world.order(r"^test ", "linger 0.3", 2)
        deployments = [scenes.deploy(world, "second"), deploy_to(world, name, "third")]
        assert list(map(world.ended, deployments)) == ["succeeded", "succeeded"]
    # The invariants expect that the last deployment of this list is the one that runs.
    world.asked.sort(key=lambda asked: world.host.journal(asked.id)["times"]["activating"])
    finish(world)


@pytest.mark.promise(1)
def test_another_program_holds_the_deployment_lock(world, finish):
    with another_holds(agent_lock(world, "deployment")):
        deployment = scenes.deploy(world, "second")
        world.agent.wait_for(r"deployment \d+: /nix/store/")
        time.sleep(1)  # longer than the deployment would take without the lock
        assert world.story() == ""
    assert world.ended(deployment) == "succeeded"
    assert world.story() == GOOD
    finish(world)


@pytest.mark.promise(1)
def test_another_program_holds_the_machine_lock(world, finish):
    with another_holds(world.host.path(MACHINE_LOCK)):
        deployment = scenes.deploy(world, "second")
        wait_until(lambda: WAITING in log_of(world, deployment), 30, "the wait for the lock")
        time.sleep(0.5)
        assert world.story() == "downloading: download second"
    assert world.ended(deployment) == "succeeded"
    assert world.story() == GOOD
    finish(world)


# --- bootstrap ------------------------------------------------------------------------------------


@pytest.mark.promise(1, 8)
def test_a_bootstrap_without_a_successor_stays(make_world, scripted, finish):
    world = make_world(
        workspace=scripted, args=(*OPTIONS, "--bootstrap"), waits={**WAITS, "handover": 1.0}
    )
    bootstrap = world.agent
    stays = f"no agent named {world.name} has started, so this one stays"
    for times, version in enumerate(("second", "third"), 1):
        assert world.ended(scenes.deploy(world, version)) == "succeeded"
        assert not lock.held(agent_lock(world))
        world.agent.wait_for(f"(?s)(.*{stays}){{{times}}}", 20)
    waits = f"waiting up to 1 s for the machine's own agent named {world.name}"
    assert world.agent.text().count(waits) == 2
    world.args = OPTIONS
    assert world.ended(scenes.deploy(world, "fourth")) == "succeeded"
    successor = world.start()
    assert bootstrap.wait(20) == 0
    assert f"the agent with pid {successor.pid} has taken over" in successor.text()
    assert world.story() == "\n".join(map(deployed, ("second", "third", "fourth")))
    finish(world)


@pytest.mark.promise(1, 6, 8)
def test_a_successor_while_the_bootstrap_deploys(held, finish):
    world, deployment = held(args=(*PATIENT, "--bootstrap"))
    bootstrap, world.args = world.agent, OPTIONS
    successor = world.start()
    wait_until(
        lambda: successor.text().count("is connected to") == 2, 20, "the successor's connection"
    )
    time.sleep(2)  # enough for many connections if the agents evicted each other
    assert successor.text().count("is connected to") == 2
    assert bootstrap.process.poll() is None, "the bootstrap has left its deployment"
    go_on(world)
    assert bootstrap.wait(20) == 0
    assert world.ended(deployment) == "succeeded"
    assert "has taken over" in successor.text()
    assert world.story() == GOOD
    finish(world)
    assert successor.text().count("is connected to") == 2
