"""Every step of a deployment with every fault in it, once and always.

The machine ends on the path that ran before, or on a confirmed one.
"""

import pytest
import scenes
from world import ALWAYS

pytestmark = pytest.mark.promise(1, 2, 6, 7, 11)
STEPS = {"S": "succeeded", "F": "failed", "B": "rolled-back", "X": "rollback-failed"}
# The visit at which each fault happens, and the scene in which the visit occurs.
POINTS = {
    "nixos": {
        "received": (r"^systemd-run", scenes.GOOD),
        "downloading": (r"^nix-store .*--indirect --max-jobs 32", scenes.GOOD),
        "ready": (r"^nix-store .*--add-root \S+/previous", scenes.GOOD),
        "activating": (r"^test \S+-second", scenes.GOOD),
        "activated": (r"^test\.end \S+-second", scenes.GOOD),
        "checking": (r"^script", scenes.GOOD),
        "committing": (r"^nix-env .*--set \S+-second", scenes.GOOD),
        "profile-set": (r"^nix-env\.end .*--set \S+-second", scenes.GOOD),
        "booting": (r"^boot \S+-second", scenes.GOOD),
        "booted": (r"^boot\.end \S+-second", scenes.GOOD),
        "undo-profile": (r"^nix-env .*--switch-generation", scenes.BAD_COMMIT),
        "undo-boot": (r"^boot \S+-first", scenes.BAD_COMMIT),
        "rolling-back": (r"^test \S+-first", scenes.BAD),
        "rolled-back": (r"^test\.end \S+-first", scenes.BAD),
    },
    "darwin": {
        "activating": (r"^activate \S+-second", scenes.GOOD),
        "activated": (r"^activate\.end \S+-second", scenes.GOOD),
        "committing": (r"^nix-env .*--set \S+-second", scenes.GOOD),
        "profile-set": (r"^nix-env\.end .*--set \S+-second", scenes.GOOD),
        "rolling-back": (r"^activate \S+-first", scenes.BAD),
        "rolled-back": (r"^activate\.end \S+-first", scenes.BAD),
    },
    "home_manager": {
        "activating": (r"^activate \S+-second", scenes.GOOD),
        "profile-set": (r"^activate\.middle \S+-second", scenes.GOOD),
        "activated": (r"^activate\.end \S+-second", scenes.GOOD),
        "checking": (r"^script", scenes.GOOD),
        "rolling-back": (r"^activate \S+-first", scenes.BAD),
        "rolled-back": (r"^activate\.end \S+-first", scenes.BAD),
    },
    "plain": {
        "activating": (r"^nix-env .*--set \S+-second", scenes.GOOD),
        "activated": (r"^nix-env\.end .*--set \S+-second", scenes.GOOD),
        "checking": (r"^script", scenes.GOOD),
        "rolling-back": (r"^nix-env .*--switch-generation", scenes.BAD_CHECK),
        "rolled-back": (r"^nix-env\.end .*--switch-generation", scenes.BAD_CHECK),
    },
}
# How a deployment ends if the fault happens once/always. Two letters: either of these ends. A
# single end: the point is passed only once then, so that once is always. A rollback whose commands
# fail after they have had their effect has not failed.
ENDS = """
nixos         exit  hang  die   kill-switch  kill-agent  kill-both  power
received      S     S     S     S            S/F         S/F        S/F
downloading   F     F     F     S            S/SF        S/F        S/F
ready         S     S     S     S            S           S          S
activating    B     B     B     B            S           B          B
activated     B     B     B     B            S           B          B
checking      B     B     B     B            S           B          B
committing    B     B     B     S/B          S           S/B        S/B
profile-set   B     B     B     S/B          S           S/B        S/B
booting       B     B     B     S/B          S           S/B        S/B
booted        B     B     B     S/B          S           S/B        S/B
undo-profile  B     B     B     B/X          B           B/X        B/X
undo-boot     B/X   B/X   B/X   B/X          B           B/X        B/X
rolling-back  B/X   B/X   B/X   B/X          B           B/X        B/X
rolled-back   B/B   B/B   B/B   B/X          B           B/X        B/X

darwin        exit  hang  die   kill-switch  kill-agent  kill-both  power
activating    B     B     B     B            S           B          B
activated     B     B     B     B            S           B          B
committing    B     B     B     S/B          S           S/B        S/B
profile-set   B     B     B     S/B          S           S/B        S/B
rolling-back  B/X   B/X   B/X   B/X          B           B/X        B/X
rolled-back   B/B   B/B   B/B   B/X          B           B/X        B/X

home_manager  exit  hang  die   kill-switch  kill-agent  kill-both  power
activating    B     B     B     B            S           B          B
profile-set   B     B     B     B            S           B          B
activated     B     B     B     B            S           B          B
checking      B     B     B     B            S           B          B
rolling-back  B/X   B/X   B/X   B/X          B           B/X        B/X
rolled-back   B/B   B/B   B/B   B/X          B           B/X        B/X

plain         exit  hang  die   kill-switch  kill-agent  kill-both  power
activating    B     B     B     B            S           B          B
activated     B     B     B     B            S           B          B
checking      B     B     B     B            S           B          B
rolling-back  B     B     B     B/X          B           B/X        B/X
rolled-back   B     B     B     B            B           B          B/BX
"""


def cases():
    """Yield kind, point, fault, number of times, and the ends that may follow."""
    for table in ENDS.strip().split("\n\n"):
        (kind, *faults), *rows = [line.split() for line in table.splitlines()]
        assert faults == list(scenes.FAULTS)
        for point, *ends in rows:
            for fault, end in zip(faults, ends):
                once, _, always = end.partition("/")
                if always:
                    yield kind, point, fault, 1, once
                yield kind, point, fault, ALWAYS, always or once


def case_id(case):
    return "-".join([*case[:3], "once" if case[3] == 1 else "always"])


@pytest.mark.parametrize("case", list(cases()), ids=case_id)
def test_a_fault_in_a_step(make_world, finish, case):
    kind, point, fault, times, end = case
    world = make_world(kind)
    pattern, how = POINTS[kind][point]
    order = world.order(pattern, scenes.FAULTS[fault], times)
    deployment = scenes.deploy(world, "second", how)
    ended = world.ended(deployment)
    assert ended in [STEPS[letter] for letter in end], world.workspace.deployment(deployment)
    assert order.times < times, "the fault has not happened"
    if (*case[:3], 1) not in ONCE:
        assert times - order.times == 1, "passed more than once: the table needs two ends"
    finish(world)


ONCE = {case[:4] for case in cases()}


def test_the_matrix_is_whole():
    points = {(kind, point) for kind in POINTS for point in POINTS[kind]}
    assert {case[:2] for case in cases()} == points
