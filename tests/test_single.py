"""One agent of a name on a machine, whatever HOME it has and whatever is deleted."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from hosts import PROJECT, wait_until

import cachix_entry
import cachix_options
from activate import environment, lock
from activate.agent import single

pytestmark = pytest.mark.promise(1)

SHORT = {"CACHIX_DEPLOY_WAITS": '{"former": 1.0, "backoff": 0.05}'}
# Takes the lock of an agent's name as Cachix's client does, and lets a child inherit it.
FORMER = """
import os, subprocess, sys, time
sys.path.insert(0, sys.argv[1])
from activate import lock
taken = lock.take(sys.argv[2])
open(sys.argv[2][:-4] + "pid", "w").write(str(os.getpid()))
if sys.argv[3] == "child":
    subprocess.Popen(["sleep", sys.argv[4]], pass_fds=[taken.fd])
    sys.exit()
time.sleep(float(sys.argv[4]))
"""


def second(machine, *options, **env):
    token = machine.workspace.token("agent")
    return machine.host.agent(
        machine.name, machine.workspace.url, token, *options, env={**SHORT, **env}
    )


def empty_cache(machine):
    shutil.rmtree(machine.host.environment["XDG_CACHE_HOME"])


def other_home(machine):
    home = machine.host.directory / "other-home"
    return {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}


@pytest.mark.parametrize(("options", "status"), [(["--if-stopped"], 0), ([], 75)])
@pytest.mark.parametrize("how", ["as-it-is", "empty-cache", "other-home", "empty-state"])
def test_a_second_agent_finds_the_first(make_machine, how, options, status):
    machine = make_machine(env=SHORT)
    env = other_home(machine) if how == "other-home" else {}
    if how == "empty-cache":
        empty_cache(machine)
    if how == "empty-state":
        os.unlink(single.own_path(str(machine.host.state), machine.name))
    other = second(machine, *options, **env)
    assert other.wait(20) == status
    running = f"an agent named {machine.name} is already running (pid {machine.agent.pid})"
    assert (running in other.text()) == (status == 75)
    assert machine.agent.text().count("is connected to") == 1


def test_a_successor_waits_for_an_agent_that_is_about_to_end(make_machine):
    machine = make_machine(env=SHORT)
    successor = second(machine, CACHIX_DEPLOY_WAITS='{"former": 20}')
    time.sleep(0.5)
    assert machine.agent.text().count("is connected to") == 1
    assert machine.agent.stop() == 0
    successor.wait_for("is connected to")
    machine.agent = successor


def former(machine, kind, seconds):
    """Run something that holds the lock of Cachix's agent on the host; its process."""
    directory = f"{machine.host.environment['XDG_CACHE_HOME']}/cachix/deploy/locks"
    path = f"{directory}/agent-{machine.name}.lock"
    code = [sys.executable, "-c", FORMER, str(PROJECT), path, kind, str(seconds)]
    return machine.host.popen(code)


@pytest.mark.promise(8)
def test_children_of_a_former_agent_are_waited_for(make_machine):
    """A deployment moves the machine from Cachix's agent to ours: that deployment goes on."""
    machine = make_machine(env=SHORT)
    assert machine.agent.stop() == 0
    assert former(machine, "child", 4).wait(20) == 0
    began = time.monotonic()
    machine.start()
    assert time.monotonic() - began > 2  # longer than for an agent that runs
    message = f"waiting for the deployment of a former agent named {machine.name} to end"
    assert machine.agent.text().count(message) == 1


def test_they_are_not_waited_for_with_if_stopped(make_machine):
    machine = make_machine(env=SHORT, check=False)
    assert machine.agent.stop() == 0
    former(machine, "child", 20).wait(20)
    assert second(machine, "--if-stopped").wait(10) == 0


def test_they_are_waited_for_as_long_as_an_activation_may_take(make_machine):
    machine = make_machine(env=SHORT, check=False)
    assert machine.agent.stop() == 0
    former(machine, "child", 60).wait(20)
    late = second(machine, "--activation-timeout=3")
    assert late.wait(20) == 75
    assert "has started is still running" in late.text()


@pytest.mark.promise(10)
@pytest.mark.parametrize("kind", ["child", "agent"])
def test_sigterm_ends_the_wait(make_machine, kind):
    machine = make_machine(env=SHORT, check=False)
    assert machine.agent.stop() == 0
    process = former(machine, kind, 60)
    if kind == "child":
        process.wait(20)
    else:
        lock_file = machine.host.environment["XDG_CACHE_HOME"] + "/cachix/deploy/locks"
        wait_until(lambda: lock.held(f"{lock_file}/agent-{machine.name}.lock"), 10)
    waiting = second(machine, CACHIX_DEPLOY_WAITS='{"former": 60}')
    time.sleep(1)
    waiting.signal(signal.SIGTERM)
    assert waiting.wait(10) == 0


# --- whose PID it is ------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return str(tmp_path / "state")


def test_a_pid_that_another_program_has_by_now(place):
    taken = lock.take(lock.shared_path("agent", "web"))
    stranger = subprocess.Popen(["sleep", "60"])
    for pid, is_gone in ((stranger.pid, True), (os.getpid(), False), ("", False), ("x", False)):
        with open(single.pid_path("web"), "w", encoding="ascii") as file:
            file.write(str(pid))
        assert single.owner(place, "web") == single.Owner(str(pid), is_gone)
    stranger.kill()
    stranger.wait()
    taken.close()
    assert single.owner(place, "web") is None


def test_a_state_that_can_not_be_written_stops_no_agent(place, tmp_path):
    (tmp_path / "state").write_text("a file")
    assert single.take(place, "web") and not single.take(place, "web")


def test_a_link_in_the_place_of_the_pid_is_not_followed(place, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("important")
    path = single.pid_path("web")
    os.makedirs(os.path.dirname(path))
    os.symlink(victim, path)
    with pytest.raises(single.Error, match="can't be locked"):
        single.take(place, "web")
    assert victim.read_text() == "important"


# --- a home directory of somebody else ------------------------------------------------------------

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root is led astray")


@as_root
@pytest.mark.parametrize("name", environment.PERSONAL)
@pytest.mark.parametrize("exists", [True, False])
def test_root_uses_no_directory_of_another_user(tmp_path, monkeypatch, name, exists):
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, 54321, 54321)
    for variable in environment.PERSONAL:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, str(home if exists else home / "not/there"))
    monkeypatch.setenv("LANG", "C")
    assert environment.leave_others() == [name]
    assert name not in os.environ and environment.home() != str(home)
    assert str(home) not in " ".join(environment.for_commands().values())


@as_root
@pytest.mark.parametrize("home", ["own", "missing", "/", "/nonexistent/x", "", "relative"])
def test_root_keeps_its_own(tmp_path, monkeypatch, home):
    own = tmp_path / "own"
    own.mkdir()
    value = {"own": str(own), "missing": str(own / "a/b")}.get(home, home)
    for variable in environment.PERSONAL:
        monkeypatch.setenv(variable, value)
    assert environment.leave_others() == [] and os.environ["HOME"] == value


def test_another_user_than_root_is_not_asked(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    monkeypatch.setenv("HOME", "/root")
    assert environment.leave_others() == []


@as_root
@pytest.mark.promise(12)
def test_an_agent_writes_nothing_there_and_follows_no_link(host, live, name, tmp_path):
    """As with a `sudo` that keeps HOME."""
    home, victim = tmp_path / "joe", tmp_path / "victim"
    locks = home / ".cache/cachix/deploy/locks"
    locks.mkdir(parents=True)
    victim.write_text("important")
    (locks / f"agent-{name}.pid").symlink_to(victim)
    for directory in (home, home / ".cache", locks):
        os.chown(directory, 54321, 54321)
    env = {"HOME": str(home), "XDG_CACHE_HOME": "", "XDG_STATE_HOME": "", "XDG_CONFIG_HOME": ""}
    agent = host.agent(name, live.url, live.token("agent"), env=env)
    agent.wait_for("is connected to")
    assert "HOME: not root's own, so the home directory is " in agent.text()
    assert victim.read_text() == "important"
    assert [path.name for path in locks.iterdir()] == [f"agent-{name}.pid"]
    assert agent.stop() == 0


@pytest.mark.parametrize("lost", [(), ("cache",), ("pid",), ("cache", "pid")], ids=str)
def test_cron_starts_an_agent_in_place_of_a_killed_one(make_machine, lost):
    """As a line of cron does each minute, whatever the killed agent has left in its files."""
    machine = make_machine(env=SHORT)
    assert second(machine, "--if-stopped").wait(20) == 0  # nothing to do as long as one runs
    machine.agent.kill()
    if "cache" in lost:
        empty_cache(machine)
    if "pid" in lost:  # it names a process that runs, and is no agent
        for path in machine.host.directory.glob("**/agent-*.pid"):
            path.write_text(str(os.getpid()))
    machine.agent = second(machine, "--if-stopped")
    machine.agent.wait_for(r"(?s)is connected to.*is connected to")  # both write into one file
    assert second(machine, "--if-stopped").wait(20) == 0


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("agent web --if-stopped", "web"),
        ("deploy agent web --if-stopped --host=http://x --token-file=/etc/token", "web"),
        ("--host=http://x agent --if-stopped web profile", "web"),
        ("agent --if-stopped", os.uname().nodename.partition(".")[0]),
        ("agent web", None),
        ("agent web --if-stopped --bootstrap", None),
        ("agent web --if-stopped --hots=http://x", None),
        ("agent web --if-stopped --host http://x", None),
        ("agent web --if-stopped --verbose", None),
        ("agent a b c --if-stopped", None),
        ("agent ../x --if-stopped", None),
        ("push agent --if-stopped", None),
    ],
)
def test_lines_of_cron_that_are_answered_at_once(line, name):
    assert cachix_entry.agent_named(line.split()) == name


def test_options_of_lines_of_cron_are_those_of_the_usage_text():
    names = cachix_entry.VALUED.pattern[3 : cachix_entry.VALUED.pattern.index(")")].split("|")
    for name in names:
        parsed = cachix_options.parse([f"--{name}=x", "agent", "web", "--if-stopped"])
        assert "x" in (parsed[f"--{name}"] or []) and parsed["--if-stopped"]


def test_cron_loads_nothing_of_the_network_while_an_agent_runs(make_machine):
    machine = make_machine(env=SHORT)
    argv = [sys.executable, "-X", "importtime", str(PROJECT / "cachix_entry.py")]
    words = ["agent", machine.name, "--if-stopped", f"--host={machine.workspace.url}"]
    result = machine.host.run([*argv, *words])
    assert result.returncode == 0 and " activate.agent.single" in result.stderr
    assert "websocket" not in result.stderr and "docopt" not in result.stderr
