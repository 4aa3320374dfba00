"""What a program inherits from whoever starts it: descriptors, umask, signals, user, PATH."""

import itertools
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import closures
import pytest
from hosts import PROJECT, command, wait_until

DESCRIPTORS = [set(c) for n in (0, 1, 2, 3) for c in itertools.combinations((0, 1, 2), n)]
HUP_AND_INT = 0b11  # in the masks of proc(5)
WITHOUT_HOME = ("HOME", "USER", "LOGNAME", "STATE_DIRECTORY", "XDG_CACHE_HOME", "XDG_STATE_HOME",
                "XDG_CONFIG_HOME", "XDG_DATA_HOME")  # fmt: skip


@pytest.fixture
def start(host, live, name):
    """Start an agent by a shell command: `start("umask 077")`."""

    def start(before, *words, env=None):
        program = [*command("cachix-deploy"), "--host", live.url, "agent", name, *words]
        variables = {"CACHIX_AGENT_TOKEN": live.token("agent"), **(env or {})}
        argv = ["sh", "-c", f'{before}; exec "$@"', "sh", *program]
        return host.start("agent", argv, variables)

    return start


def deploy(live, name, *paths):
    """Push and deploy paths one after another; their final statuses."""
    live.push(*paths)
    return [live.wait(live.deploy(name, path)) for path in paths]


# --- descriptors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", DESCRIPTORS, ids=str)
def test_closed_descriptors_are_opened(tmp_path, closed):
    code = f"""
import json, os
from activate import startup
links = lambda: [os.readlink(f'/proc/self/fd/{{n}}') for n in range(3)]
startup.open_descriptors()
with open({str(tmp_path / "links")!r}, 'w') as file:
    state = [links(), [os.get_inheritable(n) for n in range(3)], os.listdir('/proc/self/fd')]
    json.dump(state, file)
"""
    closing = " ".join(f"{number}>&-" for number in closed)
    argv = ["sh", "-c", f'exec "$@" {closing}', "sh", sys.executable, "-c", code]
    with open(tmp_path / "open", "w+b") as file:
        subprocess.run(argv, stdin=file, stdout=file, stderr=file, check=True, cwd=PROJECT)
    links, inheritable, descriptors = json.loads((tmp_path / "links").read_text())
    for number, link in enumerate(links):
        assert link == (os.devnull if number in closed else str(tmp_path / "open"))
    assert all(inheritable) and len(descriptors) == 5  # `file`, and that of listdir


@pytest.mark.promise(8)
@pytest.mark.parametrize("closed", ["0>&-", "2>&-", "0>&- 1>&- 2>&-"])
def test_an_agent_with_closed_descriptors(host, live, name, closed):
    """The locks would be the stdin of commands, and the switch process would lose them."""
    program = [*command("cachix-deploy"), "--host", live.url, "agent", name]
    argv = ["sh", "-c", f'exec "$@" {closed}', "sh", *program]
    env = {"CACHIX_AGENT_TOKEN": live.token("agent")}
    agent = host.popen(argv, env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: name in live.cli("agent", "list"))
    wait = f"echo out; echo err >&2; touch /run/at; {closures.wait_for('/run/go')}"
    system = closures.nixos(live.files, name, after=wait)
    live.push(system)
    deployment = live.deploy(name, system)
    wait_until(host.path("/run/at").exists)
    links = [os.readlink(f"/proc/{agent.pid}/fd/{number}") for number in range(3)]
    agent.kill()
    agent.wait()
    second = host.agent(name, live.url, live.token("agent"))
    second.wait_for("is connected to")
    host.path("/run/go").touch()
    assert live.wait(deployment) == "Succeeded"
    assert {"out", "err"} <= set(live.log(deployment))
    assert host.record() == [("test", system), ("boot", system)], "it was executed again"
    assert links == [os.devnull] * 3


# --- umask ----------------------------------------------------------------------------------------


def modes(*directories):
    """The permissions of all files and directories below."""
    paths = [path for top in directories for path in (Path(top), *Path(top).rglob("*"))]
    return {str(p): stat.S_IMODE(p.stat().st_mode) for p in paths if not p.is_symlink()}


@pytest.mark.promise(11)
@pytest.mark.parametrize("umask", ["000", "022", "077", "777"])
def test_any_umask(host, live, name, start, umask):
    agent = start(f"umask {umask}", "spare")
    agent.wait_for("is connected to")
    system = closures.nixos(live.files, name, after="umask >> /run/umasks")
    script = closures.script(live.files, name, "umask >> /run/umasks")
    live.push(system, script)
    assert live.wait(live.deploy(name, system, script)) == "Succeeded"
    assert set(host.path("/run/umasks").read_text().split()) <= {"0022", "022"}
    profiles = host.path("/nix/var/nix/profiles")
    for directory in (profiles, profiles / "system-profiles"):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o755
    cache = host.environment["XDG_CACHE_HOME"]
    for path, mode in modes(host.state / "deployments", f"{cache}/cachix").items():
        assert mode & 0o77 == 0, (path, oct(mode))


def test_directories_on_the_way_to_the_state_are_as_private_as_the_state(host, live, name, start):
    unset = "; ".join(f"unset {variable}" for variable in WITHOUT_HOME[3:])
    agent = start(f"umask 077; HOME={host.directory}/new; {unset}", env={"STATE_DIRECTORY": ""})
    agent.wait_for("is connected to")
    places = modes(host.directory / "new")
    assert len(places) > 3 and not any(mode & 0o77 for mode in places.values()), places


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.promise(3)
def test_ignored_ends_of_children(host, live, name, start):
    """Without their statuses an activation that fails would count as one that succeeded."""
    ignore = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); "
    agent = start(
        f"set -- '{sys.executable}' -c '{ignore} os.execv(sys.argv[1], sys.argv[1:])' \"$@\""
    )
    agent.wait_for("is connected to")
    good = closures.nixos(live.files, f"{name}-1")
    bad = closures.nixos(live.files, f"{name}-2", after="exit 1")
    assert deploy(live, name, good, bad) == ["Succeeded", "Failed"]
    assert host.running() == good


def test_commands_ignore_no_signal(host, live, name, start):
    """The agent may run under nohup, and its switch process outlives a terminal."""
    agent = start("trap '' HUP INT QUIT")
    agent.wait_for("is connected to")
    system = closures.nixos(live.files, name, after="grep SigIgn: /proc/self/status")
    live.push(system)
    deployment = live.deploy(name, system)
    assert live.wait(deployment) == "Succeeded"
    ignored = [int(line.split()[1], 16) for line in live.log(deployment) if "SigIgn:" in line]
    assert ignored and not any(mask & HUP_AND_INT for mask in ignored)


@pytest.mark.promise(10)
def test_a_blocked_sigterm(host, live, name, start):
    block = "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32)); "
    agent = start(
        f"set -- '{sys.executable}' -c '{block} os.execv(sys.argv[1], sys.argv[1:])' \"$@\""
    )
    agent.wait_for("is connected to")
    assert agent.stop() == 0
