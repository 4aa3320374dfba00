"""The units that the NixOS modules make, under a real systemd: those of agent and workspace.

The texts are evaluated; only the store paths in them are replaced by places of the container.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import closures
import pytest
import requests
from clones import clone
from containers import UNIT, Container, ServiceMachine
from hosts import NIX_CONF, PROJECT, wait_until
from nixmodules import evaluate

from cachix_protocol import __version__

pytestmark = [pytest.mark.timeout(300), pytest.mark.long]

AGENT = "networking.hostName = {name}; services.cachix-deploy.enable = true;"
WORKSPACE_UNIT = "cachix-workspace.service"
RUNNER = """\
#!/bin/sh
export PYTHONPATH=/opt/project:/opt/packages PYTHONDONTWRITEBYTECODE=1
exec /usr/bin/python3 -m cachix_workspace "$@"
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The agent in one file, as `make pyz` builds it."""
    path: Path = tmp_path_factory.mktemp("program") / "cachix-deploy.pyz"
    subprocess.run([sys.executable, str(PROJECT / "tools/pyz.py"), str(path)], check=True)
    return path


def localized(unit: str) -> str:
    """A unit whose store paths are places of the container."""
    unit = re.sub(r"/nix/store/[0-9a-f]{32}-[^/ \"]+/bin/(cachix-\w+)", r"/usr/local/bin/\1", unit)
    return re.sub(r"/nix/store/[0-9a-f]{32}-[^/: \"]+/(s?bin)", r"/usr/\1", unit)


def agent_unit(machine_name: str, url: str, settings: str = "") -> str:
    """The unit of an agent, by the module."""
    own = AGENT.format(name=f'"{machine_name}"')
    host = f'services.cachix-deploy.host = "{url}";'
    machine = evaluate("nixos", own, host, settings)
    assert machine.failed == []
    return localized(machine.units["cachix-deploy"])


def system_with(machine: ServiceMachine, version: str, unit: str) -> str:
    """A system that has the unit, and whose activation restarts it as that of NixOS does."""
    install = f'cp "$self/{UNIT}" /etc/systemd/system/ && systemctl daemon-reload'
    restart = f"{install} && systemctl restart {UNIT}"
    name = f"{machine.name}-{version}"
    return closures.nixos(machine.files, name, after=restart, extra={UNIT: unit})


def test_the_agent_of_the_nixos_module(
    tree: Path, program: Path, tmp_path: Path, live: Any, name: str
) -> None:
    name = name[:60]
    unit = agent_unit(name, live.url)
    with Container(tmp_path / "container", tree) as host:
        machine = ServiceMachine(host, program, live, name, unit=unit)
        machine.boot()
        first = system_with(machine, "first", unit)
        assert machine.deploy(first).status == "Succeeded"  # the first deployment keeps the agent
        assert host.show("SubState") == "running" and host.show("Result") == "success"
        changed = agent_unit(name, live.url, "services.cachix-deploy.verbose = true;")
        second = system_with(machine, "second", changed)
        outcome = machine.deploy(second)
        assert outcome.status == "Succeeded", outcome
        assert "--verbose" in host.output("systemctl", "cat", UNIT)
        pid = machine.main_pid()
        host.systemctl("kill", "--signal=KILL", UNIT)
        wait_until(lambda: machine.main_pid() not in (0, pid), 30, "the agent to be restarted")
        host.reboot()
        third = machine.deploy(system_with(machine, "third", changed))
        assert third.status == "Succeeded", third
        directory = host.path("/var/lib/cachix-deploy")
        assert directory.stat().st_mode & 0o777 == 0o700
        assert host.show("UMask") == "0022"
        machine.stop()
        assert machine.states()["Result"] == "success"
        host.systemctl("start", UNIT)
        machine.check()


def test_a_system_without_the_agents_module_says_so_when_its_agent_is_gone(
    tree: Path, program: Path, tmp_path: Path, live: Any, name: str
) -> None:
    name = name[:60]
    unit = agent_unit(name, live.url, "services.cachix-deploy.confirmTimeout = 5;")
    with Container(tmp_path / "container", tree) as host:
        machine = ServiceMachine(host, program, live, name, unit=unit)
        machine.boot()
        first = system_with(machine, "first", unit)
        assert machine.deploy(first).status == "Succeeded"
        gone = f"rm /etc/systemd/system/{UNIT}; systemctl daemon-reload; systemctl stop {UNIT}; :"
        system = closures.nixos(machine.files, f"{name}-second", after=gone)
        deployment = machine.order(system)
        # its own switch process finds that no agent comes back, and returns to the first system
        wait_until(lambda: host.running() == first, 180, "the first system to run again")
        outcome = machine.outcome(deployment, 180)
        assert (outcome.status, outcome.step) == ("Failed", "rolled-back"), outcome
        assert host.show("SubState") == "running"


# --- the unit of Cachix's agent -------------------------------------------------------------------

# As NixOS writes that of services.cachix-agent, whose option `package` is changed.
CACHIX_UNIT = """\
[Unit]
After=network-online.target
Description=Cachix Deploy Agent
X-StopOnRemoval=false

[Service]
Environment="PATH=/usr/local/bin:/usr/bin:/bin"
Environment="USER=root"
EnvironmentFile=/etc/cachix-agent.token
ExecStart={package}/bin/cachix  --host {url} \\
  deploy agent {name}
KillMode=process
Restart=on-failure

[Install]
WantedBy=multi-user.target
"""
EARLIER = PROJECT / "tests" / "releases" / "e7a871c.tar.xz"
EARLIER_PROGRAM = """\
#!/bin/sh
PYTHONPATH=/opt/packages exec /usr/bin/python3 /opt/earlier/cachix_deploy.py "$@"
"""


def test_the_unit_of_cachixs_agent_changes_its_package_and_back(
    python_tree: Container, program: Path, live: Any, name: str
) -> None:
    """An earlier release plays the other client. Each system restarts the unit that it changes."""
    name, host, service = name[:60], python_tree, "cachix-agent.service"
    with tarfile.open(EARLIER) as archive:
        archive.extractall(host.upper / "opt/earlier")
    host.write("/opt/theirs/bin/cachix", EARLIER_PROGRAM, 0o755)
    (host.upper / "opt/ours/bin").mkdir(parents=True)
    shutil.copy(program, host.upper / "opt/ours/bin/cachix")
    host.write("/etc/cachix-agent.token", f"CACHIX_AGENT_TOKEN={live.token('agent')}\n", 0o600)
    units = {
        package: CACHIX_UNIT.format(package=f"/opt/{package}", url=live.url, name=name)
        for package in ("theirs", "ours")
    }
    host.write(f"/etc/systemd/system/{service}", units["theirs"])
    restart = f'cp "$self/{service}" /etc/systemd/system/ && systemctl daemon-reload'
    restart += f" && systemctl restart {service}"
    with host:
        host.boot()
        host.systemctl("start", service)
        wait_until(lambda: is_connected(live, name), 30, "the agent to connect")
        for number, package in enumerate(("ours", "ours", "theirs", "ours")):
            unit = {service: units[package]}
            system = closures.nixos(live.files, f"{name}-{number}", after=restart, extra=unit)
            live.push(system)
            deployment = live.deploy(name, system)
            assert live.wait(deployment, 120) == "Succeeded", live.text(deployment)
            assert host.running() == system == host.boot_default()
            assert f"/opt/{package}/" in host.output("systemctl", "cat", service)
            wait_until(lambda: is_connected(live, name), 30, "the agent to be connected")


def is_connected(live: Any, name: str) -> bool:
    return any(one["name"] == name and one["connected"] for one in live.agents())


# --- the workspace --------------------------------------------------------------------------------


@pytest.fixture
def python_tree(tree: Path, tmp_path: Path) -> Container:
    """A container that has our Python packages in /opt/packages, not booted."""
    container = Container(tmp_path / "container", tree)
    python = tree / f"usr/bin/python3.{sys.version_info.minor}"
    if not python.exists():
        pytest.skip(f"the container has another Python than {python.name}, which the packages need")
    packages = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    shutil.copytree(packages, container.upper / "opt/packages", copy_function=link)
    return container


@pytest.fixture
def server_tree(python_tree: Container) -> Container:
    """A container that has the workspace's program and what it needs, not booted."""
    container = python_tree
    target = container.upper / "opt/project"
    ignored = shutil.ignore_patterns("__pycache__")
    for source in ("activate", "cachix_workspace"):
        shutil.copytree(PROJECT / source, target / source, ignore=ignored)
    for module in PROJECT.glob("cachix_*.py"):
        shutil.copy(module, target)
    container.write("/usr/local/bin/cachix-workspace.program", RUNNER, 0o755)
    return container


def link(source: str, target: str) -> None:
    """Copy a file that nothing changes, without its contents where that is possible."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_the_workspace_of_the_nixos_module(server_tree: Container) -> None:
    port = free_port()
    settings = f"services.cachix-workspace = {{ enable = true; port = {port}; }};"
    machine = evaluate("nixos", settings)
    unit = localized(machine.units["cachix-workspace"])
    unit = unit.replace(
        "/usr/local/bin/cachix-workspace", "/usr/local/bin/cachix-workspace.program"
    )
    command = re.sub(
        r"/nix/store/\S+?/bin/cachix-workspace",
        "/usr/local/bin/cachix-workspace.program",
        machine.scripts[0],
    )
    host = server_tree
    host.write(f"/etc/systemd/system/{WORKSPACE_UNIT}", unit)
    host.write("/usr/local/bin/cachix-workspace", f"#!/bin/sh\n{command}", 0o755)
    with host:
        host.boot()
        host.systemctl("start", WORKSPACE_UNIT)
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: is_up(url), 30, f"the workspace to be up: {host.directory}/journal")
        run = ["cachix-workspace"]
        token = host.run([*run, "token", "create", "agent"], 60)
        assert token.returncode == 0 and token.stdout.startswith("agent-"), token
        secret = host.run([*run, "cache", "create", "main"], 60)
        assert secret.returncode == 0 and secret.stdout.startswith("main."), secret
        wrong = host.run([*run, "token", "crate"], 60)
        assert wrong.returncode == 64 and "error: unknown command" in wrong.stderr + wrong.stdout
        owners = host.output("find", "/var/lib/private/cachix-workspace", "-printf", "%u %m %P\\n")
        assert "root" not in {line.split()[0] for line in owners.splitlines()}, owners
        assert all(int(line.split()[1], 8) & 0o077 == 0 for line in owners.splitlines()), owners
        host.systemctl("restart", WORKSPACE_UNIT)
        wait_until(lambda: is_up(url), 30, "the workspace to be back")
        listed = host.run([*run, "token", "list", "--json"], 60)
        assert listed.returncode == 0 and '"kind": "agent"' in listed.stdout
        assert host.show("Result", WORKSPACE_UNIT) == "success"


def is_up(url: str) -> bool:
    with contextlib.suppress(requests.ConnectionError):
        return requests.get(f"{url}/healthz", timeout=5).ok
    return False


# --- an agent of a user ---------------------------------------------------------------------------

USER_SETTINGS = """
[Service]
Environment=XDG_RUNTIME_DIR=/run/user/1000
"""  # which PAM's module of systemd would set
HOME_PROFILE = "/home/alice/.local/state/nix/profiles/home-manager"
AS_ALICE = ["runuser", "-u", "alice", "--", "env", "XDG_RUNTIME_DIR=/run/user/1000"]


def user_unit(name: str, url: str) -> str:
    """The unit of a user's agent, by the module of home-manager."""
    settings = f'enable = true; name = "{name}"; host = "{url}"; confirmTimeout = 20;'
    machine = evaluate("home-manager", f"services.cachix-deploy = {{ {settings} }};")
    assert machine.failed == []
    return localized(machine.units["cachix-deploy"])


def prepare_user(host: Container, program: Path, name: str, live: Any) -> None:
    """Give a container a user who lingers, with an agent and Nix's daemon."""
    host.write("/etc/nix/nix.conf", f"{NIX_CONF}trusted-users = root alice\n")
    host.write("/etc/systemd/system/user@1000.service.d/runtime.conf", USER_SETTINGS)
    logind = host.tree / "usr/lib/systemd/system/systemd-logind.service"  # masked in the tree
    host.write("/etc/systemd/system/systemd-logind.service", logind.read_text())
    (host.upper / "usr/local/bin").mkdir(parents=True)
    shutil.copy(program, host.upper / "usr/local/bin/cachix-deploy")
    host.boot()
    host.output("useradd", "--create-home", "--uid=1000", "--shell=/bin/sh", "alice")
    host.output("systemd-run", "--unit=nix", "--setenv=PATH=/usr/bin:/bin", "nix-daemon")
    units = "/home/alice/.config/systemd/user"
    host.output("mkdir", "-p", f"{units}/default.target.wants", os.path.dirname(HOME_PROFILE))
    host.path(f"{units}/{UNIT}").write_text(user_unit(name, live.url))
    host.output("ln", "-s", f"../{UNIT}", f"{units}/default.target.wants/{UNIT}")
    host.path("/home/alice/.config/cachix-agent.token").write_text(live.token("agent") + "\n")
    host.output("chown", "-R", "alice:", "/home/alice")
    host.output("install", "--mode=666", "/dev/null", "/nix/var/record")  # which generations write
    host.output("systemctl", "start", "user@1000.service")


def test_a_users_agent_deploys_through_nix_daemon(
    tree: Path, program: Path, tmp_path: Path, live: Any, name: str
) -> None:
    name = name[:60]
    with Container(tmp_path / "container", tree) as host:
        prepare_user(host, program, name, live)
        wait_until(lambda: is_connected(live, name), 30, "the agent to connect")
        journal = host.output("journalctl", "--no-pager", "_UID=1000")
        assert "this agent ends when alice logs out" in journal
        for number, after in enumerate(("", f"systemctl --user restart {UNIT}")):
            path = closures.home_manager(live.files, f"{name}-{number}", after=after)
            live.push(path)
            deployment = live.deploy(name, path)
            assert live.wait(deployment, 120) == "Succeeded", live.text(deployment)
        assert host.output("readlink", "-f", HOME_PROFILE).strip() == path
        state = host.path("/home/alice/.local/state/cachix-deploy").stat()
        assert (state.st_uid, state.st_mode & 0o777) == (1000, 0o700)
        broken = closures.home_manager(live.files, f"{name}-broken", middle="exit 1")
        live.push(broken)
        deployment = live.deploy(name, broken)
        assert live.wait(deployment, 120) == "Failed"
        assert host.output("readlink", "-f", HOME_PROFILE).strip() == path
        host.output(*AS_ALICE, "systemctl", "--user", "stop", UNIT)
        wait_until(lambda: not is_connected(live, name), 30, "the agent to be gone")


# --- a new release --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The agent of a later release, in one file."""
    directory: Path = tmp_path_factory.mktemp("newer")
    clone(directory / "project")
    module = directory / "project" / "cachix_protocol.py"
    text = re.sub('(?m)^__version__ = ".*"$', '__version__ = "9.9.9"', module.read_text())
    module.write_text(text)
    path = directory / "cachix-deploy.pyz"
    argv = [sys.executable, str(directory / "project/tools/pyz.py"), str(path)]
    subprocess.run(argv, check=True, cwd=directory / "project")
    return path


def test_an_agent_is_upgraded_in_its_own_deployment(
    tree: Path, program: Path, newer: Path, tmp_path: Path, live: Any, name: str
) -> None:
    name = name[:60]
    unit = agent_unit(name, live.url)
    with Container(tmp_path / "container", tree) as host:
        machine = ServiceMachine(host, program, live, name, unit=unit)
        for release, file in (("this", program), ("newer", newer)):
            shutil.copy(file, host.upper / f"usr/local/bin/{release}.pyz")
        machine.boot()
        changed = unit.replace("[Service]", "[Service]\nEnvironment=CHANGED=1")
        for number, (release, version) in enumerate((("newer", "9.9.9"), ("this", __version__))):
            install = f"install /usr/local/bin/{release}.pyz /usr/local/bin/cachix-deploy"
            start = f"cp $self/{UNIT} /etc/systemd/system/; systemctl daemon-reload"
            after = f"{install} && {start} && systemctl restart {UNIT}"
            text = changed if number == 0 else unit
            system = closures.nixos(live.files, f"{name}-{number}", after=after, extra={UNIT: text})
            outcome = machine.deploy(system)
            assert outcome.status == "Succeeded", outcome
            assert client_of(live, name) == version
            assert host.running() == system == host.boot_default()
        machine.check()


def client_of(live: Any, name: str) -> str:
    return next(str(one["client"]) for one in live.agents() if one["name"] == name)
