"""The agent as a service of a real systemd, by the unit of README.rst: what becomes of a deployment when the service,
or the whole machine, is stopped under it."""

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
    Missing,
    ServiceMachine,
    readme_unit,
    root_tree,
)
from hosts import PROJECT, wait_until

pytestmark = pytest.mark.timeout(300)  # the first test may have to make the root tree

SWITCH_GO = "/nix/var/go"  # the test makes this file: an activation goes on
INSTALL_UNIT = f'cp "$self/{UNIT}" /etc/systemd/system/ && systemctl daemon-reload'


@pytest.fixture(scope="session")
def tree():
    """The root tree of all containers. Where it can't be had the tests are skipped, but never by a CI."""
    try:
        return root_tree()
    except Missing as missing:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """The agent in one file, as `make pyz` builds it."""
    made = tmp_path_factory.mktemp("program") / "cachix-deploy.pyz"
    subprocess.run(
        [sys.executable, "-W", "ignore::SyntaxWarning", str(PROJECT / "tools/pyz.py"), str(made)],
        check=True,
    )
    return made


@pytest.fixture
def make_service(tree, program, tmp_path, live, name):
    """A container with a connected agent that has deployed a first system: `make_service("--confirm-timeout=3")`.

    As on NixOS the system has the agent's unit in it, and its activation installs and starts that.
    """
    with contextlib.ExitStack() as stack:

        def make(*args, prepare=lambda host: None):
            host = stack.enter_context(Container(tmp_path / "container", tree))
            machine = ServiceMachine(host, program, live, name, *args)
            prepare(host)
            machine.boot()
            start = f"{INSTALL_UNIT} && systemctl start {UNIT}"
            first = closures.nixos(
                live.files, f"{name}-first", after=start, extra={UNIT: machine.unit}
            )
            assert machine.deploy(first).status == "Succeeded"
            stack.callback(machine.check)
            return machine, first

        yield make


def wait_for_activation(machine, system, action="test"):
    wait_until(lambda: (action, system) in machine.host.record(), 30, "the activation to begin")


def go_on(machine):
    machine.host.path(SWITCH_GO).touch()


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
        {closures.wait_for(SWITCH_GO)}
        seq -f 'after line %.0f' 20
    """
    system = closures.nixos(machine.files, f"{machine.name}-2", after=restart)
    old = machine.main_pid()
    deployment = machine.order(system)
    wait_for_activation(machine, system)
    switch = machine.switch(deployment)
    assert machine.unit_of(switch).endswith(".scope"), machine.unit_of(switch)
    assert machine.host.show("KillMode") == "control-group"
    # The new agent adopts it: what was written so far arrives while the activation goes on.
    wait_until(
        lambda: "restart 7 line 20" in machine.workspace.log(deployment), 40, "the log to arrive"
    )
    assert machine.switch(deployment) == switch and machine.host.step(deployment) == "activating"
    assert machine.main_pid() not in (0, old)
    go_on(machine)
    outcome = machine.outcome(deployment)
    assert (outcome.status, outcome.step) == ("Succeeded", "succeeded")
    own = [
        line for line in outcome.log.splitlines() if line.startswith(("before", "restart", "after"))
    ]
    restarts = [f"restart {i} line {j}" for i in range(1, 8) for j in range(1, 21)]
    assert own == ["before", *restarts, *(f"after line {j}" for j in range(1, 21))]
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
    assert outcome.reason.startswith(
        "no agent came back within 3 s after the activation; rolled back to"
    ), outcome
    assert machine.host.record()[-2:] == [("test", system), ("test", first)]
    assert machine.host.running() == first == machine.host.boot_default()
    assert machine.states()["ActiveState"] == "active"


def test_an_operator_stops_the_agent(make_service):
    machine, _ = make_service()
    assert machine.stop() < 10
    assert machine.states() == {
        "ActiveState": "inactive",
        "Result": "success",
        "ExecMainStatus": "0",
    }


def test_an_operator_stops_the_agent_while_nix_downloads(make_service):
    slow = '#!/bin/sh\n[ ! -e /run/slow ] || sleep 300\nexec /usr/bin/nix-store "$@"\n'
    machine, _ = make_service(
        prepare=lambda host: host.write("/usr/local/bin/nix-store", slow, 0o755)
    )
    machine.host.path("/run/slow").touch()
    system = closures.nixos(machine.files, f"{machine.name}-2")
    deployment = machine.order(system)
    wait_until(lambda: machine.host.step(deployment) == "downloading", what="the download to begin")
    wait_until(
        lambda: "sleep 300" in " ".join(machine.host.processes().values()),
        what="the download to hang",
    )
    assert machine.stop() < 10
    assert machine.states() == {
        "ActiveState": "inactive",
        "Result": "success",
        "ExecMainStatus": "0",
    }
    wait_until(
        lambda: f"switch {deployment}" not in str(machine.host.processes()),
        5,
        "the switch process to end",
    )
    assert machine.host.journal(deployment)["attempts"] == 0  # the agent's own end is no attempt
    machine.host.path("/run/slow").unlink()
    machine.host.output("systemctl", "start", UNIT)
    assert machine.outcome(deployment).status == "Succeeded"


@pytest.mark.parametrize("comes_back", [True, False])
def test_an_operator_stops_the_agent_during_an_activation(make_service, comes_back):
    """That may as well be the activation's own doing: it stands only if an agent registers in time."""
    machine, first = make_service(f"--confirm-timeout={20 if comes_back else 2}")
    # This system's previous one leaves the service alone when it is gone back to.
    quiet = closures.nixos(machine.files, f"{machine.name}-quiet")
    assert machine.deploy(quiet).status == "Succeeded"
    system = closures.nixos(
        machine.files, f"{machine.name}-2", after=closures.wait_for(SWITCH_GO) + "; echo goes on"
    )
    deployment = machine.order(system)
    wait_for_activation(machine, system)
    assert machine.stop() < 10
    assert machine.states() == {
        "ActiveState": "inactive",
        "Result": "success",
        "ExecMainStatus": "0",
    }
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
    wait = closures.wait_for(SWITCH_GO)
    script = None
    if step == "activating":
        system = closures.nixos(machine.files, f"{machine.name}-2", after=wait)
    elif step == "checking":
        system = closures.nixos(machine.files, f"{machine.name}-2")
        script = closures.script(machine.files, f"{machine.name}-wait", wait)
    else:  # the way back hangs, once
        previous = f"[ -e /nix/var/once ] || {{ touch /nix/var/once; exit 0; }}; {wait}"
        first = closures.nixos(machine.files, f"{machine.name}-slow", after=previous)
        assert machine.deploy(first).status == "Succeeded"
        system = closures.nixos(machine.files, f"{machine.name}-2", after="exit 1")
    deployment = machine.order(system, script)
    begun = {
        "activating": ("test", system),
        "checking": ("rollback-script", script),
        "rolling-back": ("test", first),
    }
    wait_until(
        lambda: host.record()[-1:] == [begun[step]] and host.step(deployment) == step,
        30,
        f"the step {step}",
    )
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
    told = (
        "the activation ended with status 1"
        if step == "rolling-back"
        else "the machine restarted before"
    )
    assert outcome.reason.startswith(told) and outcome.reason.endswith(f"rolled back to {first}"), (
        outcome
    )
    assert host.record()[before:] == [("test", first)]
    assert host.running() == host.boot_default() == first


def test_poweroff_during_the_commit(make_service):
    """The profile is the new system's already, what boots is the old one: the next agent goes forward."""
    machine, first = make_service()
    host = machine.host
    system = closures.nixos(
        machine.files, f"{machine.name}-2", before_boot=closures.wait_for(SWITCH_GO)
    )
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


def test_poweroffs_without_end_are_no_attempts(make_service):
    """A rollback that is interrupted by the system's end four times is not given up."""
    machine, _ = make_service()
    host = machine.host
    previous = f"[ -e /nix/var/once ] || {{ touch /nix/var/once; exit 0; }}; {closures.wait_for(SWITCH_GO)}"
    first = closures.nixos(machine.files, f"{machine.name}-slow", after=previous)
    assert machine.deploy(first).status == "Succeeded"
    deployment = machine.order(closures.nixos(machine.files, f"{machine.name}-2", after="exit 1"))
    for count in range(1, 5):
        wait_until(
            lambda: host.record().count(("test", first)) == count + 1, 30, "the rollback to begin"
        )
        host.poweroff()
        assert host.step(deployment) == "rolling-back" and host.journal(deployment)["attempts"] == 0
        machine.boot()
    go_on(machine)
    outcome = machine.outcome(deployment)
    assert (outcome.status, outcome.step) == ("Failed", "rolled-back"), outcome


@pytest.mark.parametrize("missing", ["systemd-run", "bus"])
def test_a_scope_that_can_not_be_had(make_service, missing):
    machine, _ = make_service()
    if missing == "systemd-run":
        machine.host.output("rm", "/usr/bin/systemd-run")
    else:
        machine.host.output("systemctl", "stop", "dbus.socket", "dbus.service")
        machine.host.output("mv", "/run/systemd/private", "/run/systemd/away")
    system = closures.nixos(machine.files, f"{machine.name}-2", after=closures.wait_for(SWITCH_GO))
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
            host.write(
                f"/etc/systemd/system/{UNIT}.d/token.conf",
                "[Service]\nEnvironmentFile=/etc/token.env\n",
            )

    machine, _ = make_service(prepare=prepare)
    code = f"env | sort | sed 's/^/has /'; {closures.wait_for(SWITCH_GO)}"
    system = closures.nixos(machine.files, f"{machine.name}-2", after=code)
    deployment = machine.order(
        system, closures.script(machine.files, f"{machine.name}-env", "env | sed 's/^/has /'")
    )
    wait_for_activation(machine, system)
    host = machine.host
    agent = [pid for pid, line in host.processes().items() if f"agent {machine.name}" in line]
    allowed = [f"process {pid}: {host.processes()[pid]}" for pid in agent if how == "environment"]
    allowed += [str(host.upper / "etc/token.env")] if how == "environment" else []
    assert len(agent) == 1 and sorted(machine.leaks(live.token("agent"))) == sorted(allowed)
    switch = machine.switch(deployment)
    names = {
        name.partition(b"=")[0].decode()
        for name in Path(f"/proc/{switch}/environ").read_bytes().split(b"\0")
    }
    withheld = {"CACHIX_AGENT_TOKEN", "CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET", "JOURNAL_STREAM"}
    assert not names & withheld
    go_on(machine)
    outcome = machine.outcome(deployment)
    assert outcome.status == "Succeeded"
    told = {
        line[4:].partition("=")[0] for line in outcome.log.splitlines() if line.startswith("has ")
    }
    assert {"PATH", "HOME", "USER"} <= told and not told & {*withheld, "INVOCATION_ID"}, told
    if how == "environment":  # `machine.check` looks for the token where nothing has to have it
        host.output("rm", "/etc/token.env", f"/etc/systemd/system/{UNIT}.d/token.conf")
        host.output("systemctl", "daemon-reload")
        host.output("systemctl", "restart", UNIT)


# --- without a container: a systemd-run that does not do its work ----------------------------------------------------


@pytest.mark.parametrize("how", ["works", "fails", "hangs"])
def test_a_plain_session_where_no_scope_can_be_had(make_machine, how):
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
    (wrappers / "systemd-run").write_text(
        f'#!/bin/sh\necho "$@" >>{wrappers}/called\n{scripts[how]}\n'
    )
    (wrappers / "systemd-run").chmod(0o755)
    host.path("/run/systemd/system").mkdir(parents=True)
    machine.env = {"PATH": f"{wrappers}:{host.environment['PATH']}"}
    machine.start()
    for number in (1, 2):
        system = closures.nixos(machine.files, f"{machine.name}-{number}")
        began = time.monotonic()
        outcome = machine.deploy(system)
        assert (outcome.status, outcome.step) == ("Succeeded", "succeeded"), outcome
        times = host.journal(outcome.id)["times"]
        assert times["activating"] - times["received"] < (4 if how == "hangs" else 2), (
            times,
            time.monotonic() - began,
        )
    called = (wrappers / "called").read_text().splitlines()
    assert len(called) == 2 and all(
        line.startswith("--scope --collect --quiet --no-ask-password") for line in called
    )
    assert machine.workspace.token("agent") not in json.dumps(called)
    wait_until(lambda: "sleep 250" not in str(host.processes()), 5, "what hung to be gone")
