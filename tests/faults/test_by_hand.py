"""`rollback` and `activate-local` with faults in them, beside deployments, and without a workspace.

The machine ends on the path that it had, or on the one that was wanted.
"""

import contextlib
import os
import re
import signal

import pytest
import scenes
from chains import MACHINE_LOCK, agent_lock, another_holds, go_on
from hosts import command, wait_until
from invariants import assert_invariants
from test_state import SIZE, empty, full
from world import WAITS, Asked, _runs

from activate import lock

pytestmark = [pytest.mark.promise(1, 2, 3, 5), pytest.mark.long]
LEADER = r"cachix_leader.* by hand\s*$"
ENDS = {"S": "succeeded", "F": "failed", "B": "rolled-back"}


def begin(world, *args):
    """Start a command at the machine."""
    argv = [*command("cachix-deploy"), *world.args, *args]
    return world.host.start(f"by-hand-{len(world.visits)}", argv)


def ended(world, timeout=40.0):
    """Wait until all that was begun by hand has ended, and note it; the journal of the last."""

    def journals():
        with contextlib.suppress(OSError):  # the power is being cut
            return [entry for entry in world.journals().values() if entry.get("by_hand")]
        return []

    wait_until(lambda: journals() and all(e["step"] in ENDS.values() for e in journals()), timeout)
    for entry in sorted(journals(), key=lambda entry: entry["sequence"]):
        if entry["id"] not in world.by_hand:
            world.by_hand.add(entry["id"])
            world.asked.append(Asked(entry["id"], entry["store_path"], None))
    return max(journals(), key=lambda entry: entry["sequence"])


def leaders(world):
    return [pid for pid, line in world.host.processes().items() if re.search(LEADER, line)]


def kill(world, *pids):
    """Kill processes, and wait until they have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(map(_runs, pids)), 10, "killed processes to end")


def kill_leader(world, visit):
    kill(world, *leaders(world))
    return "go"


def kill_leader_and_switch(world, visit):
    kill(world, *leaders(world), *world.switches())
    return "hang"


def kill_all(world, visit):
    """Kill also the command itself: only the agent is left."""
    kill(world, world.command.pid, *leaders(world), *world.switches())
    return "hang"


def hang_up(world, visit):
    """Lose the terminal."""
    world.command.signal(signal.SIGHUP)
    world.command.wait()
    return "go"


FAULTS = {
    "exit": "exit 1",
    "hang": "hang",
    "hang-up": hang_up,
    "kill-switch": scenes.kill_switch,
    "kill-agent": scenes.kill_agent,
    "kill-leader": kill_leader,
    "kill-leader-and-switch": kill_leader_and_switch,
    "kill-all": kill_all,
    "power": scenes.power,
}
POINTS = {
    "rooting": r"^nix-store .*--add-root \S+/new",
    "activating": r"^test \S+-first",
    "activated": r"^test\.end \S+-first",
    "committing": r"^nix-env .*--set \S+-first",
    "booted": r"^boot\.end \S+-first",
}
# How a rollback to `first` ends, from `second`; two letters: either of these.
MATRIX = """
           rooting activating  activated  committing  booted
exit        S      B           B          B           B
hang        F      B           B          B           B
hang-up     S      S           S          S           S
kill-switch FS     B           B          S           S
kill-agent  S      S           S          S           S
kill-leader FS     S           S          S           S
kill-leader-and-switch F B     B          S           S
kill-all    F      B           B          S           S
power       F      B           B          S           S
"""
ROWS = [line.split() for line in MATRIX.strip().splitlines()]
CASES = [(fault, point, end) for fault, *ends in ROWS[1:] for point, end in zip(ROWS[0], ends)]


@pytest.fixture
def deployed(make_world):
    """Make a machine on which `second` was deployed after `first`."""

    def make(**more):
        world = make_world(waits={**WAITS, "look": 0.3}, **more)
        assert world.ended(scenes.deploy(world, "second")) == "succeeded"
        return world

    return make


@pytest.mark.parametrize(("fault", "point", "end"), CASES, ids=["-".join(case) for case in CASES])
def test_a_fault_in_a_rollback(deployed, finish, fault, point, end):
    world = deployed()
    order = world.order(POINTS[point], FAULTS[fault])
    world.command = begin(world, "rollback")
    entry = ended(world)
    assert entry["step"] in [ENDS[letter] for letter in end], entry
    assert order.times == 0, "the fault has not happened"
    if fault in ("exit", "hang", "kill-switch", "kill-agent", "kill-leader"):
        status = world.command.wait()
        assert (status == 0) == (entry["step"] == "succeeded"), world.command.text()
    finish(world)


def test_the_matrix_has_each_fault():
    assert [row[0] for row in ROWS[1:]] == list(FAULTS) and ROWS[0] == list(POINTS)


def test_a_rollback_without_a_workspace(deployed, make_workspace, finish):
    """The workspace learns of it when it is back."""
    workspace = make_workspace()
    world = deployed(workspace=workspace)
    workspace.stop()
    rollback = begin(world, "rollback")
    assert rollback.wait() == 0, rollback.text()
    entry = ended(world)
    assert re.search(r"rolled back to \S+-first\n", rollback.text())
    assert entry["step"] == "succeeded"
    workspace.serve()
    line = rf"agent {world.name} .*rolled back by hand .*-first"
    wait_until(lambda: re.search(line, workspace.cli("audit")), 30, "the workspace to know")
    finish(world)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
@pytest.mark.parametrize("point", [None, POINTS["activating"], POINTS["committing"]])
def test_a_full_disk(make_world, finish, point):
    world = make_world(start=False, waits={**WAITS, "look": 0.3})
    world.separate_state(SIZE)
    world.start()
    world.connected()
    assert world.ended(scenes.deploy(world, "second")) == "succeeded"
    if point is None:
        full(world)
    else:
        world.order(point, lambda world, visit: full(world) or "go")
    rollback = begin(world, "rollback")
    assert rollback.wait() == 1, rollback.text()
    empty(world)
    if point is not None:
        assert ended(world)["step"] == "rolled-back"
    finish(world)


def test_beside_a_deployment(held, finish):
    world, deployment = held()
    rollback = begin(world, "rollback")
    assert rollback.wait() == 75
    assert "deployment 1 is under way (activating): wait for its end" in rollback.text()
    go_on(world)
    assert world.ended(deployment) == "succeeded"
    finish(world)


def test_a_deployment_is_cancelled_while_it_is_activated(held, finish):
    world, deployment = held()
    rollback = begin(world, "rollback", "--cancel")
    assert rollback.wait() == 0, rollback.text()
    assert "deployment 1 was cancelled (rolled-back): it was cancelled by hand" in rollback.text()
    assert world.ended(deployment) == "rolled-back"
    finish(world)


def test_a_deployment_is_cancelled_while_it_is_downloaded(deployed, finish):
    world = deployed()
    world.order(r"^nix-store .*--indirect --max-jobs 32", "hang")
    deployment = scenes.deploy(world, "third")
    wait_until(lambda: world.step(deployment) == "downloading" and not world.orders[0].times, 20)
    rollback = begin(world, "rollback", "--cancel")
    assert rollback.wait() == 0, rollback.text()
    assert world.ended(deployment) == "failed"
    assert world.journals()[deployment]["reason"] == "it was cancelled by hand"
    assert ended(world)["store_path"].endswith("-first")
    finish(world)


def test_a_deployment_that_waits_has_its_turn_after_the_rollback(deployed, finish):
    """Not between the end of what was cancelled and the rollback: it is newer than both."""
    world = deployed()
    world.order(r"^nix-store .*--indirect --max-jobs 32", "hang")
    cancelled = scenes.deploy(world, "third")
    wait_until(lambda: world.step(cancelled) == "downloading" and not world.orders[0].times, 20)
    waiting = scenes.deploy(world, "fourth")
    rollback = begin(world, "rollback", "--cancel")
    assert rollback.wait() == 0, rollback.text()
    by_hand = ended(world)
    assert by_hand["store_path"].endswith("-first")
    assert world.ended(cancelled) == "failed" and world.ended(waiting) == "succeeded"
    fourth = world.journals()[waiting]
    assert fourth["previous_running"] == by_hand["store_path"], "it had its turn before"
    fourth = next(asked for asked in world.asked if asked.id == waiting)
    world.asked.remove(fourth)
    world.asked.append(fourth)
    finish(world)


def test_what_an_agent_that_is_gone_has_left_is_cancelled(held, finish):
    """Agent and switch process are gone: the command itself takes the deployment back."""
    world, deployment = held()
    os.kill(world.agent.pid, signal.SIGKILL)
    world.agent.wait()
    kill(world, *world.switches())
    rollback = begin(world, "rollback", "--cancel")
    assert rollback.wait() == 0, rollback.text()
    assert world.step(deployment) == "rolled-back"
    world.start()
    world.connected()
    assert world.ended(deployment) == "rolled-back"
    finish(world)


def test_two_at_once(deployed, finish):
    world = deployed()
    both = [begin(world, "rollback") for _ in range(2)]
    assert sorted(each.wait() for each in both)[0] == 0
    ended(world)
    finish(world)


@pytest.mark.parametrize("held_lock", ["deployment", "machine"])
def test_beside_another_program_that_deploys(deployed, finish, held_lock):
    """Such as Cachix's agent."""
    world = deployed()
    machine = world.host.path(MACHINE_LOCK)
    path = agent_lock(world, "deployment") if held_lock != "machine" else machine
    wait_until(lambda: not lock.held(str(path)), 10, "the agent to let go")
    with another_holds(path):
        rollback = begin(world, "rollback")
        assert rollback.wait() == 75
    assert "another program deploys to this machine: it holds /" in rollback.text()
    finish(world)


def test_a_deployment_waits_for_what_is_done_by_hand(deployed, finish):
    world = deployed()
    world.order(
        r"^test \S+-first", lambda world, visit: scenes.deploy(world, "third") and "linger 1"
    )
    rollback = begin(world, "rollback")
    assert rollback.wait() == 0
    ended(world)
    # the order in which they were confirmed
    third = next(asked for asked in world.asked if asked.path.endswith("-third"))
    world.asked.remove(third)
    world.asked.append(third)
    assert world.ended(third.id) == "succeeded"
    finish(world)


@pytest.mark.parametrize(
    ("how", "end"), [(scenes.GOOD, 0), (scenes.BAD, 1), (scenes.BAD_COMMIT, 1)]
)
def test_a_path_is_activated(deployed, finish, how, end):
    """From a directory, as a first installation may do it; the agent's own cache is not asked."""
    world = deployed()
    path = scenes.nixos(world.files, "third", how)
    world.workspace.push(path)
    url, key = world.workspace.cache_url, world.files.key.public
    activation = begin(
        world, "activate-local", path, f"--substituter={url}", f"--trusted-key={key}"
    )
    assert activation.wait() == end, activation.text()
    assert ended(world)["step"] == ("rolled-back" if end else "succeeded")
    if not end:
        assert f"this machine runs {path}\n" in activation.text()
    finish(world)


def test_a_path_that_no_key_has_signed(deployed, finish):
    world = deployed()
    path = scenes.nixos(world.files, "third")
    world.workspace.push(path)
    key = "other-1:" + world.files.key.public.partition(":")[2]
    url = world.workspace.cache_url
    activation = begin(
        world, "activate-local", path, f"--substituter={url}", f"--trusted-key={key}"
    )
    assert activation.wait() == 1
    assert ended(world)["step"] == "failed"
    finish(world)


@pytest.mark.parametrize("kind", ["darwin", "home_manager", "plain"])
def test_each_kind_is_rolled_back(make_world, finish, kind):
    world = make_world(kind)
    before = world.running()
    assert world.ended(scenes.deploy(world, "second")) == "succeeded"
    rollback = begin(world, "rollback")
    assert rollback.wait() == 0, rollback.text()
    assert ended(world)["store_path"] == before == world.running()
    assert_invariants(world)
    finish(world)
