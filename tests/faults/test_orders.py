"""A workspace that sends deployments again, sends newer ones at any moment, and cancels them."""

import pytest
import scenes
from chains import (
    COMMITTED,
    DOWNLOAD,
    GOOD,
    MACHINE_LOCK,
    WAITING,
    another_holds,
    deployed,
    go_on,
    log_of,
    system,
)
from hosts import wait_until
from proxy import Proxy
from world import ALWAYS, Asked

# --- deployments that are sent again --------------------------------------------------------------


@pytest.mark.promise(6, 13)
def test_sent_again_before_it_is_begun(held, scripted, finish):
    world, first = held(workspace=scripted)
    queued = scenes.deploy(world, "third")
    scripted.again(queued)
    go_on(world)
    assert [world.ended(first), world.ended(queued)] == ["succeeded", "succeeded"]
    assert world.story() == f"{GOOD}\n{deployed('third')}"
    assert scripted.ends(queued) == ["Succeeded"]
    finish(world)


@pytest.mark.promise(6, 13)
def test_sent_again_while_it_runs(held, scripted, finish):
    world, deployment = held(workspace=scripted)
    scripted.again(deployment)
    scripted.again(deployment, resumed=True)
    go_on(world)
    assert world.ended(deployment) == "succeeded"
    finish(world)  # the next deployment shows that nothing else was queued
    assert world.story() == f"{GOOD}\n{deployed('next')}"
    assert scripted.ends(deployment) == ["Succeeded"]


@pytest.mark.promise(6, 13)
@pytest.mark.parametrize("how", [scenes.GOOD, scenes.BAD])
def test_sent_again_after_its_end(make_world, scripted, finish, how):
    world = make_world(workspace=scripted)
    deployment = scenes.deploy(world, "second", how)
    end = world.ended(deployment)
    reported = scripted.ends(deployment)
    scripted.again(deployment)
    wait_until(lambda: scripted.ends(deployment) == 2 * reported, 20, "the result once more")
    assert world.ended(deployment) == end == ("succeeded" if how == scenes.GOOD else "rolled-back")
    assert world.story().count("test second") == 1
    finish(world)


@pytest.mark.promise(15)
def test_resumed_without_a_journal(make_world, scripted, finish):
    world = make_world(workspace=scripted)
    path = system(world, "")
    deployment = "00000000-1111-4222-8333-444444444444"
    scripted.sent[deployment] = {"store_path": path, "script": None, "index": 1}
    world.asked.append(Asked(deployment, path, world.running()))
    scripted.again(deployment, resumed=True)
    assert world.ended(deployment) == "failed"
    assert world.story() == ""
    assert scripted.deployment(deployment)["reason"].startswith("state lost")
    finish(world)


# The GC root of the path that ran before: the last call before the agent asks whether the
# deployment is still wanted.
PREVIOUS = r"^nix-store .*--add-root \S+/previous"
RESUMED = {
    DOWNLOAD: (scenes.GOOD, f"downloading: download second -> hang\n{GOOD}"),
    PREVIOUS: (scenes.GOOD, GOOD),
    r"^test \S+-second": (scenes.GOOD, "activating: test second -> hang\nrolling-back: test first"),
    r"^script": (
        scenes.GOOD,
        "activating: test second\nchecking: script good -> hang\nrolling-back: test first",
    ),
    r"^boot \S+-second": (scenes.GOOD, f"{GOOD} -> hang\n{COMMITTED}"),
    r"^test \S+-first": (scenes.BAD, "rolling-back: test first -> hang\nrolling-back: test first"),
}


ENDS = {scenes.GOOD: ("succeeded", "Succeeded"), scenes.BAD: ("rolled-back", "Failed")}
RESUMED_IN = ["downloading", "ready", "activating", "checking", "committing", "rolling-back"]


@pytest.mark.promise(2, 8, 15)
@pytest.mark.parametrize("point", RESUMED, ids=RESUMED_IN)
def test_resumed_with_a_journal(make_world, scripted, finish, point):
    how, chain = RESUMED[point]
    world = make_world(workspace=scripted)
    world.order(point, scenes.kill_both)
    deployment = scenes.deploy(world, "second", how)
    wait_until(lambda: world.agent.text().count("is connected to") == 2, 30, "the next agent")
    scripted.again(deployment, resumed=True)
    scripted.again(deployment, resumed=True)
    world.ended(deployment)
    finish(world)
    assert world.story().partition(f"\n{deployed('next')}")[0].endswith(chain)
    assert world.story().count("test second") == chain.count("test second") + (how == scenes.BAD)


# --- successors and cancellations -----------------------------------------------------------------


@pytest.mark.promise(6, 14)
def test_only_the_newest_of_the_queue_is_deployed(held, scripted, finish):
    world, first = held(workspace=scripted)
    queued = [scenes.deploy(world, version) for version in ("third", "fourth", "fifth")]
    scripted.arrived()
    go_on(world)
    assert world.ended(first) == "succeeded"
    assert list(map(world.ended, queued)) == ["superseded", "superseded", "succeeded"]
    assert world.story() == f"{GOOD}\n{deployed('fifth')}"
    for older in queued[:2]:
        reason = scripted.deployment(older)["reason"]
        assert reason == "deployment 4 arrived before this one was started"
    finish(world)


@pytest.mark.promise(14)
def test_a_successor_comes_while_the_machine_lock_is_awaited(make_world, scripted, finish):
    world = make_world(workspace=scripted)
    with another_holds(world.host.path(MACHINE_LOCK)):
        older = scenes.deploy(world, "second")
        wait_until(lambda: WAITING in log_of(world, older), 30, "the wait for the lock")
        newer = scenes.deploy(world, "third")
        scripted.arrived()
    assert [world.ended(older), world.ended(newer)] == ["superseded", "succeeded"]
    assert world.story() == f"downloading: download second\n{deployed('third')}"
    finish(world)


@pytest.mark.promise(14)
def test_a_successor_comes_at_the_last_look(make_world, scripted, finish):
    world = make_world(workspace=scripted)
    newer = []

    def send():
        newer.append(scenes.deploy(world, "third"))
        scripted.arrived()

    def started(*_):
        wait_until(lambda: scripted.peer.statuses, 10, "the report that the deployment started")
        return "go"

    scripted.at_last_look(send)
    world.order(PREVIOUS, started)
    older = scenes.deploy(world, "second")
    assert world.ended(older) == "superseded"
    assert world.ended(newer[0]) == "succeeded"
    assert world.story() == f"downloading: download second\n{deployed('third')}"
    finish(world)


def cancel(world, deployment):
    path = f"/api/v1/deploy/deployment/{deployment}/cancel"
    assert world.workspace.request("POST", path)[0] == 200


@pytest.mark.promise(14)
def test_cancelled_in_the_queue(held, scripted, finish):
    world, first = held(workspace=scripted)
    queued = scenes.deploy(world, "third")
    scripted.arrived()
    scripted.peer.cancelled.add(queued)
    go_on(world)
    assert [world.ended(first), world.ended(queued)] == ["succeeded", "cancelled"]
    assert world.story() == f"{GOOD}\ndownloading: download third"
    finish(world)


@pytest.mark.promise(14)
def test_cancelled_in_the_download(world, finish):
    deployments = []

    def cancel_it(world, visit):
        wait_until(lambda: deployments, 10, "the id of the deployment")
        cancel(world, deployments[0])
        return "go"

    world.order(DOWNLOAD, cancel_it)
    deployments.append(scenes.deploy(world, "second"))
    assert world.ended(deployments[0]) == "cancelled"
    assert world.story() == "downloading: download second"
    finish(world)


@pytest.mark.promise(14)
def test_cancelled_while_the_machine_lock_is_awaited(world, finish):
    with another_holds(world.host.path(MACHINE_LOCK)):
        deployment = scenes.deploy(world, "second")
        wait_until(lambda: WAITING in log_of(world, deployment), 30, "the wait for the lock")
        cancel(world, deployment)
    assert world.ended(deployment) == "cancelled"
    assert world.story() == "downloading: download second"
    finish(world)


@pytest.mark.promise(4, 14)
@pytest.mark.parametrize("point", [r"^test ", r"^script ", r"^boot "])
def test_a_cancellation_that_comes_too_late_changes_nothing(world, finish, point):
    """The machine runs the new path, and so the workspace says."""
    answers = []

    def cancel_it(world, visit):
        path = f"/api/v1/deploy/deployment/{world.asked[-1].id}/cancel"
        answers.append(world.workspace.request("POST", path)[0])
        return "go"

    world.order(point, cancel_it)
    deployment = scenes.deploy(world, "second")
    assert world.ended(deployment) == "succeeded"
    told = world.workspace.deployment(deployment)
    assert (told["status"], told["cancelRequested"]) == ("Succeeded", None)
    assert (told["cancelRefused"] is not None) == (answers == [200])
    assert world.story() == GOOD
    finish(world)


@pytest.mark.promise(6, 14)
@pytest.mark.parametrize("how", ["cancelled", "replaced"])
@pytest.mark.parametrize("activation", [scenes.GOOD, scenes.BAD])
@pytest.mark.long
def test_cancelled_while_no_report_gets_through(make_world, live, finish, how, activation):
    """The workspace believes that the deployment waits, and the machine has begun to run it."""
    with Proxy(live.url) as proxy:
        world = make_world(url=proxy.url)
        proxy.order("^> PUT ", "cut", ALWAYS)
        newer = []

        def cancel_it(world, visit):
            deployment = world.asked[-1].id
            assert world.workspace.deployment(deployment)["status"] == "Pending"
            if how == "cancelled":
                cancel(world, deployment)
            else:
                newer.append(scenes.deploy(world, "third"))
            assert world.workspace.deployment(deployment)["status"] == "Cancelled"
            proxy.heal()
            return "go"

        world.order("^test ", cancel_it)
        deployment = scenes.deploy(world, "second", activation)
        end, status = ENDS[activation]
        assert world.ended(deployment) == end
        told = world.workspace.deployment(deployment)
        assert told["status"] == status and told["outcome"] == end and told["cancelRefused"]
        for each in newer:
            assert world.ended(each) == "succeeded"
        finish(world)
