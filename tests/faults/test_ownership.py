"""One deployment, one owner: whatever HOME its processes have, and whatever files are deleted."""

import contextlib
import os
import shutil
import time

import pytest
import scenes
from chains import (
    GOOD,
    MACHINE_LOCK,
    WAITING,
    agent_lock,
    go_on,
    kill_agent,
    log_of,
)
from hosts import wait_until

POINTS = {
    "activating": r"^test \S+-second",
    "activated": r"^test\.end \S+-second",
    "checking": r"^script ",
    "committing": r"^nix-env ",
    "booting": r"^boot \S+-second",
    "committed": r"^boot\.end \S+-second",
}


def empty_cache(world):
    """Remove ~/.cache, as anybody may: it is a cache."""
    shutil.rmtree(world.host.directory / "home/cache")


def owner_lock(world, deployment):
    return world.host.state / "deployments" / deployment / "owner.lock"


def newest(world):
    return world.asked[-1].id


LOSSES = {
    "cache": lambda world: empty_cache(world),
    "cache-and-machine": lambda world: (
        empty_cache(world),
        os.unlink(world.host.path(MACHINE_LOCK)),
    ),
    "cache-and-state": lambda world: (
        empty_cache(world),
        os.unlink(owner_lock(world, newest(world))),
    ),
    "machine-and-state": lambda world: (
        os.unlink(world.host.path(MACHINE_LOCK)),
        os.unlink(owner_lock(world, newest(world))),
    ),
}


@pytest.mark.promise(1, 4, 8)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("point", POINTS)
def test_locks_are_deleted_and_the_agent_is_killed(world, finish, point, loss):
    """The new agent finds the switch process, and undoes nothing of what that commits."""

    def lose(world, visit):
        kill_agent(world)
        LOSSES[loss](world)
        world.start()
        world.connected()
        time.sleep(1.0)  # the new agent looks at the deployment
        return "go"

    world.order(POINTS[point], lose)
    deployment = scenes.deploy(world, "second")
    assert world.ended(deployment) == "succeeded"
    assert world.story() == GOOD
    finish(world)


@pytest.mark.promise(1, 2)
@pytest.mark.parametrize("point", ["activating", "activated", "checking", "committing", "booting"])
def test_the_cache_is_emptied_and_all_are_killed(world, finish, point):
    """The locks in the state are free then: the deployment goes on, or is undone, as ever."""

    def lose(world, visit):
        empty_cache(world)
        world.kill(agent=True, switch=True)
        return "die"

    world.order(POINTS[point], lose)
    deployment = scenes.deploy(world, "second")
    assert world.ended(deployment) in ("succeeded", "rolled-back")
    finish(world)


def elsewhere(world):
    """An agent of the same name with another HOME, thus with other lock files of Cachix's."""
    home = world.host.directory / "elsewhere"
    places = {name: str(home / name) for name in ("cache", "config", "data")}
    env = {"HOME": str(home), **{f"XDG_{name.upper()}_HOME": p for name, p in places.items()}}
    return world.host.agent(world.name, world.workspace.url, world.token, *world.args, env=env)


@pytest.mark.promise(1, 8)
def test_an_agent_with_another_home_takes_over(held, finish):
    world, deployment = held()
    kill_agent(world)
    world.agents.append(elsewhere(world))
    world.connected()
    time.sleep(1.0)
    assert world.story().endswith("activating: test second")
    go_on(world)
    assert world.ended(deployment) == "succeeded"
    assert world.story() == GOOD
    finish(world)


@pytest.mark.promise(1, 4)
def test_a_deployment_of_another_state_directory_is_never_undone(held, finish):
    """For a normal user the state hangs on HOME too: the file beside the profile has the word.

    Here an agent with another state directory deploys the same path, and confirms it. Then the
    first agent comes back to its own deployment, which was interrupted.
    """
    world, deployment = held()
    first = world.asked[0].path
    kill_agent(world)
    world.kill(switch=True)
    state = world.host.directory / "another-state"
    state.mkdir(mode=0o700)
    name = f"{world.name}-b"
    env = {"STATE_DIRECTORY": str(state), "XDG_STATE_HOME": str(state)}
    other = world.host.agent(name, world.workspace.url, world.token, *world.args, env=env)
    other.wait_for("is connected to")
    go_on(world)
    again = world.workspace.deploy(name, first)
    assert world.workspace.wait(again) == "Succeeded"
    assert other.stop() == 0
    world.start()
    assert world.ended(deployment) == "failed"
    journal = world.host.journal(deployment)
    assert journal["reason"].endswith("another deployment was confirmed since: it is left alone")
    assert journal["outcome"] == "changed-by-others"
    assert world.running() == world.profile() == world.host.boot_default() == first


@pytest.mark.promise(1, 4)
def test_who_waits_for_the_machine_looks_again(held, finish):
    """A rollback that waited for the machine lock must not undo what was committed meanwhile."""
    world, deployment = held()
    switch = world.switches()
    kill_agent(world)
    for path in (agent_lock(world, "deployment"), owner_lock(world, deployment)):
        os.unlink(path)
    # whoever asks now can't know the owner: only that the machine is locked
    with open(world.host.path(MACHINE_LOCK), "r+b") as file:
        file.seek(96)
        file.write(b" " * 64)
    world.start()
    wait_until(lambda: WAITING in log_of(world, deployment), 30, "another process to wait")
    assert set(switch) < set(world.switches())
    go_on(world)
    assert world.ended(deployment) == "succeeded"
    assert world.story() == GOOD
    finish(world)


@pytest.mark.promise(12)
def test_an_owner_lock_that_can_not_be_opened_stops_nothing(world, finish):
    def obstruct(world, visit):
        path = owner_lock(world, newest(world))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        path.mkdir()
        world.kill(agent=True, switch=True)
        return "hang"

    world.order(r"^test\.end \S+-second", obstruct)
    deployment = scenes.deploy(world, "second")
    assert world.ended(deployment) == "rolled-back"
    owner_lock(world, deployment).rmdir()
    finish(world)


def test_the_files_that_the_cases_delete_are_those_of_the_locks(world):
    deployment = scenes.deploy(world, "second")
    assert world.ended(deployment) == "succeeded"
    assert os.path.exists(agent_lock(world, "deployment"))
    assert owner_lock(world, deployment).exists()
    content = world.host.path(MACHINE_LOCK).read_bytes()
    assert content[96:160].decode().strip() == content[160:224].decode().strip() == deployment
