"""The state directory fails in a step: the agent lives, the machine is where it was, or confirmed, or left as it is."""

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
SIZE = "192k"  # of a disk that is to be full


def files(world, *names):
    """The state files of these names, of all deployments."""
    return [path for path in world.host.state.glob("deployments/*/*") if path.name in names]


# --- what happens to the state, and how it is well again -------------------------------------------------------------


def full(world):
    """The disk takes nothing more."""
    with (
        pytest.raises(OSError, match="No space"),
        open(world.host.state / "filler", "wb", buffering=0) as file,
    ):
        while True:
            file.write(b"\xff" * 512)


def empty(world):
    (world.host.state / "filler").unlink()


def read_only(world):
    """As the kernel does it after an error of the disk."""
    state = str(world.host.state.resolve())
    world.host.output("mount", "--bind", state, state)
    argv = ["mount", "-o", "remount,bind,ro", state]
    wait_until(
        lambda: world.host.run(argv).returncode == 0,
        10,
        "a moment in which the agent does not write",
    )


def writable(world):
    world.host.output("umount", "--lazy", str(world.host.state.resolve()))


def zeros(world):
    """As some file systems leave files that were not synced."""
    for path in files(world, "journal.json", "reported.json"):
        path.write_bytes(b"\0" * path.stat().st_size)


def half(world):
    for path in files(world, "journal.json", "reported.json", "log"):
        os.truncate(path, path.stat().st_size // 2)


def directory_as(name):
    """A directory in the place of a file."""

    def replace(world):
        for path in files(world, name):
            while not path.is_dir():  # the agent may put its file back
                path.unlink(missing_ok=True)
                with contextlib.suppress(FileExistsError):
                    path.mkdir()

    return replace


def wiped(world):
    """Nothing is left, as after a reboot where the root directory is in memory."""
    while found := list(world.host.state.iterdir()):  # the agent may write meanwhile
        for path in found:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(
                missing_ok=True
            )


def nothing(world):
    pass


ILLNESSES = {
    "full": (full, empty), "read-only": (read_only, writable), "zeros": (zeros, nothing), "half": (half, nothing),
    "journal-directory": (directory_as("journal.json"), nothing), "wiped": (wiped, nothing),
    "reported-directory": (directory_as("reported.json"), nothing), "log-directory": (directory_as("log"), nothing),
}  # fmt: skip
UNWRITABLE = ("full", "read-only")
# How a deployment ends. S: succeeded, F: failed, nothing was changed, B: rolled back, and L: the state was lost.
ENDS = """
nixos         full  read-only  zeros  half  journal-directory  wiped  reported-directory  log-directory
downloading   F/F   F/F        S/L    S/L   F/L                S/L    S/S                 S/S
activating    B/B   B/B        S/L    S/L   B/L                S/L    S/B                 S/B
activated     B/B   B/B        S/L    S/L   B/L                S/L    S/B                 S/B
checking      B/B   B/B        S/L    S/L   B/L                S/L    S/B                 S/B
committing    B/B   B/B        S/L    S/L   B/L                S/L    S/S                 S/S
booted        B/B   B/B        S/L    S/L   B/L                S/L    S/S                 S/S
rolling-back  B/B   B/B        B/L    B/L   B/L                B/L    B/B                 B/B
rolled-back   B/B   B/B        B/L    B/L   B/L                B/L    B/B                 B/B

plain         full  read-only  zeros  half  journal-directory  wiped  reported-directory  log-directory
activating    B/B   -          S/L    -     -                  -      -                   -
activated     -     B/B        -      S/L   -                  -      -                   -
rolling-back  B/B   -          -      -     -                  B/L    -                   -
"""
# Where the state is lost the machine stays as it is: what runs, its profile, what boots.
LEFT = {
    "nixos": {
        "downloading": "first first first", "activating": "first first first", "activated": "second first first",
        "checking": "second first first", "committing": "second first first", "booted": "second second second",
        "rolling-back": "second first first", "rolled-back": "first first first",
    },
    "plain": {"activating": "first first", "activated": "second second", "rolling-back": "second second"},
}  # fmt: skip


def cases():
    """Kind, point, illness, whether the processes are killed too, and how it ends."""
    for table in ENDS.strip().split("\n\n"):
        (kind, *illnesses), *rows = [line.split() for line in table.splitlines()]
        assert illnesses == list(ILLNESSES)
        for point, *ends in rows:
            for illness, end in zip(illnesses, ends):
                for killed, letter in zip((False, True), end.split("/") if end != "-" else ()):
                    yield kind, point, illness, killed, letter


def named(case):
    return "-".join([*case[:3], "killed" if case[3] else "alone"])


def outcome(world, deployment):
    """How a deployment has ended, as the workspace was told."""
    world.workspace.wait(deployment)
    known = world.workspace.deployment(deployment)
    reason = known["reason"] or ""
    letter = (
        "S" if known["status"] == "Succeeded" else "L" if reason.startswith("state lost") else "F"
    )
    return "B" if "; rolled back to /nix/store/" in reason else letter


def is_closed(world, deployment):
    """Whether the workspace knows that a log is complete: nothing may hold that back."""
    return "".join(world.workspace.log(deployment)[-1:]).startswith((SUCCESS_LINE, FAILURE_LINE))


def machine(world):
    """What runs, its profile, and what boots where that is something else."""
    found = [
        world.running(),
        world.profile(),
        *([world.host.boot_default()] if world.kind == "nixos" else []),
    ]
    return " ".join(str(path).rpartition("-")[2] for path in found)


def machine_of(world, point, end):
    """What must be there after a deployment that ended so."""
    paths = {"S": "second", "F": "first", "B": "first"}
    return (
        LEFT[world.kind][point]
        if end == "L"
        else " ".join([paths[end]] * (3 if world.kind == "nixos" else 2))
    )


def registered(world):
    """The agent that has registered last, as far as the state knows."""
    with contextlib.suppress(OSError):
        return json.loads((world.host.state / f"registered-{world.name}.json").read_bytes())["pid"]


@pytest.fixture
def make_ill(make_world):
    """A world whose state falls ill when a deployment comes to a point."""

    def make(kind, point, illness, killed):
        if illness in UNWRITABLE and os.geteuid() != 0:
            pytest.skip("a state that can't be written needs root: it is a mount")
        world = make_world(kind, start=illness != "full")
        if illness == "full":
            world.separate_state(SIZE)
            world.start()
            world.connected()

        def strike(world, visit):
            world.blind = True
            world.lost = {asked.id for asked in world.asked}
            ILLNESSES[illness][0](world)
            return scenes.kill_both(world, visit) if killed else "go"

        world.order(POINTS[kind][point][0], strike)
        return world

    return make


@pytest.mark.parametrize("case", list(cases()), ids=named)
def test_the_state_fails_in_a_step(make_ill, case):
    kind, point, illness, killed, end = case
    world = make_ill(kind, point, illness, killed)
    deployment = scenes.deploy(world, "second", POINTS[kind][point][1])
    assert outcome(world, deployment) == end, world.workspace.deployment(deployment)
    assert world.lost == {deployment}, "the state was well all the time"
    wait_until(lambda: not world.switches(), 10, "the switch process to end")
    begun = [visit.point for visit in world.visits].count("systemd-run")
    assert killed or begun <= 1, "a switch process needs no other one to roll back"
    wait_until(lambda: is_closed(world, deployment), 10, "the end of the log")
    assert machine(world) == machine_of(world, point, end)
    goes_on(world, illness, killed, POINTS[kind][point][1])


def goes_on(world, illness, killed, how):
    """The agent lives; with a state that is well again it deploys, and a restart repeats nothing."""
    assert world.agent.process.poll() is None, world.agent.text()
    ILLNESSES[illness][1](world)
    world.blind = False
    if illness in UNWRITABLE:
        world.lost.clear()
        if not killed:  # without another deployment the end is written too
            wait_until(lambda: world.step() in journal.FINAL, 10, "the end in the journal")
    again = scenes.deploy(world, "second" if how == scenes.GOOD else "next")
    assert world.ended(again) == "succeeded", world.workspace.deployment(again)
    calls = len(world.visits)
    world.kill(agent=True)
    wait_until(lambda: registered(world) == world.agent.pid, 30, "the next agent")
    assert_invariants(world)
    assert world.visits[calls:] == [], "something was repeated"
