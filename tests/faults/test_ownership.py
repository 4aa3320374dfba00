"""One deployment has one owner, whatever is deleted under it, and whatever HOME a process has.

Lock files lie in a cache directory, beside the journal and beside the profile. If some of them go
in mid-deployment, the next agent must still find the switch process that leads it: else it undoes
what is committed meanwhile.
"""

import contextlib
import os
import shutil
import time
from pathlib import Path

import pytest
import scenes
from chains import GOOD, MACHINE_LOCK, WAITING, agent_lock, go_on, kill_agent, log_of
from hosts import wait_until
from test_matrix import POINTS, STEPS, cases

pytestmark = pytest.mark.promise(1, 2, 4, 8)
LINGER = 0.7  # seconds: longer than an agent needs to undo a deployment that it takes for lost


def empty_cache(world):
    shutil.rmtree(world.host.environment["XDG_CACHE_HOME"])


def other_home(world):
    """Let all later agents have another home directory, and another cache directory in it."""
    home = world.host.directory / "home/another"
    (home / "cache").mkdir(parents=True)
    world.host.environment.update(HOME=str(home), XDG_CACHE_HOME=str(home / "cache"))


def lose_owner_lock(world):
    for path in world.host.state.glob("deployments/*/owner.lock"):
        path.unlink()


def lose_machine_lock(world):
    world.host.path(MACHINE_LOCK).unlink(missing_ok=True)


def lose_two(world):
    """Leave only the machine's lock."""
    empty_cache(world)
    lose_owner_lock(world)


LOSSES = {
    "empty-cache": empty_cache,
    "other-home": other_home,
    "owner-lock": lose_owner_lock,
    "machine-lock": lose_machine_lock,
    "two-locks": lose_two,
}
KILLS = ("kill-agent", "kill-both")
# Without the machine's lock nothing tells the commands that a killed switch process has left.
SINGLE = {"machine-lock": KILLS[:1]}
FEW = ("activating", "checking", "committing", "rolling-back")
ENDS = {(*case[:3],): STEPS[case[4][0]] for case in cases() if case[3] == 1}
ENDS.update({(*case[:3],): STEPS[case[4][0]] for case in cases() if case[:3] not in ENDS})


def losses():
    for loss in LOSSES:
        for point in POINTS["nixos"] if loss == "empty-cache" else FEW:
            for kill in SINGLE.get(loss, KILLS):
                yield loss, point, kill


def meet_the_next_agent(world):
    """Let it connect, and do something that it must not do."""
    wait_until(lambda: world.agent.text().count("is connected to") > 1, 30, "the next agent")
    time.sleep(LINGER)


@pytest.mark.parametrize("case", list(losses()), ids="-".join)
def test_locks_are_lost_in_a_step(make_world, finish, case):
    loss, point, kill = case
    world = make_world()
    pattern, how = POINTS["nixos"][point]

    def lose(world, visit):
        LOSSES[loss](world)
        reply = scenes.FAULTS[kill](world, visit)
        meet_the_next_agent(world)
        return reply

    order = world.order(pattern, lose)
    deployment = scenes.deploy(world, "second", how)
    assert world.ended(deployment) == ENDS["nixos", point, kill]
    assert order.times == 0, "the fault has not happened"
    finish(world)


# --- another state directory ----------------------------------------------------------------------


def move_in(world):
    """Let all later agents have a home directory and a state directory of their own."""
    other_home(world)
    home = Path(world.host.environment["HOME"])
    world.host.environment["STATE_DIRECTORY"] = str(home / "state")
    return home


def kill_all(world):
    """Kill agent and switch process, and start no agent."""
    for pid in [world.agent.pid, *world.switches()]:
        os.kill(pid, 9)
    world.agent.wait(10)


@pytest.mark.parametrize("then", ["nothing", "another-fails"])
def test_a_path_that_another_state_directory_has_confirmed(make_world, finish, then):
    """Who comes back with the first state directory must not undo it: it has the path's journal."""
    world = make_world()
    first = (dict(world.host.environment), world.host.state)
    moved = []

    def move(world, visit):
        kill_all(world)
        moved.append(move_in(world))
        world.host.state = moved[0] / "state"
        world.start()
        return "exit 1"

    world.order(r"^test\.end \S+-second", move)
    path = scenes.nixos(world.files, "second")
    interrupted = world.deploy(path)
    world.workspace.wait(interrupted)  # "state lost", says the second agent
    world.asked.clear()
    confirmed = world.deploy(path)
    assert world.ended(confirmed) == "succeeded"
    if then == "another-fails":
        assert world.ended(scenes.deploy(world, "third", scenes.BAD)) == "rolled-back"
    kill_all(world)
    world.host.environment, world.host.state = first
    world.visits.clear()
    world.start()
    wait_until(lambda: world.host.step(interrupted) == "failed", 30, "the end in its journal")
    reason = world.host.journal(interrupted)["reason"]
    assert reason.endswith("another deployment was confirmed since: it is left alone")
    assert world.story() == "" and world.running() == world.profile() == path


def test_what_is_unconfirmed_is_undone_by_the_state_directory_that_knows_it(make_world):
    """Another one has deployed meanwhile, and has gone back to the path that it found."""
    world = make_world()
    first = (dict(world.host.environment), world.host.state)

    def move(world, visit):
        kill_all(world)
        world.host.state = move_in(world) / "state"
        world.start()
        return "exit 1"

    world.order(r"^test\.end \S+-second", move)
    before = world.running()
    interrupted = scenes.deploy(world, "second")
    world.workspace.wait(interrupted)
    assert world.ended(scenes.deploy(world, "third", scenes.BAD)) == "rolled-back"
    kill_all(world)
    world.host.environment, world.host.state = first
    world.start()
    wait_until(lambda: world.host.step(interrupted) == "rolled-back", 30, "the rollback")
    assert world.running() == world.profile() == before


def test_a_deployment_of_another_state_directory_is_waited_for(make_world):
    """The machine's lock names it. The agent reports that it knows nothing, but not before."""
    world = make_world(args=("--activation-timeout=60", "--confirm-timeout=2"))
    old = world.host.state
    seen = []

    def move(world, visit):
        world.agent.kill()
        world.host.state = move_in(world) / "state"
        world.start()
        meet_the_next_agent(world)
        time.sleep(1)
        seen.append(world.workspace.deployment(deployment)["status"])
        return "go"

    world.order(r"^test\.end \S+-second", move)
    before = world.running()
    deployment = scenes.deploy(world, "second")
    world.workspace.wait(deployment)
    assert seen == ["InProgress"]
    world.host.state = old
    assert world.host.step(deployment) == "rolled-back"  # no agent came back to this directory
    assert world.running() == world.profile() == before


# --- who looks, and who waits ---------------------------------------------------------------------


def owner_lock(world, deployment):
    return world.host.state / "deployments" / deployment / "owner.lock"


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
        path = owner_lock(world, world.asked[-1].id)
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
