"""Deployments that are interrupted: by kill -9 of either process or both, by power loss, by a lost state directory."""

import json
import os
import re
import shutil
import signal

import closures
import pytest
from hosts import wait_until

pytestmark = pytest.mark.promise(2, 6, 7, 15)

WAITS = json.dumps({"unit_recheck": 0.2, "backoff": 0.1, "slowest": 0.5})
ONCE = "[ -e /nix/var/{name} ] || {{ touch /nix/var/{name}; {code}; }}"


def once(name, code):
    """Shell code that does something the first time only, also over a reboot."""
    return ONCE.format(name=name, code=code)


@pytest.fixture
def nixos_machine(make_machine):
    """A machine that runs a NixOS system, and that system's path."""
    machine = make_machine(env={"CACHIX_DEPLOY_WAITS": WAITS})
    first = closures.nixos(machine.files, f"{machine.name}-first")
    assert machine.deploy(first).status == "Succeeded"
    return machine, first


def switches(machine):
    return [pid for pid, line in machine.host.processes().items() if re.search(r" switch [0-9a-f-]{36}", line)]


def kill_switch(machine):
    for pid in wait_until(lambda: switches(machine)):
        os.kill(pid, signal.SIGKILL)


def interrupt(machine, how):
    """Kill the switch process, the agent, both, or cut the power; an agent runs afterwards."""
    if how == "power":
        machine.host.reboot()
    elif how in ("agent", "both"):
        machine.agent.kill()
    if how in ("switch", "both"):
        kill_switch(machine)
    if how != "switch":
        machine.start()


@pytest.mark.parametrize("how", ["switch", "both", "power"])
def test_in_the_activation_is_rolled_back(nixos_machine, how):
    machine, first = nixos_machine
    deployment = machine.order(closures.nixos(machine.files, 2, after="touch /run/here; " + closures.hang()))
    wait_until(lambda: machine.host.path("/run/here").exists())
    interrupt(machine, how)
    outcome = machine.outcome(deployment)
    assert (outcome.status, outcome.step) == ("Failed", "rolled-back")
    what = "the machine restarted" if how == "power" else "it was interrupted"
    assert f"{what} before it was confirmed" in outcome.reason
    assert machine.host.running() == machine.host.profile() == machine.host.boot_default() == first
    assert outcome.log.splitlines()[-1].startswith("Failed to activate the deployment. ")
    assert machine.deploy(closures.nixos(machine.files, 3)).status == "Succeeded"


def test_the_agent_alone_in_the_activation_changes_nothing(nixos_machine):
    machine, _ = nixos_machine
    new = closures.nixos(machine.files, 2, after="touch /run/here; " + closures.wait_for("/run/go-on"))
    deployment = machine.order(new)
    wait_until(lambda: machine.host.path("/run/here").exists())
    machine.agent.kill()
    machine.start()
    machine.host.path("/run/go-on").touch()
    assert machine.outcome(deployment).status == "Succeeded"
    assert machine.host.record().count(("test", new)) == 1


@pytest.mark.parametrize("how", ["switch", "both", "power"])
def test_in_the_commit_goes_forward(nixos_machine, how):
    machine, _ = nixos_machine
    new = closures.nixos(machine.files, 2, before_boot=once("boot", f"touch /run/here; {closures.hang()}"))
    deployment = machine.order(new)
    wait_until(lambda: machine.host.path("/run/here").exists())
    interrupt(machine, how)
    assert machine.outcome(deployment).status == "Succeeded"
    assert machine.host.running() == machine.host.profile() == machine.host.boot_default() == new
    assert machine.host.record().count(("test", new)) == (2 if how == "power" else 1)


@pytest.mark.parametrize("how", ["switch", "both", "power"])
def test_in_the_rollback_is_rolled_back_again(nixos_machine, how):
    machine, _ = nixos_machine
    fallback = closures.nixos(machine.files, "fallback", before=once("first", ":") + "; " + once_second())
    assert machine.deploy(fallback).status == "Succeeded"
    deployment = machine.order(closures.nixos(machine.files, 3, after="exit 1"))
    wait_until(lambda: machine.host.path("/run/here").exists())
    interrupt(machine, how)
    outcome = machine.outcome(deployment)
    assert (outcome.status, outcome.step) == ("Failed", "rolled-back")
    assert "the activation ended with status 1" in outcome.reason
    assert machine.host.running() == machine.host.profile() == machine.host.boot_default() == fallback


def once_second():
    """Hang the second time that the script runs: in the first rollback to it."""
    hang = f"touch /nix/var/hung /run/here; {closures.hang()}"
    return f"if [ -e /nix/var/ran ] && [ ! -e /nix/var/hung ]; then {hang}; fi; touch /nix/var/ran"


def test_a_rollback_that_never_gets_through_ends(nixos_machine):
    machine, _ = nixos_machine
    hang = "[ ! -e /run/broken ] || { kill -9 $PPID; sleep 3600; }"
    fallback = closures.nixos(machine.files, "fallback", before=hang)
    assert machine.deploy(fallback).status == "Succeeded"
    outcome = machine.deploy(closures.nixos(machine.files, 3, before="touch /run/broken; exit 1"))
    assert (outcome.status, outcome.step) == ("Failed", "rollback-failed")
    assert "the rollback was interrupted 3 times" in outcome.reason
    machine.host.path("/run/broken").unlink()
    assert machine.deploy(closures.nixos(machine.files, 4)).status == "Succeeded"


def test_the_agent_in_the_download_starts_again(nixos_machine):
    machine, _ = nixos_machine
    wrappers = machine.host.directory / "wrappers"
    wrappers.mkdir()
    real = shutil.which("nix-store")
    hold = "touch /run/here; " + closures.wait_for("/run/go-on")
    (wrappers / "nix-store").write_text(f'#!/bin/sh\n{hold}\nexec {real} "$@"\n')
    (wrappers / "nix-store").chmod(0o755)
    machine.agent.stop()
    machine.env = {"PATH": f"{wrappers}:{machine.host.environment['PATH']}", "CACHIX_DEPLOY_WAITS": WAITS}
    machine.start()
    deployment = machine.order(closures.nixos(machine.files, 2))
    wait_until(lambda: machine.host.path("/run/here").exists())
    machine.agent.kill()
    machine.start()
    machine.host.path("/run/go-on").touch()
    outcome = machine.outcome(deployment)
    assert outcome.status == "Succeeded", outcome


def test_a_deployment_that_is_interrupted_again_and_again_before_it_begins_ends(nixos_machine):
    machine, first = nixos_machine
    wrappers = machine.host.directory / "wrappers"
    wrappers.mkdir()
    (wrappers / "nix-store").write_text("#!/bin/sh\ntouch /run/here\nexec sleep 3600\n")
    (wrappers / "nix-store").chmod(0o755)
    machine.agent.stop()
    machine.env = {"PATH": f"{wrappers}:{machine.host.environment['PATH']}", "CACHIX_DEPLOY_WAITS": WAITS}
    machine.start()
    deployment = machine.order(closures.nixos(machine.files, 2))
    for _ in range(3):
        wait_until(lambda: machine.host.path("/run/here").exists())
        machine.agent.kill()
        machine.host.path("/run/here").unlink()
        machine.start()
    outcome = machine.outcome(deployment)
    assert (outcome.status, outcome.step) == ("Failed", "failed")
    assert "it was interrupted 3 times before anything was changed" in outcome.reason
    assert machine.host.running() == first


def test_a_lost_state_is_reported_and_nothing_executed(nixos_machine):
    machine, _ = nixos_machine
    deployment = machine.order(closures.nixos(machine.files, 2, after="touch /run/here; " + closures.hang()))
    wait_until(lambda: machine.host.path("/run/here").exists())
    machine.host.close()
    shutil.rmtree(machine.host.state)
    machine.host.state.mkdir()
    shutil.rmtree(machine.host.path("/run"))
    machine.host.path("/run").mkdir()
    machine.host.boot()
    calls = len(machine.host.record())
    machine.start()
    outcome = machine.outcome(deployment)
    assert outcome.status == "Failed" and "state lost" in outcome.reason
    assert len(machine.host.record()) == calls


def test_a_journal_of_garbage_stops_nothing(nixos_machine):
    machine, _ = nixos_machine
    machine.agent.stop()
    for number, text in enumerate([b"", b"\0" * 4096, b"[]", b'{"id": 7}']):
        directory = machine.host.state / "deployments" / f"garbage-{number}"
        directory.mkdir()
        (directory / "journal.json").write_bytes(text)
    machine.start()
    machine.agent.wait_for("can't be read and was set aside")
    assert machine.deploy(closures.nixos(machine.files, 2)).status == "Succeeded"
    for directory in machine.host.state.glob("deployments/garbage-*"):
        shutil.rmtree(directory)


def test_somebody_elses_deployment_is_left_alone(nixos_machine):
    machine, first = nixos_machine
    other = closures.nixos(machine.files, "by-hand")
    machine.workspace.push(other)
    machine.host.fetch(machine.workspace.cache_url, machine.files.key.public, other)
    takes_over = f"{other}/bin/switch-to-configuration test"
    outcome = machine.deploy(closures.nixos(machine.files, 2, after=takes_over + "; exit 1"))
    assert (outcome.status, outcome.step) == ("Failed", "failed")
    assert f"{other} runs now, so somebody else has deployed: it is left alone" in outcome.reason
    assert machine.host.running() == other and machine.host.profile() == first
    machine.host.output(f"{first}/bin/switch-to-configuration", "test")
