"""Deployments by name, each with the exact chain of its steps and calls: see `World.story`."""

import os

import pytest
import scenes
from chains import COMMITTED, DOWNLOAD, GOOD, agent_lock, kill_agent, system
from hosts import wait_until
from world import ALWAYS

from activate import lock

CLEAN = {
    "nixos": GOOD,
    "darwin": """\
downloading: download second
activating: activate second
checking: script good
committing: set second""",
    "home_manager": """\
downloading: download second
activating: activate second, set second, activate.middle second, current-home second
checking: script good""",
    "plain": """\
downloading: download second
activating: set second
checking: script good""",
}


def test_of_shortened_chains(world):
    """A shortened chain still shows all calls that change the machine."""
    world.order(r"^boot\.end", "exit 1")
    assert world.ended(scenes.deploy(world, "second")) == "rolled-back"
    assert [call for call in world.chain() if ": nix-env" in call or ": boot" in call] == [
        "committing: nix-env --profile /nix/var/nix/profiles/system --set second",
        "committing: nix-env.end --profile /nix/var/nix/profiles/system --set second",
        "committing: boot second",
        "committing: boot.end second",
        "rolling-back: nix-env --profile /nix/var/nix/profiles/system --switch-generation 1",
        "rolling-back: nix-env.end --profile /nix/var/nix/profiles/system --switch-generation 1",
        "rolling-back: boot first",
        "rolling-back: boot.end first",
    ]
    assert world.story().splitlines()[-2:] == [
        "committing: set second, boot second, boot second (done) -> exit 1",
        "rolling-back: generation 1, boot first, test first",
    ]


# --- no fault but the new system's own ------------------------------------------------------------


@pytest.mark.promise(1, 4, 6)
@pytest.mark.parametrize("kind", CLEAN)
def test_a_clean_deployment(make_world, finish, kind):
    world = make_world(kind)
    assert world.ended(scenes.deploy(world, "second")) == "succeeded"
    assert world.story() == CLEAN[kind]
    finish(world)


FAILING = {
    scenes.BAD: "activating: test second\nrolling-back: test first",
    scenes.BAD_CHECK: "activating: test second\nchecking: script bad\nrolling-back: test first",
    scenes.BAD_COMMIT: f"""\
activating: test second
checking: script good
{COMMITTED}
rolling-back: generation 1, boot first, test first""",
}


@pytest.mark.promise(3, 6)
@pytest.mark.parametrize("how", FAILING)
def test_a_system_that_fails_by_itself(world, finish, how):
    assert world.ended(scenes.deploy(world, "second", how)) == "rolled-back"
    assert world.story() == f"downloading: download second\n{FAILING[how]}"
    finish(world)


@pytest.mark.promise(3, 5, 6)
@pytest.mark.long
def test_the_new_system_cuts_the_network(make_world, make_workspace, finish):
    workspace = make_workspace()
    world = make_world(workspace=workspace, args=("--confirm-timeout=2",))

    def cut(world, visit):
        workspace.kill()
        return "go"

    world.order(r"^test\.end \S+-second", cut)
    deployment = scenes.deploy(world, "second")
    wait_until(lambda: world.host.step(deployment) == "rolled-back", 30, "the rollback")
    assert workspace.program.process.poll() is not None, "the rollback had a network"
    assert world.story() == GOOD.replace(COMMITTED, "rolling-back: test first")
    workspace.serve()
    assert world.ended(deployment) == "rolled-back"
    reason = workspace.deployment(deployment)["reason"]
    assert "could not be reached for 2 s after the activation" in reason
    finish(world)


# --- power loss in the commit ---------------------------------------------------------------------


@pytest.mark.promise(2, 4)
def test_power_loss_before_the_new_system_boots(world, finish):
    world.order(r"^boot \S+-second", scenes.power)
    assert world.ended(scenes.deploy(world, "second")) == "succeeded"
    again = f"committing: test second\nchecking: script good\n{COMMITTED}"
    assert world.story() == f"{GOOD} -> gone\n{again}"
    finish(world)


def durable_power_loss(world, visit):
    """Cut the power after all data so far was synced."""
    if world.disk is not None:
        os.system(f"sync -f {world.disk.directory}")
    return scenes.power(world, visit)


@pytest.mark.promise(2, 4)
def test_power_loss_after_the_new_system_boots(world, finish):
    world.order(r"^boot\.end \S+-second", durable_power_loss)
    assert world.ended(scenes.deploy(world, "second")) == "succeeded"
    assert world.story() == f"{GOOD}, boot second (done) -> gone\n{COMMITTED}"
    finish(world)


@pytest.mark.promise(2, 7)
def test_power_is_lost_in_each_commit(world, finish):
    world.order(r"^boot \S+-second", durable_power_loss, ALWAYS)
    assert world.ended(scenes.deploy(world, "second")) == "rolled-back"
    again = f"committing: test second\nchecking: script good\n{COMMITTED} -> gone\n"
    undo = "rolling-back: generation 1, boot first, test first"
    assert world.story() == f"{GOOD} -> gone\n{3 * again}{undo}"
    finish(world)


# --- rollbacks that fail --------------------------------------------------------------------------


@pytest.mark.promise(2, 7)
def test_killed_in_each_rollback(world, finish):
    first = world.running()
    world.order(r"^test \S+-first", scenes.kill_switch, 3)
    deployment = scenes.deploy(world, "second", scenes.BAD)
    assert world.ended(deployment) == "rollback-failed"
    killed = f"rolling-back: test first -> {scenes.LINGER}"
    assert world.story().splitlines()[2:] == 3 * [killed]
    reason = world.workspace.deployment(deployment)["reason"]
    assert "the rollback was interrupted 3 times" in reason
    world.visits.clear()
    third = scenes.deploy(world, "third", scenes.BAD)
    assert world.ended(third) == "rolled-back"
    assert world.host.journal(third)["previous_running"] == first, "not the last confirmed path"
    assert world.story().splitlines()[1:] == ["activating: test third", "rolling-back: test first"]
    assert world.running() == first
    finish(world)


@pytest.mark.promise(3, 7)
@pytest.mark.parametrize("times, end", [(1, "rolled-back"), (3, "rollback-failed")])
def test_a_rollback_that_fails_is_tried_again(world, finish, times, end):
    world.order(r"^test \S+-first", "exit 7", times)
    deployment = scenes.deploy(world, "second", scenes.BAD)
    assert world.ended(deployment) == end
    failed = times * ["rolling-back: test first -> exit 7"]
    assert world.story().splitlines()[2:] == failed + ["rolling-back: test first"] * (times < 3)
    reason = world.workspace.deployment(deployment)["reason"]
    assert reason.startswith("the activation ended with status 1; ")
    assert ("the rollback failed: " in reason and "ended with status 7" in reason) is (times == 3)
    finish(world)


# --- the download ---------------------------------------------------------------------------------


@pytest.mark.promise(7, 10)
@pytest.mark.long
def test_systemd_run_hangs_while_the_download_fails(world, finish):
    world.order(r"^systemd-run", "hang")
    world.order(DOWNLOAD, "exit 1")
    assert world.ended(scenes.deploy(world, "second")) == "failed"
    wait_until(
        lambda: not lock.held(agent_lock(world, "deployment")), 10, "the deployment lock to be free"
    )
    assert world.story() == "downloading: download second -> exit 1"
    finish(world)


@pytest.mark.promise(2, 7, 10)
@pytest.mark.parametrize("kill", [scenes.kill_agent, scenes.kill_both])
def test_the_agent_is_killed_while_systemd_run_hangs(world, finish, kill):
    """It has the locks, and would keep them for as long as it hangs."""

    def strike(world, visit):
        kill(world, visit)
        return "hang"

    world.order(r"^systemd-run", strike, 2)
    assert world.ended(scenes.deploy(world, "second"), 30) == "succeeded"
    assert [visit.point for visit in world.visits].count("systemd-run") == 3
    assert not any("systemd-run" in line for line in world.host.processes().values())
    finish(world)


@pytest.mark.promise(2, 7)
def test_power_is_lost_in_each_download(world, finish):
    world.order(DOWNLOAD, scenes.power, ALWAYS)
    deployment = scenes.deploy(world, "second")
    assert world.ended(deployment) == "failed"
    assert world.story().splitlines() == 3 * ["downloading: download second -> gone"]
    reason = world.workspace.deployment(deployment)["reason"]
    assert reason == "it was interrupted 3 times before anything was changed"
    finish(world)


@pytest.mark.promise(2, 8)
def test_the_agent_is_killed_in_the_download(world, finish):
    hung = []

    def kill(world, visit):
        hung.append(visit.pid)
        world.kill(agent=True)
        return "hang"

    world.order(DOWNLOAD, kill)
    assert world.ended(scenes.deploy(world, "second")) == "succeeded"
    assert world.story() == f"downloading: download second -> hang\n{GOOD}"
    assert hung[0] not in world.host.processes(), "the download of the killed agent still runs"
    finish(world)


@pytest.mark.promise(8, 10)
def test_the_agent_is_stopped_in_the_download(world, finish):
    attempts = []

    def stop(world, visit):
        assert world.agent.stop(10) == 0  # within the promised 10 s
        attempts.extend(entry["attempts"] for entry in world.journals().values())
        world.start()
        return "hang"

    world.order(DOWNLOAD, stop)
    assert world.ended(scenes.deploy(world, "second")) == "succeeded"
    assert world.story() == f"downloading: download second -> hang\n{GOOD}"
    assert attempts == [0], "an operator's restart counts as an interruption"
    finish(world)


# --- the agent in the middle of its own deployment ------------------------------------------------


@pytest.mark.promise(8)
def test_the_activation_restarts_its_agent(world, finish):
    statuses = []

    def restarted(world, visit):
        statuses.append(world.agent.wait(10))
        world.start()
        return "go"

    pid = f'"$XDG_CACHE_HOME/cachix/deploy/locks/agent-{world.name}.pid"'
    extra = f'kill -TERM "$(cat {pid})"; visit unit.restarted "$self"; echo the unit has restarted'
    world.order(r"^unit\.restarted", restarted)
    deployment = world.deploy(system(world, extra), scenes.script(world.files))
    assert world.ended(deployment) == "succeeded"
    assert statuses == [0]
    assert world.story() == GOOD.replace("test second", "test second, unit.restarted second")
    log = world.workspace.text(deployment)
    assert "the unit has restarted" in log
    assert "the agent ended during the activation, waiting for one" in log
    finish(world)


@pytest.mark.promise(3, 6)
def test_the_activation_kills_its_agent_and_none_comes_back(make_world, finish):
    world = make_world(args=("--confirm-timeout=2",))

    def kill(world, visit):
        kill_agent(world)
        return "go"

    world.order(r"^test\.end \S+-second", kill)
    deployment = scenes.deploy(world, "second")
    wait_until(lambda: world.host.step(deployment) == "rolled-back", 30, "the rollback")
    world.start()
    assert world.ended(deployment) == "rolled-back"
    assert world.story() == GOOD.replace(COMMITTED, "rolling-back: test first")
    reason = world.workspace.deployment(deployment)["reason"]
    assert reason.startswith("no agent came back within 2 s")
    finish(world)
