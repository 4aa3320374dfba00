"""The agent as a service of a real systemd, by the unit of README.rst.

The service, or the whole machine, is stopped in the middle of a deployment.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import closures
import pytest
from containers import (
    README_COMMAND,
    UNIT,
    Container,
    ServiceMachine,
    readme_unit,
)
from hosts import PROJECT, wait_until

# the first test may have to make the root tree
pytestmark = [pytest.mark.timeout(300), pytest.mark.long]

GO_ON = "/nix/var/go"  # a test makes this file to let a command go on
STOPPED = {"ActiveState": "inactive", "Result": "success", "ExecMainStatus": "0"}
INSTALL_UNIT = f'cp "$self/{UNIT}" /etc/systemd/system/ && systemctl daemon-reload'


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """The agent in one file, as `make pyz` builds it."""
    path = tmp_path_factory.mktemp("program") / "cachix-deploy.pyz"
    subprocess.run([sys.executable, str(PROJECT / "tools/pyz.py"), str(path)], check=True)
    return path


@pytest.fixture
def make_service(tree, program, tmp_path, live, name):
    """Boot a container, whose agent then deploys a first system.

    As on NixOS the system contains the agent's unit, and its activation installs and starts that.
    Arguments are options of the agent, as in `make_service("--confirm-timeout=3")`.
    """
    with contextlib.ExitStack() as stack:

        def make(*args, prepare=lambda host: None):
            host = stack.enter_context(Container(tmp_path / "container", tree))
            machine = ServiceMachine(host, program, live, name, *args)
            prepare(host)
            machine.boot()
            start = f"{INSTALL_UNIT} && systemctl start {UNIT}"
            unit = {UNIT: machine.unit}
            first = closures.nixos(live.files, f"{name}-first", after=start, extra=unit)
            assert machine.deploy(first).status == "Succeeded"
            stack.callback(machine.check)
            return machine, first

        yield make


def wait_for_activation(machine, system, action="test"):
    wait_until(lambda: (action, system) in machine.host.record(), 30, "the activation to begin")


def go_on(machine):
    machine.host.path(GO_ON).touch()


def test_the_unit_is_the_one_of_the_readme():
    assert README_COMMAND in readme_unit() and "LoadCredential=CACHIX_AGENT_TOKEN:" in readme_unit()


@pytest.mark.parametrize("how", ["restart", "kill"])
def test_an_activation_that_restarts_its_own_agent_many_times(make_service, how):
    machine, _ = make_service()
    verb = {"restart": "restart", "kill": "kill --signal=KILL"}[how]
    restart = f"""
        echo before
        for i in 1 2 3 4 5 6 7; do
            old=$(systemctl show --property=MainPID --value {UNIT})
            systemctl {verb} {UNIT} || exit 1
            new=$old
            while [ "$new" = "$old" ] || [ "$new" = 0 ]; do
                sleep 0.01; new=$(systemctl show --property=MainPID --value {UNIT})
            done
            seq -f "restart $i line %.0f" 20
        done
        {closures.wait_for(GO_ON)}
        seq -f 'after line %.0f' 20
    """
    system = closures.nixos(machine.files, f"{machine.name}-2", after=restart)
    old = machine.main_pid()
    deployment = machine.order(system)
    wait_for_activation(machine, system)
    switch = machine.switch(deployment)
    assert machine.unit_of(switch).endswith(".scope"), machine.unit_of(switch)
    assert machine.host.show("KillMode") == "control-group"
    # The new agent adopts it: the log so far arrives while the activation goes on.
    last = "restart 7 line 20"
    wait_until(lambda: last in machine.workspace.log(deployment), 40, "the log to arrive")
    assert machine.switch(deployment) == switch and machine.host.step(deployment) == "activating"
    assert machine.main_pid() not in (0, old)
    go_on(machine)
    outcome = machine.outcome(deployment)
    assert (outcome.status, outcome.step) == ("Succeeded", "succeeded")
    words = ("before", "restart", "after")
    lines = [line for line in outcome.log.splitlines() if line.startswith(words)]
    restarts = [f"restart {i} line {j}" for i in range(1, 8) for j in range(1, 21)]
    assert lines == ["before", *restarts, *(f"after line {j}" for j in range(1, 21))]
    assert machine.states()["ActiveState"] == "active"
    assert "the agent ended during the activation" in outcome.log
    assert machine.host.record()[-2:] == [("test", system), ("boot", system)]


def test_a_system_whose_agent_does_not_start_is_rolled_back_and_that_is_reported(make_service):
    machine, first = make_service("--confirm-timeout=3")
    broken = machine.unit.replace("ExecStart=/usr/local/bin/", "ExecStart=/usr/local/nowhere/")
    restart = f"{INSTALL_UNIT} && systemctl stop {UNIT}; systemctl start {UNIT}; :"
    system = closures.nixos(machine.files, f"{machine.name}-2", after=restart, extra={UNIT: broken})
    outcome = machine.deploy(system)
    assert (outcome.status, outcome.step) == ("Failed", "rolled-back"), outcome
    reason = "no agent came back within 3 s after the activation; rolled back to"
    assert outcome.reason.startswith(reason), outcome
    assert machine.host.record()[-2:] == [("test", system), ("test", first)]
    assert machine.host.running() == first == machine.host.boot_default()
    assert machine.states()["ActiveState"] == "active"


def test_an_operator_stops_the_agent(make_service):
    machine, _ = make_service()
    assert machine.stop() < 10
    assert machine.states() == STOPPED


def test_an_operator_stops_the_agent_while_nix_downloads(make_service):
    slow = '#!/bin/sh\n[ ! -e /run/slow ] || sleep 300\nexec /usr/bin/nix-store "$@"\n'

    def prepare(host):
        host.write("/usr/local/bin/nix-store", slow, 0o755)

    machine, _ = make_service(prepare=prepare)
    machine.host.path("/run/slow").touch()
    system = closures.nixos(machine.files, f"{machine.name}-2")
    deployment = machine.order(system)

    def runs(command):
        return command in " ".join(machine.host.processes().values())

    wait_until(lambda: machine.host.step(deployment) == "downloading", what="the download to begin")
    wait_until(lambda: runs("sleep 300"), what="the download to hang")
    assert machine.stop() < 10
    assert machine.states() == STOPPED
    wait_until(lambda: not runs(f"switch {deployment}"), 5, "the switch process to end")
    assert machine.host.journal(deployment)["attempts"] == 0  # the exit of the agent does not count
    machine.host.path("/run/slow").unlink()
    machine.host.output("systemctl", "start", UNIT)
    assert machine.outcome(deployment).status == "Succeeded"


@pytest.mark.parametrize("comes_back", [True, False])
def test_an_operator_stops_the_agent_during_an_activation(make_service, comes_back):
    """It might be due to the activation, which stands only if an agent registers in time."""
    machine, first = make_service(f"--confirm-timeout={20 if comes_back else 2}")
    # a rollback to this system leaves the service alone
    quiet = closures.nixos(machine.files, f"{machine.name}-quiet")
    assert machine.deploy(quiet).status == "Succeeded"
    wait = closures.wait_for(GO_ON) + "; echo goes on"
    system = closures.nixos(machine.files, f"{machine.name}-2", after=wait)
    deployment = machine.order(system)
    wait_for_activation(machine, system)
    assert machine.stop() < 10
    assert machine.states() == STOPPED
    assert machine.host.step(deployment) == "activating" and machine.switch(deployment)
    go_on(machine)
    if comes_back:
        wait_until(lambda: machine.host.step(deployment) == "checking")
        time.sleep(0.5)
        assert machine.host.step(deployment) == "checking"
    else:
        wait_until(lambda: machine.host.step(deployment) == "rolled-back", 20, "the rollback")
    machine.host.output("systemctl", "start", UNIT)
    outcome = machine.outcome(deployment)
    assert "goes on" in outcome.log.splitlines()
    if comes_back:
        assert (outcome.status, outcome.step) == ("Succeeded", "succeeded"), outcome
    else:
        assert (outcome.status, outcome.step) == ("Failed", "rolled-back"), outcome
        assert outcome.reason.startswith("no agent came back within 2 s"), outcome
        assert machine.host.running() == quiet


@pytest.mark.parametrize("step", ["activating", "checking", "rolling-back"])
def test_poweroff_in_the_middle(make_service, step):
    machine, first = make_service()
    host = machine.host
    wait = closures.wait_for(GO_ON)
    script = None
    if step == "activating":
        system = closures.nixos(machine.files, f"{machine.name}-2", after=wait)
    elif step == "checking":
        system = closures.nixos(machine.files, f"{machine.name}-2")
        script = closures.script(machine.files, f"{machine.name}-wait", wait)
    else:  # the rollback hangs, once
        previous = f"[ -e /nix/var/once ] || {{ touch /nix/var/once; exit 0; }}; {wait}"
        first = closures.nixos(machine.files, f"{machine.name}-slow", after=previous)
        assert machine.deploy(first).status == "Succeeded"
        system = closures.nixos(machine.files, f"{machine.name}-2", after="exit 1")
    deployment = machine.order(system, script)
    call = {
        "activating": ("test", system),
        "checking": ("rollback-script", script),
        "rolling-back": ("test", first),
    }[step]
    wait_until(lambda: host.record()[-1:] == [call], 30, f"the call in the step {step}")
    wait_until(lambda: host.step(deployment) == step, 30, f"the step {step}")
    before = len(host.record())
    host.poweroff()
    entry = host.journal(deployment)
    assert (entry["step"], entry["attempts"]) == (step, 0), entry
    assert len(host.record()) == before
    assert host.boot_default() == host.profile() == first
    go_on(machine)
    machine.boot()
    assert host.journal(deployment)["boot_id"] == entry["boot_id"]
    outcome = machine.outcome(deployment)
    assert (outcome.status, outcome.step) == ("Failed", "rolled-back"), outcome
    restarted = "the machine restarted before"
    reason = "the activation ended with status 1" if step == "rolling-back" else restarted
    assert outcome.reason.startswith(reason), outcome
    assert outcome.reason.endswith(f"rolled back to {first}"), outcome
    assert host.record()[before:] == [("test", first)]
    assert host.running() == host.boot_default() == first


def test_poweroff_during_the_commit(make_service):
    """The profile is the new system already, but the old one boots: the next agent goes forward."""
    machine, first = make_service()
    host = machine.host
    wait = closures.wait_for(GO_ON)
    system = closures.nixos(machine.files, f"{machine.name}-2", before_boot=wait)
    deployment = machine.order(system)
    wait_for_activation(machine, system, "boot")
    host.poweroff()
    entry = host.journal(deployment)
    assert (entry["step"], entry["attempts"]) == ("committing", 0), entry
    assert host.record()[-1] == ("boot", system)
    assert (host.boot_default(), host.profile()) == (first, system)
    go_on(machine)
    machine.boot()
    outcome = machine.outcome(deployment)
    assert (outcome.status, outcome.step) == ("Succeeded", "succeeded"), outcome
    assert host.record()[-3:] == [("boot", system), ("test", system), ("boot", system)]


def test_poweroffs_do_not_count_as_attempts(make_service):
    """A rollback that four poweroffs interrupt is not given up."""
    machine, _ = make_service()
    host = machine.host
    wait = closures.wait_for(GO_ON)
    previous = f"[ -e /nix/var/once ] || {{ touch /nix/var/once; exit 0; }}; {wait}"
    first = closures.nixos(machine.files, f"{machine.name}-slow", after=previous)
    assert machine.deploy(first).status == "Succeeded"
    deployment = machine.order(closures.nixos(machine.files, f"{machine.name}-2", after="exit 1"))
    call = ("test", first)
    for count in range(2, 6):
        wait_until(lambda n=count: host.record().count(call) == n, 30, "the rollback to begin")
        host.poweroff()
        assert host.step(deployment) == "rolling-back" and host.journal(deployment)["attempts"] == 0
        machine.boot()
    go_on(machine)
    outcome = machine.outcome(deployment)
    assert (outcome.status, outcome.step) == ("Failed", "rolled-back"), outcome


@pytest.mark.parametrize("missing", ["systemd-run", "bus"])
def test_a_scope_that_can_not_be_made(make_service, missing):
    machine, _ = make_service()
    if missing == "systemd-run":
        machine.host.output("rm", "/usr/bin/systemd-run")
    else:
        machine.host.output("systemctl", "stop", "dbus.socket", "dbus.service")
        machine.host.output("mv", "/run/systemd/private", "/run/systemd/away")
    system = closures.nixos(machine.files, f"{machine.name}-2", after=closures.wait_for(GO_ON))
    deployment = machine.order(system)
    wait_for_activation(machine, system)
    switch = machine.switch(deployment)
    if missing == "bus":
        machine.host.output("mv", "/run/systemd/away", "/run/systemd/private")
    assert machine.unit_of(switch) == UNIT and os.getsid(switch) == switch
    go_on(machine)
    outcome = machine.outcome(deployment)
    assert (outcome.status, outcome.step) == ("Succeeded", "succeeded"), outcome
    times = machine.host.journal(deployment)["times"]
    assert times["activating"] - times["received"] < 4


@pytest.mark.parametrize("how", ["credential", "environment"])
def test_the_token_is_the_agents_own(make_service, live, how):
    def prepare(host):
        if how == "environment":
            host.write("/etc/token.env", f"CACHIX_AGENT_TOKEN={live.token('agent')}\n", 0o600)
            service = "[Service]\nEnvironmentFile=/etc/token.env\n"
            host.write(f"/etc/systemd/system/{UNIT}.d/token.conf", service)

    machine, _ = make_service(prepare=prepare)
    code = f"env | sort | sed 's/^/has /'; {closures.wait_for(GO_ON)}"
    system = closures.nixos(machine.files, f"{machine.name}-2", after=code)
    script = closures.script(machine.files, f"{machine.name}-env", "env | sed 's/^/has /'")
    deployment = machine.order(system, script)
    wait_for_activation(machine, system)
    host = machine.host
    agent = [pid for pid, line in host.processes().items() if f"agent {machine.name}" in line]
    allowed = [f"process {pid}: {host.processes()[pid]}" for pid in agent if how == "environment"]
    allowed += [str(host.upper / "etc/token.env")] if how == "environment" else []
    assert len(agent) == 1 and sorted(machine.leaks(live.token("agent"))) == sorted(allowed)
    switch = machine.switch(deployment)
    variables = Path(f"/proc/{switch}/environ").read_bytes().split(b"\0")
    names = {variable.partition(b"=")[0].decode() for variable in variables}
    withheld = {"CACHIX_AGENT_TOKEN", "CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET", "JOURNAL_STREAM"}
    assert not names & withheld
    go_on(machine)
    outcome = machine.outcome(deployment)
    assert outcome.status == "Succeeded"
    lines = [line[4:] for line in outcome.log.splitlines() if line.startswith("has ")]
    names = {line.partition("=")[0] for line in lines}
    assert {"PATH", "HOME", "USER"} <= names and not names & {*withheld, "INVOCATION_ID"}, names
    if how == "environment":  # `machine.check` looks for the token everywhere else
        host.output("rm", "/etc/token.env", f"/etc/systemd/system/{UNIT}.d/token.conf")
        host.output("systemctl", "daemon-reload")
        host.output("systemctl", "restart", UNIT)


# --- without a container: a systemd-run that fails ------------------------------------------------


@pytest.mark.parametrize("how", ["works", "fails", "hangs"])
def test_a_plain_session_if_no_scope_can_be_made(make_machine, how):
    scripts = {
        "works": 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"',
        "fails": "echo 'Failed to connect to bus: No such file or directory' >&2; exit 1",
        "hangs": "sleep 250; exit 1",
    }
    machine = make_machine()
    machine.agent.stop()
    host = machine.host
    wrappers = host.directory / "wrappers"
    wrappers.mkdir()
    script = f'#!/bin/sh\necho "$@" >>{wrappers}/calls\n{scripts[how]}\n'
    (wrappers / "systemd-run").write_text(script)
    (wrappers / "systemd-run").chmod(0o755)
    host.path("/run/systemd/system").mkdir(parents=True)
    machine.env = {"PATH": f"{wrappers}:{host.environment['PATH']}"}
    machine.start()
    for number in (1, 2):
        system = closures.nixos(machine.files, f"{machine.name}-{number}")
        outcome = machine.deploy(system)  # its deadline is far below the 250 s of "hangs"
        assert (outcome.status, outcome.step) == ("Succeeded", "succeeded"), outcome
    calls = (wrappers / "calls").read_text().splitlines()
    options = "--scope --collect --quiet --no-ask-password"
    assert len(calls) == 2 and all(line.startswith(options) for line in calls)
    assert machine.workspace.token("agent") not in json.dumps(calls)
    wait_until(lambda: "sleep 250" not in str(host.processes()), 5, "the hung command to be gone")


# --- by hand --------------------------------------------------------------------------------------


def begin_rollback(machine, system, back_to):
    """Deploy `system`, and roll back from it in a session; wait until `back_to` is activated."""
    assert machine.deploy(back_to).status == "Succeeded"
    assert machine.deploy(system).status == "Succeeded"
    machine.host.path(GO_ON).unlink()
    before = machine.host.record().count(("test", back_to))
    argv = ["systemd-run", "--unit=session", "--collect", "cachix-deploy", "rollback"]
    machine.host.output(*argv)
    wait_until(lambda: machine.host.record().count(("test", back_to)) > before, 30, "the rollback")
    (entry,) = (entry for entry in machine.journals() if entry.get("by_hand"))
    return entry["id"]


def systems(machine):
    """A system that waits in its activation, and one that does not."""
    wait = closures.wait_for(GO_ON)
    go_on(machine)
    return [
        closures.nixos(machine.files, f"{machine.name}-{number}", after=extra)
        for number, extra in ((2, wait), (3, ""))
    ]


def test_a_rollback_outlives_the_session_that_began_it(make_service):
    """Everything in the session is killed. The agent is not needed for the rest, either."""
    machine, _ = make_service()
    back_to, system = systems(machine)
    deployment = begin_rollback(machine, system, back_to)
    leaders = [pid for pid, line in machine.host.processes().items() if "by hand" in line]
    assert all(machine.unit_of(pid).endswith(".scope") for pid in leaders) and leaders
    machine.host.output("systemctl", "kill", "--signal=KILL", "session")
    machine.stop()
    wait_until(lambda: machine.host.systemctl("is-active", "session").stdout != "active\n", 20)
    go_on(machine)
    wait_until(lambda: machine.host.step(deployment) == "succeeded", 20, "the end of the rollback")
    assert machine.host.running() == machine.host.profile() == back_to
    machine.host.output("systemctl", "start", UNIT)


def test_poweroff_in_the_middle_of_a_rollback(make_service):
    machine, _ = make_service()
    back_to, system = systems(machine)
    deployment = begin_rollback(machine, system, back_to)
    machine.host.poweroff()
    machine.boot()
    wait_until(lambda: machine.host.step(deployment) == "rolled-back", 30, "the way back")
    assert machine.host.running() == machine.host.profile() == system
    entry = machine.host.journal(deployment)
    assert entry["reason"].startswith("the machine restarted before it was confirmed")
