"""A deployment that reboots a machine with a real systemd, with the power cut in each step.

A unit that starts first stands for the boot loader: what its default is becomes what runs, and what
was booted.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import closures
import pytest
from caches import Link
from containers import Container, ServiceMachine
from hosts import BOOT_DEFAULT, CURRENT_SYSTEM, PROJECT, wait_until
from live import Workspace

pytestmark = [pytest.mark.timeout(400), pytest.mark.long, pytest.mark.promise(2, 7)]

PARTS = ("kernel", "initrd", "kernel-modules")
BOOT_LOADER = f"""
[Unit]
DefaultDependencies=no
Before=sysinit.target cachix-deploy.service
RequiresMountsFor=/nix
ConditionPathIsSymbolicLink={BOOT_DEFAULT}

[Service]
Type=oneshot
ExecStart=/bin/sh -c 'ln -sfn $(readlink {BOOT_DEFAULT}) {CURRENT_SYSTEM}; \\
  ln -sfn $(readlink {BOOT_DEFAULT}) /run/booted-system'

[Install]
WantedBy=sysinit.target
"""
GO_ON, HOLD = "/nix/var/go", "/nix/var/hold"


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The agent in one file, as `make pyz` builds it."""
    path = tmp_path_factory.mktemp("program") / "cachix-deploy.pyz"
    subprocess.run([sys.executable, str(PROJECT / "tools/pyz.py"), str(path)], check=True)
    return path


class Rebooting(ServiceMachine):
    """A machine that runs a first system, which its boot loader starts."""

    first: str
    reboots = 0

    def system(self, version: str, kernel: str, **hooks: str) -> str:
        """Add a system with a kernel. Each of its programs waits while HOLD has its name."""
        waits = {
            hook: f'while [ "$(cat {HOLD} 2>/dev/null)" = {version}-{hook} ]; do sleep 0.05; done'
            for hook in ("before", "after", "before_boot", "after_boot")
        }
        files = self.workspace.files
        links = {part: Link(files.add(f"{part}-{kernel}", kernel)) for part in PARTS}
        return closures.nixos(files, f"{self.name}-{version}", **{**waits, **hooks}, extra=links)

    def hold(self, point: str) -> None:
        """Let a program wait, until the power is cut."""
        self.host.path(HOLD).write_text(point)

    def entry(self, deployment: str) -> dict[str, Any]:
        """The journal of a deployment; empty if it can't be read now."""
        with contextlib.suppress(OSError, ValueError):
            path = self.host.upper / "var/lib/cachix-deploy/deployments" / deployment
            return dict(json.loads((path / "journal.json").read_text()))
        return {}

    def wait(self, condition: Callable[[], Any], timeout: float, what: str = "") -> None:
        """Wait for a condition. A machine that has shut down to reboot is started, as it would."""
        deadline = time.monotonic() + timeout
        while not self.is_off() and not condition():
            assert time.monotonic() < deadline, f"waited {timeout:.0f} s in vain for {what}"
            time.sleep(0.02)
        if self.is_off():
            self.host.close()
            self.host.boot()
            self.reboots += 1
            self.wait(condition, timeout, what)

    def is_off(self) -> bool:
        return self.host.holder is not None and self.host.holder.poll() is not None

    def status(self, deployment: str, timeout: float = 120) -> str:
        """Wait for the end of a deployment at the workspace, and return its status."""
        ends = ("Succeeded", "Failed", "Cancelled")
        self.wait(lambda: self.workspace.deployment(deployment)["status"] in ends, timeout, "end")
        return str(self.workspace.deployment(deployment)["status"])

    def cut(self) -> None:
        """Cut the power, and boot again."""
        self.host.close()
        self.host.path(HOLD).unlink(missing_ok=True)
        self.host.boot()

    def runs(self) -> tuple[str, ...]:
        """The paths that run, that were booted, and that boot next; empty during a boot."""
        if self.is_off() or not self.host.is_up():
            return ()
        links = (CURRENT_SYSTEM, "/run/booted-system")
        now = [self.host.run(["readlink", link]).stdout.strip() for link in links]
        return (*now, str(self.host.boot_default()))


@pytest.fixture
def make(
    tree: Path,
    program: Path,
    tmp_path: Path,
    make_workspace: Callable[..., Workspace],
    name: str,
) -> Iterator[Callable[[], Rebooting]]:
    with contextlib.ExitStack() as stack:

        def make() -> Rebooting:
            host = stack.enter_context(Container(tmp_path / "container", tree))
            workspace = make_workspace()
            machine = Rebooting(host, program, workspace, name, "--confirm-timeout=6")
            host.write("/etc/systemd/system/boot-loader.service", BOOT_LOADER)
            wants = host.upper / "etc/systemd/system/sysinit.target.wants"
            wants.mkdir()
            (wants / "boot-loader.service").symlink_to("../boot-loader.service")
            machine.boot()
            machine.first = machine.system("first", "1")
            assert machine.deploy(machine.first).status == "Succeeded"
            host.reboot()
            machine.wait_registered(time.time() - 60)
            wait_until(lambda: machine.runs() == (machine.first,) * 3, 30)
            return machine

        yield make


def order(machine: Rebooting, path: str) -> str:
    machine.workspace.push(path)
    return machine.workspace.deploy(machine.name, path, reboot="when-needed")


def boot_id(machine: Rebooting) -> str:
    return machine.host.output("cat", "/proc/sys/kernel/random/boot_id").strip()


def test_a_reboot_is_confirmed_by_the_agent_that_it_starts(make: Callable[[], Rebooting]) -> None:
    machine = make()
    second, before = machine.system("second", "2"), boot_id(machine)
    deployment = order(machine, second)
    assert machine.status(deployment) == "Succeeded"
    machine.wait(lambda: machine.runs() == (second,) * 3, 30)
    assert boot_id(machine) != before
    facts = machine.workspace.deployment(deployment)
    assert facts["reason"] == "confirmed after a reboot" and facts["outcome"] == "succeeded"
    entry = machine.entry(deployment)
    assert entry["reboots"] == 1 and entry["boot_id"] == before
    assert f"rebooting into {second}" in machine.workspace.text(deployment)
    # nothing reboots it once more
    assert machine.status(order(machine, machine.system("third", "2"))) == "Succeeded"
    assert boot_id(machine) != before and machine.runs()[1] == second


def test_a_system_that_does_not_reach_the_workspace_goes_back(
    make: Callable[[], Rebooting],
) -> None:
    machine = make()
    second = machine.system("second", "2")
    deployment = order(machine, second)
    machine.wait(lambda: machine.entry(deployment).get("step") == "rebooting", 60)
    machine.workspace.kill()
    machine.wait(lambda: machine.entry(deployment).get("step") == "rolled-back", 120)
    machine.wait(lambda: machine.runs() == (machine.first,) * 3, 60)
    machine.workspace.serve()
    assert machine.status(deployment) == "Failed"
    facts = machine.workspace.deployment(deployment)
    assert facts["outcome"] == "rolled-back"
    assert "could not be reached for 6 s after the reboot" in facts["reason"]
    assert facts["reason"].endswith(f"rolled back to {machine.first}, which runs now")
    assert machine.entry(deployment)["reboots"] == 2


CUTS = {  # where the power is cut: what is held then, what the journal says, and how it ends
    "activating": ("second-after", {"step": "activating"}, "rolled-back"),
    "committing": ("second-before_boot", {"step": "committing"}, "succeeded"),
    "committed": ("second-after_boot", {"step": "committing"}, "succeeded"),
    "rebooting": ("", {"step": "rebooting"}, "succeeded"),
    "confirming": ("", {"step": "rebooting", "attempts": 1}, "rolled-back"),
    "rolling-back": ("first-before_boot", {"step": "rolling-back"}, "rolled-back"),
    "rolled-boot": ("first-after_boot", {"step": "rolling-back"}, "rolled-back"),
    "rebooting-back": ("", {"step": "rolling-back", "reboots": 2}, "rolled-back"),
}
AFTER_THE_BOOT = ("confirming", "rolling-back", "rolled-boot", "rebooting-back")


@pytest.mark.parametrize("point", CUTS)
def test_a_power_cut(make: Callable[[], Rebooting], point: str) -> None:
    """At most one reboot of ours forth and one back, and one of the two systems runs and boots."""
    machine = make()
    held, wanted, step = CUTS[point]
    second = machine.system("second", "2")
    if held.startswith("second"):
        machine.hold(held)
    deployment = order(machine, second)
    if point in AFTER_THE_BOOT:
        machine.wait(lambda: machine.entry(deployment).get("step") == "rebooting", 60)
        machine.workspace.kill()
        machine.hold(held)
    machine.wait(lambda: wanted.items() <= machine.entry(deployment).items(), 90, f"{wanted}")
    if held:
        text = f"{held.partition('-')[2]}"
        action = "boot" if text.endswith("boot") else "test"
        path = second if held.startswith("second") else machine.first
        machine.wait(lambda: (action, path) in machine.host.record()[2:], 60)
    machine.cut()
    machine.wait(lambda: machine.entry(deployment).get("step") == step, 120)
    if point in AFTER_THE_BOOT:
        machine.workspace.serve()
    status = "Succeeded" if step == "succeeded" else "Failed"
    assert machine.status(deployment) == status
    last = second if step == "succeeded" else machine.first
    machine.wait(lambda: machine.runs() in ((last,) * 3, (last, second, last)), 60)
    assert machine.entry(deployment)["reboots"] <= 2
    assert machine.status(order(machine, machine.system("next", "1"))) == "Succeeded"
