"""Reboots that a deployment asks for, with faults in them: one forth, and at most one back.

A machine in these tests boots what its boot loader's default is, with another boot id, and shows
the kernel of that as the one that was booted.
"""

import contextlib
import json
import os
import time
from datetime import datetime, timedelta

import pytest
import scenes
from hosts import CURRENT_SYSTEM, wait_until
from invariants import assert_invariants
from test_state import SIZE, empty, full
from world import ALWAYS, OPTIONS

pytestmark = [pytest.mark.promise(1, 2, 3, 4, 7), pytest.mark.long]
BRIEF = ("--activation-timeout=5", "--confirm-timeout=3")


def reboot(world, visit):
    """Reboot the machine as systemd does."""
    world.reboots += 1
    world.shut_down()
    return "gone"


def kill_agent(world, visit):
    """Kill the agent, and reboot if that was asked for."""
    scenes.kill_agent(world, visit)
    return reboot(world, visit) if visit.point == "reboot" else "go"


FAULTS = {**scenes.FAULTS, "kill-agent": kill_agent}


@pytest.fixture
def rebooting(make_world):
    """Make a machine that reboots when it is asked to, and shows what it has booted."""

    def make(**more):
        world = make_world(**{"args": BRIEF, "start": False, **more})
        world.reboots, came_up = 0, world.came_up

        def boot():
            came_up()
            booted = world.host.path("/run/booted-system")
            if not booted.is_symlink():
                os.symlink(world.host.target(CURRENT_SYSTEM), booted)

        world.came_up = boot
        world.install(scenes.nixos(world.files, "old", kernel="1"))
        boot()
        world.start()
        world.connected()
        world.order("^reboot", reboot, ALWAYS)
        return world

    return make


def deploy(world, version="second", kernel="2", how=scenes.GOOD, **options):
    """Order a deployment of a system with a kernel, perhaps another one."""
    path = scenes.nixos(world.files, version, how, kernel=kernel)
    return world.deploy(path, scenes.script(world.files), **{"reboot": "when-needed", **options})


def report(world, deployment):
    return world.workspace.deployment(deployment)


@pytest.mark.parametrize("operation", ["switch", "boot"])
def test_a_reboot_is_confirmed(rebooting, finish, operation):
    world = rebooting()
    deployment = deploy(world, operation=operation)
    assert world.ended(deployment) == "succeeded"
    assert world.reboots == 1
    end = report(world, deployment)
    assert (end["outcome"], end["reason"]) == ("succeeded", "confirmed after a reboot")
    assert "rebooting" in [step for step, _ in end["steps"]]
    assert world.journals()[deployment]["reboots"] == 1
    finish(world)


def test_no_reboot_without_need(rebooting, finish):
    world = rebooting()
    deployment = deploy(world, kernel="1")
    assert world.ended(deployment) == "succeeded"
    assert world.reboots == 0
    finish(world)


def test_no_reboot_without_a_wish(rebooting, finish):
    world = rebooting()
    deployment = deploy(world, reboot="never")
    assert world.ended(deployment) == "succeeded"
    assert world.reboots == 0
    finish(world)


POINTS = {
    "committing": r"^nix-env .*--set \S+-second",
    "booted": r"^boot\.end \S+-second",
    "rebooting": r"^reboot",
}
# How a deployment ends with a fault on the way to its reboot, and after how many reboots of ours:
# one more, where the disk has lost what the boot loader wrote.
MATRIX = """
            committing booted rebooting
exit        B0         B0     B0
hang        B0         B0     B0
kill-switch S1         S1     S1
kill-agent  S1         S1     S1
kill-both   S1         S1     S1
power       S1         S?     S0
"""
ENDS = {"S": "succeeded", "B": "rolled-back"}
ROWS = [line.split() for line in MATRIX.strip().splitlines()]
CASES = [(fault, point, end) for fault, *ends in ROWS[1:] for point, end in zip(ROWS[0], ends)]


@pytest.mark.parametrize(("fault", "point", "end"), CASES, ids=["-".join(case) for case in CASES])
def test_a_fault_on_the_way(rebooting, finish, fault, point, end):
    world, ran = rebooting(), []

    def strike(world, visit):
        reply = FAULTS[fault]
        answer = reply if isinstance(reply, str) else reply(world, visit)
        ran.append(world.running())
        return answer

    order = world.order(POINTS[point], strike)
    deployment = deploy(world)
    assert world.ended(deployment) == ENDS[end[0]], world.journals()[deployment]
    assert order.times == 0, "the fault has not happened"
    assert world.reboots == int(end[1].replace("?", "0" if ran[0].endswith("-second") else "1"))
    finish(world)


BACK = {
    "profile": r"^nix-env .*--switch-generation",
    "profile-set": r"^nix-env\.end .*--switch-generation",
    "boot": r"^boot \S+-old",
    "boot-set": r"^boot\.end \S+-old",
    "reboot": r"^reboot",
}


@pytest.fixture
def cut_off(rebooting, make_workspace):
    """A machine that does not reach its workspace after the reboot; `order` is called then."""
    workspace = make_workspace()
    world = rebooting(workspace=workspace)

    def begin(order=lambda: None):
        def cut(world, visit):
            workspace.kill()
            world.heal()
            world.order("^reboot", reboot, ALWAYS)
            order()
            return reboot(world, visit)

        world.order("^reboot", cut)
        deployment = deploy(world)
        wait_until(lambda: world.host.step(deployment) == "rolled-back", 90, "the way back")
        workspace.serve()
        assert world.ended(deployment) == "rolled-back"
        return deployment

    return world, begin


def test_a_system_that_does_not_reach_its_workspace(cut_off, finish):
    world, begin = cut_off
    deployment = begin()
    assert world.reboots == 2
    end = report(world, deployment)
    old = world.asked[0].before
    assert (end["status"], end["outcome"]) == ("Failed", "rolled-back")
    assert "the workspace could not be reached for 3 s after the reboot" in end["reason"]
    assert end["reason"].endswith(f"; rolled back to {old}, which runs now")
    assert "rebooting back into" in world.workspace.text(deployment)
    assert world.host.target("/run/booted-system") == old
    finish(world)


@pytest.mark.parametrize(
    "fault", ["exit", "hang", "kill-switch", "kill-agent", "kill-both", "power"]
)
@pytest.mark.parametrize("point", BACK)
def test_a_fault_on_the_way_back(cut_off, finish, fault, point):
    world, begin = cut_off
    orders = []
    deployment = begin(lambda: orders.append(world.order(BACK[point], FAULTS[fault])))
    assert orders[0].times == 0, "the fault has not happened"
    assert world.reboots <= 2
    assert world.journals()[deployment]["reboots"] <= 2
    finish(world)


@pytest.mark.parametrize("fault", ["kill-agent", "power"])
def test_a_fault_while_it_is_confirmed(rebooting, make_workspace, finish, fault):
    """Another boot, or another agent, goes on with the confirmation."""
    workspace = make_workspace()
    world = rebooting(workspace=workspace, args=OPTIONS)

    def cut(world, visit):
        workspace.kill()
        return reboot(world, visit)

    world.order("^reboot", cut)
    deployment = deploy(world)

    def is_confirming():
        with contextlib.suppress(OSError, KeyError, ValueError):
            entry = world.journals()[deployment]
            return entry["reboots"] and entry["attempts"] and entry["boot_id"] != boot_id(world)
        return False

    wait_until(is_confirming, 60, "the confirmation")
    scenes.FAULTS[fault](world, None)
    workspace.serve()
    assert world.ended(deployment) == "succeeded"
    assert world.reboots == 1
    finish(world)


def boot_id(world):
    return (world.host.directory / "boot-id").read_text().strip()


def test_another_system_has_booted(rebooting, finish):
    """Somebody has chosen another entry in the menu of the boot loader."""
    world = rebooting()
    old = world.running()

    def choose(world, visit):
        default = world.host.path("/nix/var/boot-default")
        default.unlink()
        os.symlink(old, default)
        return reboot(world, visit)

    world.order("^reboot", choose)
    deployment = deploy(world)
    assert world.ended(deployment) == "rolled-back"
    assert (
        f"{old} runs after the reboot instead of the new system"
        in report(world, deployment)["reason"]
    )
    assert world.reboots == 1
    finish(world)


def hour(hours):
    return (datetime.now() + timedelta(hours=hours)).strftime("%H:%M")


def test_a_window_that_is_closed(rebooting, finish):
    """A newer deployment does not wait for the window of an older one."""
    world = rebooting(args=(*BRIEF, f"--reboot-window={hour(2)}-{hour(3)}"))
    deployment = deploy(world, reboot="window")
    wait_until(lambda: world.host.step(deployment) == "awaiting-reboot", 30)
    wait_until(lambda: report(world, deployment)["step"] == "awaiting-reboot", 20)
    scenes.kill_agent(world, None)
    world.connected()
    time.sleep(2)
    assert world.host.step(deployment) == "awaiting-reboot" and world.reboots == 0
    newer = deploy(world, "third", reboot="never")
    assert world.ended(deployment) == "succeeded"
    end = report(world, deployment)
    assert (end["outcome"], end["status"]) == ("reboot-needed", "Succeeded")
    assert end["reason"] == "a newer deployment arrived, so that the machine was not rebooted"
    assert world.ended(newer) == "succeeded"
    assert world.reboots == 0
    finish(world)


def test_a_window_that_is_open(rebooting, finish):
    world = rebooting(args=(*BRIEF, "--reboot-window=00:00-24:00"))
    deployment = deploy(world, reboot="window")
    assert world.ended(deployment) == "succeeded"
    assert world.reboots == 1
    finish(world)


def test_a_power_cut_while_it_waits_is_the_reboot(rebooting, finish):
    world = rebooting(args=(*BRIEF, f"--reboot-window={hour(2)}-{hour(3)}"))
    deployment = deploy(world, reboot="window")
    wait_until(lambda: world.host.step(deployment) == "awaiting-reboot", 30)
    world.lose_power()
    assert world.ended(deployment) == "succeeded"
    assert report(world, deployment)["reason"] == "confirmed after a reboot"
    assert world.reboots == 0
    finish(world)


@pytest.mark.parametrize(
    ("options", "args", "words"),
    [
        ({"reboot": "window"}, (), "there is no --reboot-window, for which the reboot was to wait"),
        ({}, (), "nothing starts an agent after a reboot, which would have to confirm it"),
    ],
)
def test_a_machine_that_can_not_reboot(rebooting, finish, options, args, words):
    world = rebooting(args=(*BRIEF, *args))
    extra = {} if options else {"etc": {"systemd": {"system": {"other.service": "[Unit]\n"}}}}
    path = scenes.nixos(world.files, "second", kernel="2", more=extra)
    deployment = world.deploy(path, **{"reboot": "when-needed", **options})
    assert world.ended(deployment) == "failed"
    end = report(world, deployment)
    assert end["outcome"] == "nothing-changed"
    assert end["reason"] == f"{words}; nothing was changed"
    finish(world)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_full_before_the_reboot(rebooting, finish):
    """Without a note there is no reboot: it could not be counted."""
    world = rebooting(start=False)
    world.host.close()
    assert world.reboots == 0
    world.host.reboot()
    world.separate_state(SIZE)
    world.start()
    world.connected()
    world.order(r"^boot\.end \S+-second", lambda world, visit: full(world) or "go")
    deployment = deploy(world)
    wait_until(lambda: "boot old" in world.story(), 60)
    empty(world)
    assert world.ended(deployment) == "rolled-back"
    assert world.reboots == 0
    finish(world)


def test_by_hand(rebooting, finish, tmp_path):
    """The spec's options count, and an agent goes on after the boot."""
    world = rebooting()
    path = scenes.nixos(world.files, "second", kernel="2")
    world.workspace.push(path)
    spec = tmp_path / "deploy.json"
    spec.write_text(
        json.dumps({"agents": {world.name: path}, "options": {"reboot": "when-needed"}})
    )
    from test_by_hand import begin, ended

    url, key = world.workspace.cache_url, world.files.key.public
    begin(world, "activate-local", str(spec), f"--substituter={url}", f"--trusted-key={key}")
    assert ended(world, 60)["step"] == "succeeded"
    assert world.reboots == 1 and world.running() == path
    wait_until(lambda: world.agent.text().count("is connected") > 0, 30)
    assert_invariants(world)
