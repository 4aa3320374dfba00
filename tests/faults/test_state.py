"""The state directory fails in a step of a deployment.

The agent survives. The machine ends on the path that ran before or on a confirmed one; without its
state it is left as it is.
"""

import contextlib
import json
import os
import shutil

import pytest
import scenes
from hosts import wait_until
from invariants import assert_invariants
from test_matrix import POINTS

from activate import journal
from cachix_protocol import FAILURE_LINE, SUCCESS_LINE

pytestmark = pytest.mark.promise(1, 2, 6, 7, 11, 12, 15)
SIZE = "192k"  # of the disk that becomes full


def files(world, *names):
    """Return the state files of these names, of all deployments."""
    return [path for path in world.host.state.glob("deployments/*/*") if path.name in names]


# --- damage to the state, and its repair ----------------------------------------------------------


def full(world):
    """Fill the disk."""
    with (
        pytest.raises(OSError, match="No space"),
        open(world.host.state / "filler", "wb", buffering=0) as file,
    ):
        while True:
            file.write(b"\xff" * 512)


def empty(world):
    (world.host.state / "filler").unlink()


def read_only(world):
    """Make it read-only, as the kernel does after an error of the disk."""
    state = str(world.host.state.resolve())
    world.host.output("mount", "--bind", state, state)
    argv = ["mount", "-o", "remount,bind,ro", state]
    wait_until(lambda: world.host.run(argv).returncode == 0, 10, "the agent not to write")


def writable(world):
    world.host.output("umount", "--lazy", str(world.host.state.resolve()))


def zeros(world):
    """Fill files with zeros, as some file systems do with files that were not synced."""
    for path in files(world, "journal.json", "reported.json"):
        path.write_bytes(b"\0" * path.stat().st_size)


def half(world):
    for path in files(world, "journal.json", "reported.json", "log"):
        os.truncate(path, path.stat().st_size // 2)


def directory_as(name):
    """Return a function that puts a directory in the place of a file."""

    def replace(world):
        for path in files(world, name):
            while not path.is_dir():  # the agent may write its file again
                path.unlink(missing_ok=True)
                with contextlib.suppress(FileExistsError):
                    path.mkdir()

    return replace


def wiped(world):
    """Remove everything, as after a reboot of a machine with its root directory in memory."""
    while paths := list(world.host.state.iterdir()):  # the agent may write meanwhile
        for path in paths:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def nothing(world):
    pass


DAMAGES = {
    "full": (full, empty),
    "read-only": (read_only, writable),
    "zeros": (zeros, nothing),
    "half": (half, nothing),
    "journal-dir": (directory_as("journal.json"), nothing),
    "wiped": (wiped, nothing),
    "reported-dir": (directory_as("reported.json"), nothing),
    "log-dir": (directory_as("log"), nothing),
}
UNWRITABLE = ("full", "read-only")
# How a deployment ends, without/with both processes killed at the same time. S: succeeded, B:
# rolled back, F: failed before anything was changed, L: failed because the state was lost.
ENDS = """
nixos         full  read-only  zeros  half  journal-dir  wiped  reported-dir  log-dir
downloading   F/F   F/F        S/L    S/L   F/L          S/L    S/S           S/S
activating    B/B   B/B        S/L    S/L   B/L          S/L    S/B           S/B
activated     B/B   B/B        S/L    S/L   B/L          S/L    S/B           S/B
checking      B/B   B/B        S/L    S/L   B/L          S/L    S/B           S/B
committing    B/B   B/B        S/L    S/L   B/L          S/L    S/S           S/S
booted        B/B   B/B        S/L    S/L   B/L          S/L    S/S           S/S
rolling-back  B/B   B/B        B/L    B/L   B/L          B/L    B/B           B/B
rolled-back   B/B   B/B        B/L    B/L   B/L          B/L    B/B           B/B

plain         full  read-only  zeros  half  journal-dir  wiped  reported-dir  log-dir
activating    B/B   -          S/L    -     -            -      -             -
activated     -     B/B        -      S/L   -            -      -             -
rolling-back  B/B   -          -      -     -            B/L    -             -
"""
# If the state is lost the machine stays as it is: running path, profile, and boot default of NixOS.
LEFT = {
    "nixos": {
        "downloading": "first first first",
        "activating": "first first first",
        "activated": "second first first",
        "checking": "second first first",
        "committing": "second first first",
        "booted": "second second second",
        "rolling-back": "second first first",
        "rolled-back": "first first first",
    },
    "plain": {
        "activating": "first first",
        "activated": "second second",
        "rolling-back": "second second",
    },
}


def cases():
    """Yield kind, point, damage, whether the processes are killed too, and how it ends."""
    for table in ENDS.strip().split("\n\n"):
        (kind, *damages), *rows = [line.split() for line in table.splitlines()]
        assert damages == list(DAMAGES)
        for point, *ends in rows:
            for damage, end in zip(damages, ends):
                for killed, letter in zip((False, True), end.split("/") if end != "-" else ()):
                    yield kind, point, damage, killed, letter


def case_id(case):
    return "-".join([*case[:3], "killed" if case[3] else "alone"])


def outcome(world, deployment):
    """Wait for the final report, and return the letter of how the deployment ended."""
    world.workspace.wait(deployment)
    report = world.workspace.deployment(deployment)
    reason = report["reason"] or ""
    if "; rolled back to /nix/store/" in reason:
        return "B"
    if report["status"] == "Succeeded":
        return "S"
    return "L" if reason.startswith("state lost") else "F"


def has_begun(world, deployment):
    """Whether the workspace knows that the agent has begun with a deployment."""
    return world.workspace.deployment(deployment)["status"] != "Pending"


def is_closed(world, deployment):
    """Whether the workspace has the closing line of a log, which nothing may hold back."""
    return "".join(world.workspace.log(deployment)[-1:]).startswith((SUCCESS_LINE, FAILURE_LINE))


def machine(world):
    """Return running path, profile, and boot default of NixOS, in the form of LEFT."""
    paths = [world.running(), world.profile()]
    if world.kind == "nixos":
        paths.append(world.host.boot_default())
    return " ".join(str(path).rpartition("-")[2] for path in paths)


def machine_of(world, point, end):
    """Return what `machine` must return after a deployment with this end."""
    if end == "L":
        return LEFT[world.kind][point]
    path = "second" if end == "S" else "first"
    return " ".join([path] * (3 if world.kind == "nixos" else 2))


def registered(world):
    """Return the process id of the agent that has registered last, according to the state."""
    with contextlib.suppress(OSError):
        return json.loads((world.host.state / f"registered-{world.name}.json").read_bytes())["pid"]


@pytest.fixture
def make_damaged(make_world):
    """Make a world whose state is damaged when a deployment comes to a point."""

    def make(kind, point, damage, killed):
        if damage in UNWRITABLE and os.geteuid() != 0:
            pytest.skip("a state that can't be written is a mount, which needs root")
        world = make_world(kind, start=damage != "full")
        if damage == "full":
            world.separate_state(SIZE)
            world.start()
            world.connected()

        def strike(world, visit):
            world.blind = True
            world.lost = {asked.id for asked in world.asked}
            # one whose begin was not reported is sent again
            wait_until(
                lambda: all(has_begun(world, id_) for id_ in world.lost), 10, "the first report"
            )
            DAMAGES[damage][0](world)
            return scenes.kill_both(world, visit) if killed else "go"

        world.order(POINTS[kind][point][0], strike)
        return world

    return make


@pytest.mark.parametrize("case", list(cases()), ids=case_id)
def test_the_state_fails_in_a_step(make_damaged, case):
    kind, point, damage, killed, end = case
    world = make_damaged(kind, point, damage, killed)
    deployment = scenes.deploy(world, "second", POINTS[kind][point][1])
    assert outcome(world, deployment) == end, world.workspace.deployment(deployment)
    assert world.lost == {deployment}, "the state was never damaged"
    wait_until(lambda: not world.switches(), 10, "the switch process to end")
    starts = [visit.point for visit in world.visits].count("systemd-run")
    assert killed or starts <= 1, "a switch process needs no other one to roll back"
    wait_until(lambda: is_closed(world, deployment), 10, "the end of the log")
    assert machine(world) == machine_of(world, point, end)
    assert_goes_on(world, damage, killed, POINTS[kind][point][1])


def assert_goes_on(world, damage, killed, how):
    """Repair the state, and check that the agent deploys, and that a restart repeats nothing."""
    assert world.agent.process.poll() is None, world.agent.text()
    DAMAGES[damage][1](world)
    world.blind = False
    if damage in UNWRITABLE:
        world.lost.clear()
        if not killed:  # the agent writes the end also without another deployment
            wait_until(lambda: world.step() in journal.FINAL, 10, "the end in the journal")
    again = scenes.deploy(world, "second" if how == scenes.GOOD else "next")
    assert world.ended(again) == "succeeded", world.workspace.deployment(again)
    calls = len(world.visits)
    world.kill(agent=True)
    wait_until(lambda: registered(world) == world.agent.pid, 30, "the next agent")
    assert_invariants(world)
    assert world.visits[calls:] == [], "something was repeated"
