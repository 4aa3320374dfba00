"""The inheritance of a program: descriptors, umask, signals, user, PATH."""

import itertools
import json
import os
import pwd
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import closures
import pytest
from hosts import PROJECT, command, wait_until

from activate import environment, journal

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
    (host.directory / "lib").mkdir()  # in place of this machine's, where root keeps its state
    host.output("mount", "--bind", str(host.directory / "lib"), "/var/lib")
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


# --- the user -------------------------------------------------------------------------------------


@pytest.fixture
def stranger(host):
    """The words in front of a command of a user id without passwd entry: `stranger("NAME=VALUE")`.

    It has no variable that names a directory but those that are given.
    """
    for directory in (host.directory, *host.directory.parents):
        if directory.stat().st_uid == os.getuid() and str(directory) not in ("/", "/tmp"):
            directory.chmod(stat.S_IMODE(directory.stat().st_mode) | 0o055)
    unset = [word for variable in WITHOUT_HOME for word in ("-u", variable)]
    user = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", "--inh-caps=-all"]
    if subprocess.run([*user, *command("cachix-deploy"), "--version"], check=False).returncode:
        pytest.skip("other users can't read the Python of these tests, or setpriv is missing")
    return lambda *variables: ["env", *unset, "TMPDIR=/tmp", *variables, *user]


root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root may take another user id")


@root_only
def test_an_agent_of_a_user_without_home(host, live, name, stranger):
    program = [*command("cachix-deploy"), "--host", live.url, "agent", name]
    env = {"CACHIX_AGENT_TOKEN": live.token("agent")}
    done = host.run([*stranger(), *program], env=env)
    assert (done.returncode, done.stdout) == (64, "")
    sentence = "error: user 54321 has no passwd entry, thus no home directory: set HOME, or "
    assert done.stderr == f"{sentence}STATE_DIRECTORY to a directory for its files\n"
    place = host.directory / "place"
    place.mkdir()
    os.chown(place, 54321, 54321)
    agent = host.start("agent", [*stranger(f"STATE_DIRECTORY={place}"), *program], env)
    agent.wait_for("is connected to")
    assert (place / f".cache/cachix/deploy/locks/agent-{name}.lock").exists()
    assert agent.stop() == 0


@root_only
def test_activate_needs_no_home(machine, stranger):
    path = closures.plain(machine.files, machine.name)
    machine.workspace.push(path)
    spec = machine.host.directory / "deploy.json"
    spec.write_text(json.dumps({"agents": {machine.name: path}}))
    words = ["--host", machine.workspace.url, "activate", str(spec)]
    env = {"CACHIX_ACTIVATE_TOKEN": machine.workspace.token("activate")}
    done = machine.host.run([*stranger(), *command("cachix-deploy"), *words], env=env)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_home_directory(monkeypatch):
    for variable in ("HOME", "STATE_DIRECTORY", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert environment.home() == pwd.getpwuid(os.geteuid()).pw_dir

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with pytest.raises(environment.NoHome, match="set HOME, or STATE_DIRECTORY"):
        environment.home()
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/one:/var/lib/two")
    assert environment.home() == journal.state_directory() == "/var/lib/one"
    assert environment.cache_home() == "/var/lib/one/.cache"
    monkeypatch.setenv("HOME", "relative")
    assert environment.home() == "/var/lib/one"
    monkeypatch.setenv("HOME", "/home/web")
    assert environment.for_commands()["HOME"] == "/home/web"
    assert environment.for_commands()["USER"] == "54321"


# --- PATH -----------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="it hides the system's Nix by a mount")
@pytest.mark.parametrize("profile", [".nix-profile", "state/nix/profile"])
def test_a_nix_below_the_home_directory(host, live, name, start, profile):
    """It was installed for one user alone, and the PATH of cron does not name it."""
    programs = Path(host.environment["HOME"]) / profile / "bin"
    programs.mkdir(parents=True)
    real = os.path.realpath(shutil.which("nix-store"))
    shutil.copy(real, host.directory / "nix-elsewhere")
    for program in ("nix", "nix-store", "nix-env"):
        (programs / program).symlink_to(host.directory / "nix-elsewhere")
    assert host.run(["mount", "--bind", os.devnull, real]).returncode == 0
    agent = start("PATH=/usr/bin:/bin")
    agent.wait_for("is connected to")
    assert deploy(live, name, closures.plain(live.files, name)) == ["Succeeded"], agent.text()


def test_the_search_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/web")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    own = ["/home/web/.nix-profile/bin", "/home/web/.local/state/nix/profile/bin"]
    default = "/nix/var/nix/profiles/default/bin"
    system = "/run/current-system/sw/bin"
    monkeypatch.setenv("PATH", "/usr/bin:/bin::relative")
    assert environment.search_path().split(":") == ["/usr/bin", "/bin", system, *own, default]
    monkeypatch.delenv("PATH")
    assert environment.search_path().split(":") == [system, *own, default, "/usr/bin", "/bin"]
