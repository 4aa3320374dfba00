"""Deployments from the order to the machine, with a real agent, workspace, Nix and store."""

import json
import os
import re
import shutil
import signal
import textwrap

import closures
import pytest
from hosts import SYSTEM, command, wait_until

SUCCESS, FAILURE = "Successfully activated the deployment.", "Failed to activate the deployment."
WAITS = json.dumps({"unit_recheck": 0.2, "retry": 0.1, "backoff": 0.1, "slowest": 0.5})
UNITS = "echo 'warning: the following units failed:"
LOADER = "Failed to install bootloader"
HANG, HANG_TRAPPED = closures.hang(), closures.hang(trap=True)
FAST = {"env": {"CACHIX_DEPLOY_WAITS": WAITS}}


def last_line(outcome):
    return outcome.log.splitlines()[-1]


def wrapper(host, program, script):
    """Put a shell script in front of a program, which is `$real` in it.

    Returns the environment to start the agent with.
    """
    directory = host.directory / "wrappers"
    directory.mkdir(exist_ok=True)
    real = shutil.which(program)
    text = f'#!/bin/sh\nreal={real}\n{textwrap.dedent(script)}\nexec "$real" "$@"\n'
    (directory / program).write_text(text)
    (directory / program).chmod(0o755)
    return {"PATH": f"{directory}:{host.environment['PATH']}", "CACHIX_DEPLOY_WAITS": WAITS}


@pytest.fixture
def nixos_machine(make_machine):
    """A machine whose agent has deployed a NixOS system, and that system."""

    def make(*args, **kw):
        machine = make_machine(*args, **{**FAST, **kw})
        first = closures.nixos(machine.files, f"{machine.name}-first")
        assert machine.deploy(first).status == "Succeeded"
        return machine, first

    return make


# --- success --------------------------------------------------------------------------------------


def test_nixos_runs_is_checked_and_then_boots(make_machine):
    machine = make_machine()
    system = closures.nixos(machine.files, 1)
    script = closures.script(machine.files, "ok", "echo healthy")
    outcome = machine.deploy(system, script)
    assert (outcome.status, outcome.step, outcome.reason) == ("Succeeded", "succeeded", None)
    calls = [("test", system), ("rollback-script", script), ("boot", system)]
    assert machine.host.record() == calls
    assert machine.host.running() == machine.host.profile() == machine.host.boot_default() == system
    lines = outcome.log.splitlines()
    assert lines[-1] == SUCCESS and lines.count(SUCCESS) == 1
    commands = [line for line in lines if line.startswith("$ ")]
    assert commands[0].startswith(f"$ nix-store --realise {system} {script} --add-root ")
    assert commands[1:] == [
        f"$ {system}/bin/switch-to-configuration test",
        f"$ {script}",
        f"$ nix-env --profile {SYSTEM} --set {system}",
        f"$ {system}/bin/switch-to-configuration boot",
    ]
    assert lines.index("activating the configuration...") == lines.index(commands[1]) + 1
    assert any(line.startswith("copying path") for line in lines)
    assert "to download: 6 paths, less than 10 KiB, less than 10 KiB unpacked" in lines
    assert re.search(r"^6 of 6 paths, .* of less than 10 KiB after [\d.]+ s$", outcome.log, re.M)
    assert machine.workspace.deployment(outcome.id)["closureSize"] > 1000


def test_nixos_with_an_explicit_profile_boots_too(make_machine):
    machine = make_machine("spare", check=False)
    system = closures.nixos(machine.files, "spare")
    outcome = machine.deploy(system)
    assert outcome.status == "Succeeded"
    profile = "/nix/var/nix/profiles/system-profiles/spare"
    assert machine.host.profile(profile) == machine.host.boot_default() == system
    assert machine.host.profile() is None


def test_plain_path_and_the_same_one_again(make_machine):
    machine = make_machine("tools")
    path = closures.plain(machine.files, 1)
    for _ in range(2):
        outcome = machine.deploy(path)
        assert outcome.status == "Succeeded" and last_line(outcome) == SUCCESS
        assert machine.host.profile("/nix/var/nix/profiles/tools") == path
    assert f"in the store already: {path}" in outcome.log
    assert list(machine.host.generations("/nix/var/nix/profiles/tools")) == [1]


@pytest.mark.parametrize("marker", ["darwin-version", "darwin-version.json"])
def test_nix_darwin(make_machine, marker):
    machine = make_machine(**FAST)
    one, two = (closures.darwin(machine.files, f"{marker}-{i}", marker=marker) for i in (1, 2))
    bad = closures.darwin(machine.files, f"{marker}-bad", marker=marker, after="exit 3")
    assert machine.deploy(one).status == machine.deploy(two).status == "Succeeded"
    assert machine.host.running() == machine.host.profile() == two
    outcome = machine.deploy(bad)
    assert (outcome.status, outcome.step) == ("Failed", "rolled-back")
    assert machine.host.running() == machine.host.profile() == two
    assert machine.host.record()[-2:] == [("activate", bad), ("activate", two)]


def test_home_manager(make_machine):
    machine = make_machine(**FAST)
    host = machine.host
    host.path("/nix/var/nix/profiles/per-user/root").mkdir(parents=True, exist_ok=True)
    one, two = (closures.home_manager(machine.files, i) for i in (1, 2))
    assert machine.deploy(one).status == machine.deploy(two).status == "Succeeded"
    assert host.current_home() == host.profile(host.home_profile()) == two
    broken = closures.home_manager(machine.files, "broken", middle="exit 1")
    outcome = machine.deploy(broken)
    assert (outcome.status, outcome.step) == ("Failed", "rolled-back")
    assert host.current_home() == host.profile(host.home_profile()) == two
    assert (host.directory / "home" / ".managed").read_text() == "version 2\n"


# --- downloads that fail --------------------------------------------------------------------------


def assert_untouched(machine, outcome, reason):
    assert (outcome.status, outcome.step) == ("Failed", "failed"), outcome
    assert re.search(reason, outcome.reason), outcome.reason
    assert last_line(outcome).startswith(FAILURE) and re.search(reason, last_line(outcome))
    assert machine.host.record() == [] and machine.host.profile() is None


def test_not_in_the_cache(machine):
    path = closures.nixos(machine.files, "never-pushed")
    outcome = machine.deploy(path, push=False)
    reason = f"{path} is not in http://.*/cache/main: push it there first"
    assert_untouched(machine, outcome, reason)
    assert "don't know how to build these paths" in outcome.reason  # the last lines of Nix's output


@pytest.mark.promise(13)
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("unsigned", "the signature of {path} is by none of the keys .*main.127.0.0.1-1:"),
        ("wrong-key", "the signature of {path} is by none of the keys .*main.127.0.0.1-1:"),
        ("corrupt", "http://.*/cache/main serves a damaged {path}"),
    ],
)
def test_a_cache_that_serves_other_contents_than_were_signed(machine, how, reason):
    """The workspace takes no such files, but somebody may have changed them since."""
    path, files = closures.nixos(machine.files, f"{machine.name}-{how}"), machine.files
    machine.workspace.push(path)
    files.damage(path, how)
    for file in (files.archive(path), files.narinfo(path)):
        served = machine.workspace.data / "cache" / "main" / file.relative_to(files.directory)
        served.write_bytes(file.read_bytes())
    outcome = machine.outcome(machine.order(path, push=False))
    assert_untouched(machine, outcome, reason.format(path=path))


@pytest.mark.promise(11)
def test_the_netrc_for_a_private_cache_is_removed(make_workspace, make_machine):
    machine = make_machine(workspace=make_workspace(private=True))
    script = """
        for argument; do
            [ -z "$last" ] || cp "$argument" /nix/var/netrc-copy
            last=; [ "$argument" != netrc-file ] || last=1
        done
    """
    machine.agent.stop()
    machine.env = wrapper(machine.host, "nix-store", script)
    machine.start()
    outcome = machine.deploy(closures.nixos(machine.files, "private"))
    assert outcome.status == "Succeeded"
    copy, token = machine.host.path("/nix/var/netrc-copy"), machine.workspace.token("agent")
    assert copy.read_text() == f"machine 127.0.0.1 login x password {token}\n"
    copy.unlink()
    assert not list(machine.host.state.glob("netrc*"))


def test_a_full_disk_is_reported_before_anything_is_downloaded(make_machine):
    machine = make_machine(check=False)
    machine.agent.stop()
    machine.host.output("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", "/nix")
    machine.start()
    path = closures.chain(machine.files, 3, size=3 << 20, name="big")
    outcome = machine.deploy(path)
    assert (outcome.status, outcome.step) == ("Failed", "failed")
    size = r"[\d.]+ MiB \((\d+) bytes\)"
    match = re.search(rf"does not fit: it needs {size}, .* has {size} free", outcome.reason)
    assert match and int(match[1]) > 9e6 and int(match[2]) < 5e6
    assert "copying path" not in outcome.log


def test_the_log_shows_how_many_paths_and_bytes_have_arrived(make_machine):
    machine = make_machine("big")
    outcome = machine.deploy(closures.chain(machine.files, 4, size=5 << 20, name="progress"))
    assert outcome.status == "Succeeded"
    assert re.search(r"^to download: 5 paths, 20.0 MiB, 20.0 MiB unpacked$", outcome.log, re.M)
    match = re.search(r"^5 of 5 paths, ([\d.]+) MiB of 20.0 MiB after [\d.]+ s$", outcome.log, re.M)
    assert match and float(match[1]) > 5, outcome.log


@pytest.mark.promise(3)
def test_a_missing_rollback_script_is_noticed_before_anything_changes(machine):
    script = closures.script(machine.files, "unpushed", "exit 0")
    path = closures.nixos(machine.files, 1)
    machine.workspace.push(path)
    outcome = machine.outcome(machine.workspace.deploy(machine.name, path, script))
    assert_untouched(machine, outcome, f"{script} is not in")


# --- activations that fail ------------------------------------------------------------------------


@pytest.mark.promise(3)
@pytest.mark.parametrize(
    ("options", "code", "reason"),
    [
        ([], {"after": "exit 1"}, "the activation ended with status 1"),
        ([], {"before": "exit 1"}, "the activation ended with status 1"),
        ([], {"after": "exit 2"}, r"the activation script of the new system failed \(status 2\)"),
        ([], {"before": "exit 2"}, "the activation ended with status 2"),
        ([], {"after": f"{UNITS} a.service'; exit 4"}, r"some units failed \(status 4\)"),
        (
            ["--on-unit-failure=tolerate"],
            {"before": "exit 4"},
            "the activation ended with status 4",
        ),
        ([], {"before": "exit 0"}, "ended with status 0, but the new system does not run"),
        ([], {"after": f"echo {LOADER}"}, "the boot loader could not be installed"),
        ([], {"after": "kill -9 $$"}, "the activation ended with status -9"),
        ([], {"before_boot": "exit 1"}, "switch-to-configuration boot` ended with status 1"),
        (["--activation-timeout=1"], {"after": HANG}, "was ended because it ran longer than 1 s"),
        (["--activation-timeout=1"], {"after": f"{HANG} & {HANG_TRAPPED}"}, "longer than 1 s"),
    ],
)
def test_a_failed_activation_is_rolled_back(nixos_machine, options, code, reason):
    machine, first = nixos_machine(*options)
    bad = closures.nixos(machine.files, f"{machine.name}-bad", **code)
    outcome = machine.deploy(bad)
    assert (outcome.status, outcome.step) == ("Failed", "rolled-back"), outcome
    assert re.search(reason, outcome.reason) and f"rolled back to {first}" in outcome.reason
    assert last_line(outcome).startswith(f"{FAILURE} ") and re.search(reason, last_line(outcome))
    assert machine.host.running() == machine.host.profile() == machine.host.boot_default() == first
    assert machine.host.record()[-1] == ("test", first)
    assert list(machine.host.generations().values()).count(first) == 1


def test_units_that_come_up_by_themselves_are_no_failure(nixos_machine):
    machine, _ = nixos_machine()
    machine.agent.stop()
    script = 'echo "$@" >>/run/arguments; echo active; echo inactive; exit 3'
    machine.env = wrapper(machine.host, "systemctl", script)
    machine.start()
    new = closures.nixos(machine.files, 2, after=f"{UNITS} a.service, b.service'; exit 4")
    assert machine.deploy(new).status == "Succeeded"
    assert machine.host.path("/run/arguments").read_text() == "is-active a.service b.service\n"


def test_units_may_be_tolerated(nixos_machine):
    machine, _ = nixos_machine("--on-unit-failure=tolerate")
    outcome = machine.deploy(closures.nixos(machine.files, 2, after="exit 4"))
    assert outcome.status == "Succeeded"
    assert outcome.reason == "some units failed (status 4)"


def test_a_system_that_needs_a_reboot_is_refused_untouched(nixos_machine):
    machine, first = nixos_machine()
    outcome = machine.deploy(closures.nixos(machine.files, 2, before="exit 100"))
    assert (outcome.status, outcome.step) == ("Failed", "failed")
    assert "can only be booted" in outcome.reason and "--on-reboot-needed=boot" in outcome.reason
    assert machine.host.record()[-1][0] == "test" and machine.host.profile() == first


def test_a_system_that_needs_a_reboot_may_be_set_to_boot(nixos_machine):
    machine, first = nixos_machine("--on-reboot-needed=boot", check=False)
    new = closures.nixos(machine.files, 2, before="exit 100")
    outcome = machine.deploy(new)
    assert outcome.status == "Succeeded"
    assert "after the next reboot and was not checked" in outcome.reason
    assert machine.host.running() == first
    assert machine.host.profile() == machine.host.boot_default() == new


@pytest.mark.promise(3)
@pytest.mark.parametrize(
    ("code", "options", "reason"),
    [
        ("echo the server is down; exit 7", [], "the rollback script {} ended with status 7"),
        ("kill -9 $$", [], "the rollback script {} ended with status -9"),
        (HANG, ["--activation-timeout=1"], "`{}` was ended because it ran longer than 1 s"),
        ("not-executable", [], "`{}` could not be started"),
        ("directory", [], "`{}` could not be started"),
        ("no-interpreter", [], "`{}` could not be started"),
    ],
)
def test_a_rollback_script_that_fails(nixos_machine, code, options, reason):
    machine, first = nixos_machine(*options)
    if code in ("not-executable", "directory", "no-interpreter"):
        script = closures.unusable_script(machine.files, code)
    else:
        script = closures.script(machine.files, "bad", code)
    outcome = machine.deploy(closures.nixos(machine.files, 2), script)
    assert (outcome.status, outcome.step) == ("Failed", "rolled-back")
    assert reason.format(script) in outcome.reason
    assert machine.host.running() == machine.host.profile() == machine.host.boot_default() == first
    assert "boot" not in [action for action, path in machine.host.record() if path != first]


@pytest.mark.long
@pytest.mark.promise(3, 5)
def test_a_workspace_that_can_not_be_reached_any_more(make_workspace, nixos_machine):
    workspace = make_workspace()
    machine, first = nixos_machine("--confirm-timeout=2", workspace=workspace)
    new = closures.nixos(machine.files, 2, after=closures.wait_for("/run/go-on"))
    deployment = machine.order(new)
    wait_until(lambda: machine.host.running() == new)
    workspace.kill()
    machine.host.path("/run/go-on").touch()
    wait_until(lambda: machine.host.step(deployment) == "rolled-back", 30)
    assert machine.host.running() == machine.host.profile() == first
    workspace.serve()
    outcome = machine.outcome(deployment)
    assert outcome.status == "Failed"
    assert "the workspace could not be reached for 2 s after the activation" in outcome.reason


@pytest.mark.parametrize("kind", [closures.nixos, closures.darwin, closures.home_manager])
def test_the_first_deployment_of_all_has_nothing_to_go_back_to(make_machine, kind):
    machine = make_machine(**FAST, check=False)
    machine.host.path("/nix/var/nix/profiles/per-user/root").mkdir(parents=True, exist_ok=True)
    outcome = machine.deploy(kind(machine.files, f"first-{kind.__name__}", after="exit 1"))
    assert (outcome.status, outcome.step) == ("Failed", "rollback-failed")
    assert "there is no previous system to go back to" in outcome.reason


def test_the_first_plain_path_is_removed_again(make_machine):
    machine = make_machine(**FAST)
    script = closures.script(machine.files, "bad", "exit 1")
    outcome = machine.deploy(closures.plain(machine.files, 1), script)
    assert (outcome.status, outcome.step) == ("Failed", "rolled-back")
    assert machine.host.profile() is None and machine.host.generations() == {}


def test_a_failed_redeployment_of_the_running_system_has_nothing_to_undo(nixos_machine):
    machine, first = nixos_machine()
    outcome = machine.deploy(first, closures.script(machine.files, "bad", "exit 1"))
    assert (outcome.status, outcome.step) == ("Failed", "failed")
    assert "it ran before already" in outcome.reason


def test_another_kind_than_that_of_the_profile_is_refused(nixos_machine):
    machine, first = nixos_machine()
    outcome = machine.deploy(closures.plain(machine.files, 1))
    assert (outcome.status, outcome.step) == ("Failed", "failed")
    assert f"{SYSTEM} holds a NixOS" in outcome.reason and "is a plain path" in outcome.reason
    assert machine.host.profile() == first


@pytest.mark.promise(3)
def test_after_a_failed_rollback_the_previous_system_stays_the_same(nixos_machine):
    machine, first = nixos_machine()
    breaks = "[ ! -e /run/broken ] || exit 1"
    machine.workspace.push(closures.nixos(machine.files, "unrelated"))
    second = closures.nixos(machine.files, 2, before=breaks)
    assert machine.deploy(second).status == "Succeeded"
    third = closures.nixos(machine.files, 3, after="touch /run/broken; exit 1")
    outcome = machine.deploy(third)
    assert (outcome.status, outcome.step) == ("Failed", "rollback-failed")
    assert machine.host.running() == third and "the rollback failed" in outcome.reason
    assert machine.host.record().count(("test", second)) == 1 + 3
    machine.host.path("/run/broken").unlink()
    fourth = closures.nixos(machine.files, 4, after="exit 1")
    outcome = machine.deploy(fourth)
    assert (outcome.status, outcome.step) == ("Failed", "rolled-back")
    assert machine.host.running() == machine.host.profile() == second


# --- order and cancellation -----------------------------------------------------------------------


def make_waiting_machine(make_machine):
    """A machine whose download waits for /run/go-on."""
    machine = make_machine(**FAST)
    machine.agent.stop()
    script = "touch /run/waiting; " + closures.wait_for("/run/go-on")
    machine.env = wrapper(machine.host, "nix-store", script)
    machine.start()
    return machine


@pytest.mark.promise(14)
def test_cancelled_before_the_activation(make_machine):
    machine = make_waiting_machine(make_machine)
    deployment = machine.order(closures.nixos(machine.files, 1))
    wait_until(lambda: machine.host.path("/run/waiting").exists())
    path = f"/api/v1/deploy/deployment/{deployment}/cancel"
    assert machine.workspace.request("POST", path)[0] == 200
    machine.host.path("/run/go-on").touch()
    wait_until(lambda: machine.host.step(deployment) == "cancelled")
    assert machine.outcome(deployment).status == "Cancelled"
    assert machine.host.record() == [] and machine.host.running() is None
    assert machine.deploy(closures.nixos(machine.files, 2)).status == "Succeeded"


@pytest.mark.promise(13)
def test_a_derivation_is_refused(machine):
    derivation = machine.files.add("thing.drv", "Derive([])")
    outcome = machine.deploy(derivation)
    reason = f"{derivation} is a derivation, which would have to be built"
    assert_untouched(machine, outcome, reason)


# --- the agent ------------------------------------------------------------------------------------


@pytest.mark.promise(8, 10)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_agent_and_a_running_switch_goes_on(nixos_machine, number):
    machine, _ = nixos_machine()
    new = closures.nixos(machine.files, 2, after=closures.wait_for("/run/go-on"))
    deployment = machine.order(new)
    wait_until(lambda: machine.host.running() == new)
    machine.agent.signal(number)
    assert machine.agent.wait(12) == 0
    machine.host.path("/run/go-on").touch()
    machine.start()
    assert machine.outcome(deployment).status == "Succeeded"
    assert machine.host.boot_default() == new


@pytest.mark.long
def test_only_one_agent_of_a_name(make_machine):
    machine = make_machine()
    url, token = machine.workspace.url, machine.workspace.token("agent")
    for options, status in ((["--if-stopped"], 0), ([], 75)):
        second = machine.host.agent(machine.name, url, token, *options)
        assert second.wait() == status
    running = f"an agent named {machine.name} is already running (pid {machine.agent.pid})"
    assert running in second.text()


def test_a_refused_token_ends_the_agent(host, live, name):
    agent = host.agent(name, live.url, "wrong-token")
    assert agent.wait() == 77
    assert "refused the token (HTTP 401)" in agent.text() and "wrong-token" not in agent.text()


def test_bootstrap_hands_over(make_host, live, name):
    host = make_host()
    token = live.token("agent")
    waits = {"CACHIX_DEPLOY_WAITS": json.dumps({"handover": 20})}
    bootstrap = host.agent(name, live.url, token, "--bootstrap", env=waits)
    bootstrap.wait_for("is connected")
    system = closures.nixos(live.files, "bootstrapped")
    live.push(system)
    assert live.wait(live.deploy(name, system)) == "Succeeded"
    bootstrap.wait_for("waiting up to 20 s")
    argv = [*command("cachix-deploy"), "--host", live.url, "agent", name]
    successor = host.start("successor", argv, {"CACHIX_AGENT_TOKEN": token})
    assert bootstrap.wait(25) == 0
    takeover = rf"pid ({successor.pid}|\?) has taken over|another agent of this name"
    assert re.search(takeover, bootstrap.text())
    assert "the workspace asked" not in bootstrap.text()
    successor.wait_for("is connected")
    again = closures.nixos(live.files, "after-bootstrap")
    live.push(again)
    assert live.wait(live.deploy(name, again)) == "Succeeded"


# --- logs -----------------------------------------------------------------------------------------


@pytest.mark.promise(9)
def test_any_bytes_and_the_closing_line_on_its_own(make_machine):
    machine = make_machine()
    noise = b"umlaut \xc3\xa4\nbad \xff\xfe\nnul \x00 end\n"
    noise += b"escape \x1b[31mred\x1b[0m\ttab\r\nno newline"
    code = {"after": closures.output(noise), "after_boot": closures.output(b"open end")}
    outcome = machine.deploy(closures.nixos(machine.files, 1, **code))
    lines = machine.workspace.log(outcome.id)
    escape = "escape \x1b[31mred\x1b[0m\ttab\r"
    assert {"umlaut ä", "bad \ufffd\ufffd", "nul \ufffd end", escape, "no newline"} <= set(lines)
    assert lines[-2:] == ["open end", SUCCESS]


def complete(lines):
    """The log, once it has its closing line: a long log may arrive after the terminal report."""
    return lines if lines and lines[-1] == SUCCESS else None


@pytest.mark.long
@pytest.mark.promise(9)
def test_200_000_lines_and_one_of_20_MB_arrive_in_order_and_cost_no_memory(make_machine):
    machine = make_machine()
    machine.deploy(closures.nixos(machine.files, "warm-up"))
    before = machine.agent.memory("VmHWM")
    code = closures.lines(200_000) + "\n" + closures.long_line(20 << 20)
    outcome = machine.deploy(closures.nixos(machine.files, "loud", after=code), timeout=100)
    assert outcome.status == "Succeeded"
    lines = wait_until(lambda: complete(machine.workspace.log(outcome.id)), 60)
    first = lines.index("line 1")
    assert lines[first : first + 200_000] == [f"line {i}" for i in range(1, 200_001)]
    long = lines[first + 200_000 : first + 200_000 + 320]
    assert long == ["x" * 65536] * 320 and lines[-1] == SUCCESS
    growth = machine.agent.memory("VmHWM") - before
    assert growth < 30 << 20, f"the agent grew by {growth >> 20} MiB"


@pytest.mark.promise(9)
def test_a_daemon_that_keeps_the_log_open_delays_nothing(make_machine):
    machine = make_machine()
    daemons = closures.daemon(60) + " " + closures.session(60)
    outcome = machine.deploy(closures.nixos(machine.files, 1, after=daemons))
    assert outcome.status == "Succeeded"


@pytest.mark.promise(11)
def test_no_command_sees_the_token_or_the_services_variables(make_machine):
    secrets = {
        "NOTIFY_SOCKET": "/run/notify",
        "CREDENTIALS_DIRECTORY": "/run/credentials",
        "INVOCATION_ID": "0b6c4f1e5a9d4c7fb3b1",
    }
    machine = make_machine(env={**FAST["env"], **secrets})
    script = "env; readlink /proc/self/fd/*; :"
    outcome = machine.deploy(closures.nixos(machine.files, 1, after=script))
    assert outcome.status == "Succeeded"
    for secret in (machine.workspace.token("agent"), *secrets.values(), ".lock"):
        assert secret not in outcome.log
    assert "HOME=" in outcome.log and "PATH=" in outcome.log


def test_the_state_is_private_and_the_roots_are_removed_at_the_end(make_machine):
    machine = make_machine()
    outcome = machine.deploy(closures.nixos(machine.files, 1))
    directory = machine.host.state / "deployments" / outcome.id
    for path in (directory, directory.parent):
        assert path.stat().st_mode & 0o077 == 0
    wait_until(lambda: not [entry for entry in directory.iterdir() if entry.is_symlink()])
    assert not os.path.exists(machine.host.state / "netrc")
