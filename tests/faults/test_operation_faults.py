"""Operations with faults in them: what is to boot, is a test, or a dry run, and nothing else.

Whatever happens, no operation turns into another one.
"""

import re

import pytest
import scenes
from chains import go_on
from hosts import wait_until
from test_state import SIZE, empty, full
from world import WAITS

pytestmark = [pytest.mark.promise(1, 2, 3, 4), pytest.mark.long]
ENDS = {"S": "succeeded", "F": "failed", "B": "rolled-back"}
POINTS = {
    "boot": {
        "committing": r"^nix-env .*--set \S+-second",
        "set": r"^nix-env\.end .*--set \S+-second",
        "booting": r"^boot \S+-second",
        "booted": r"^boot\.end \S+-second",
    },
    "test": {
        "activating": r"^test \S+-second",
        "activated": r"^test\.end \S+-second",
        "checking": r"^script ",
    },
    "dry-activate": {
        "downloading": r"^nix-store .*--indirect --max-jobs 32",
        "dry": r"^dry-activate \S+-second",
    },
}
# How each operation ends with a fault at each of its points.
MATRIX = {
    "boot": """
            committing set booting booted
exit        B          B   B       B
hang        B          B   B       B
kill-switch S          S   S       S
kill-agent  S          S   S       S
kill-both   S          S   S       S
power       S          S   S       S
""",
    "test": """
            activating activated checking
exit        B          B         B
hang        B          B         B
kill-switch B          B         B
kill-agent  S          S         S
kill-both   B          B         B
power       B          B         B
""",
    "dry-activate": """
            downloading dry
exit        F           F
hang        F           F
kill-switch S           S
kill-agent  S           S
kill-both   S           S
power       S           S
""",
}


def cases():
    for operation, text in MATRIX.items():
        (*points,), *rows = [line.split() for line in text.strip().splitlines()]
        assert points == list(POINTS[operation])
        for fault, *ends in rows:
            yield from ((operation, fault, point, end) for point, end in zip(points, ends))


def quiet(world, operation, path):
    """Check that no program of another operation has run for a path."""
    calls = {action for action, system in world.host.record() if system == path}
    allowed = {"boot": {"boot"}, "test": {"test"}, "dry-activate": {"dry-activate"}}
    assert calls <= allowed[operation], calls


CASES = list(cases())


@pytest.mark.parametrize(
    ("operation", "fault", "point", "end"), CASES, ids=["-".join(case) for case in CASES]
)
def test_a_fault(make_world, finish, operation, fault, point, end):
    world = make_world(waits={**WAITS, "download": 3.0})
    first, last = world.running(), world.host.profile()
    order = world.order(POINTS[operation][point], scenes.FAULTS[fault])
    deployment = scenes.deploy(world, "second", operation=operation)
    assert world.ended(deployment) == ENDS[end], world.journals()[deployment]
    assert order.times == 0, "the fault has not happened"
    quiet(world, operation, world.asked[-1].path)
    path = world.asked[-1].path
    is_done = end == "S"
    assert world.host.profile() == (path if is_done and operation == "boot" else last)
    assert world.running() == (path if is_done and operation == "test" else first)
    finish(world)


@pytest.mark.parametrize(
    ("operation", "outcome", "words"),
    [
        ("boot", "reboot-needed", r"^\S+-second is what starts next: it was not activated$"),
        ("test", "tested", "^None$"),
        ("dry-activate", "dry-run", "^None$"),
    ],
)
def test_an_operation(world, finish, operation, outcome, words):
    first = world.running()
    deployment = scenes.deploy(world, "second", operation=operation)
    assert world.ended(deployment) == "succeeded"
    report = world.workspace.deployment(deployment)
    assert (report["outcome"], report["operation"]) == (outcome, operation)
    assert re.search(words, str(report["reason"]))
    if operation == "dry-activate":
        assert "would activate the configuration..." in world.workspace.text(deployment)
    world.lose_power()
    world.connected()
    assert world.running() == (world.asked[-1].path if operation == "boot" else first)
    finish(world)


def test_after_a_test_a_failure_goes_back_to_what_was_tested(world, finish):
    assert world.ended(scenes.deploy(world, "second", operation="test")) == "succeeded"
    tested = world.running()
    assert world.ended(scenes.deploy(world, "third", scenes.BAD)) == "rolled-back"
    assert world.running() == tested
    finish(world)


def test_a_dry_run_settles_nothing(make_world, finish):
    """After a rollback that failed, the former system stays the one to go back to."""
    world = make_world()
    first = world.running()
    world.order(r"^test \S+-first", "exit 1", times=9)
    assert world.ended(scenes.deploy(world, "second", scenes.BAD)) == "rollback-failed"
    assert world.ended(scenes.deploy(world, "third", operation="dry-activate")) == "succeeded"
    world.heal()
    assert world.ended(scenes.deploy(world, "fourth", scenes.BAD)) == "rolled-back"
    assert world.running() == first
    finish(world)


@pytest.mark.parametrize("operation", ["boot", "test", "dry-activate"])
@pytest.mark.parametrize("kind", ["darwin", "home_manager", "plain"])
def test_what_makes_no_sense_is_refused(make_world, finish, kind, operation):
    """Home Manager has a dry run; all else is refused before anything is changed."""
    world = make_world(kind)
    before = world.running()
    deployment = scenes.deploy(world, "second", operation=operation)
    has_dry_run = (kind, operation) == ("home_manager", "dry-activate")
    assert world.ended(deployment) == ("succeeded" if has_dry_run else "failed")
    report = world.workspace.deployment(deployment)
    assert report["outcome"] == ("dry-run" if has_dry_run else "nothing-changed")
    if not has_dry_run:
        assert f"the operation `{operation}` makes no sense for a" in report["reason"]
    assert world.running() == before
    finish(world)


@pytest.mark.parametrize("operation", ["boot", "test"])
def test_a_full_disk(make_world, finish, operation):
    world = make_world(start=False)
    world.separate_state(SIZE)
    world.start()
    world.connected()
    point = {"boot": r"^nix-env .*--set \S+-second", "test": r"^test \S+-second"}[operation]
    world.order(point, lambda world, visit: full(world) or "go")
    deployment = scenes.deploy(world, "second", operation=operation)
    wait_until(lambda: "test first" in world.story() or "generation" in world.story(), 30)
    empty(world)
    assert world.ended(deployment) == "rolled-back"
    finish(world)


def test_the_workspace_is_away(make_world, make_workspace, finish):
    workspace = make_workspace()
    world = make_world(workspace=workspace)
    world.order(r"^test \S+-second", lambda world, visit: workspace.kill() or "go")
    deployment = scenes.deploy(world, "second", operation="test")
    wait_until(lambda: world.host.step(deployment) == "rolled-back", 60)
    workspace.serve()
    assert world.ended(deployment) == "rolled-back"
    finish(world)


def test_a_held_deployment_gives_way_to_a_newer_one(held, finish):
    """An operation waits as any other deployment does."""
    world, deployment = held()
    other = scenes.deploy(world, "third", operation="dry-activate")
    go_on(world)
    assert world.ended(deployment) == "succeeded"
    assert world.ended(other) == "succeeded"
    finish(world)
