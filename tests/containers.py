"""Machines with a real systemd: containers of systemd-nspawn on a Debian root tree.

The tree is made once, below build/systemd. A container has its own /nix, sees the tree below an
overlay that takes all changes, and shares the network of the real machine. All mounts and processes
belong to namespaces that end with the container. The container ends with the test run, even if that
is killed; only its empty control group has to be removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import re
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any, Optional, Union

from hosts import NIX_CONF, PROJECT, Host, command_line, wait_until
from live import Workspace
from machines import Machine

TREES = PROJECT / "build" / "systemd"
# libdbi-perl is named since debootstrap can't resolve the virtual package that nix-bin wants.
PACKAGES = "systemd,systemd-sysv,dbus,python3,procps,nix-bin,libdbi-perl"
MASKED = (
    "getty.target console-getty.service systemd-logind.service apt-daily.timer"
    " apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer"
    " systemd-tmpfiles-clean.timer"
)
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NAMESPACES = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork"]
NAMESPACES += ["--kill-child", "--propagation", "private", "/bin/sh", "-euc"]
MAKE = f"""
mount -t proc proc /proc
debootstrap --variant=minbase --include={PACKAGES} SUITE "$0" MIRROR
for unit in {MASKED}; do ln -sfn /dev/null "$0/etc/systemd/system/$unit"; done
rm -f "$0"/var/cache/apt/archives/*.deb "$0"/var/lib/apt/lists/*_*
"""
BOOT = """
mkdir "$2" && echo 0 >"$2/cgroup.procs"
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mount -t overlay overlay -o "lowerdir=$1,upperdir=$0/upper,workdir=$0/work" "$0/root"
exec systemd-nspawn --quiet --boot --register=no --keep-unit --link-journal=no --console=pipe \\
  --directory="$0/root" --bind="$0/nix:/nix" --machine="$(basename "$2")"
"""
UNIT = "cachix-deploy.service"
README_COMMAND = "agent web --host=https://deploy.example.org"
TOKEN_FILE = "/etc/cachix-agent.token"


class Missing(Exception):
    """Something that a test needs is not here. The sentence says what to do."""


def look_for_programs() -> None:
    """Raise Missing if this machine can't run containers."""
    if os.geteuid() != 0:
        raise Missing("tests with a real systemd need root")
    if any(
        shutil.which(program, path=PATH) is None for program in ("systemd-nspawn", "debootstrap")
    ):
        install = "apt-get install systemd-container debootstrap debian-archive-keyring"
        raise Missing(f"tests with a real systemd need systemd-nspawn and debootstrap: `{install}`")
    control_groups()


def control_groups() -> str:
    """Return where the unified hierarchy of control groups is mounted. Raises Missing."""
    match = re.search(
        r"^(?:\S+ ){4}(\S+) .* - cgroup2 ", Path("/proc/self/mountinfo").read_text(), re.M
    )
    if match is None or not os.access(match[1], os.W_OK):
        raise Missing("tests with a real systemd need a writable cgroup2 file system")
    return match[1]


def mirror() -> tuple[str, str]:
    """Return the mirror and the suite of Debian that apt is set up for.

    The mirror is empty on any other system, where debootstrap has a default of its own.
    """
    release = Path("/etc/os-release").read_text()
    codename = re.search(r"^VERSION_CODENAME=(\w+)$", release, re.M)
    if re.search(r"^ID=debian$", release, re.M) and codename:
        argv = ["apt-get", "indextargets", "--format", "$(SITE) $(RELEASE) $(CODENAME)"]
        targets = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False).stdout
        for site, *suites in map(str.split, targets.splitlines()):
            if codename[1] in suites and site.startswith("http"):
                return site, codename[1]
    return "", "bookworm"


def root_tree() -> Path:
    """Return the root tree. Makes it if it is missing or another recipe made it. Raises Missing."""
    look_for_programs()
    site, suite = mirror()
    script = MAKE.replace("SUITE", suite).replace("MIRROR", site)
    TREES.mkdir(parents=True, exist_ok=True)
    tree, unfinished, recipe = TREES / "root", TREES / "unfinished", TREES / "recipe"
    with open(TREES / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if tree.is_dir() and recipe.exists() and recipe.read_text() == script:
            return tree
        for old in (tree, unfinished):
            remove(old)
        bootstrap(script, unfinished)
        os.rename(unfinished, tree)
        recipe.write_text(script)
    return tree


def bootstrap(script: str, tree: Path) -> None:
    """Run the recipe for a tree, in namespaces of its own. Raises Missing if it fails."""
    env = {**os.environ, "PATH": PATH, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    with open(TREES / "log", "wb") as log:
        try:
            subprocess.run(
                [*NAMESPACES, script, str(tree)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
                cwd="/",
                check=True,
                timeout=280,
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            raise Missing(
                "tests with a real systemd need Debian packages, but `debootstrap` failed"
                f" ({type(error).__name__}): see {log.name}"
            ) from None


def remove(tree: Path) -> None:
    """Remove a tree. Fails if something is mounted below it."""
    assert f" {tree}/" not in Path("/proc/self/mountinfo").read_text(), (
        f"something is mounted below {tree}"
    )
    subprocess.run(["rm", "-rf", "--one-file-system", str(tree)], check=True)


def readme_unit() -> str:
    """Return the agent's unit as README.rst shows it."""
    match = re.search(
        r"^\.\. code-block:: ini\n\n((?:    .*\n|\n)+)", (PROJECT / "README.rst").read_text(), re.M
    )
    assert match
    return re.sub(r"^    ", "", match[1], flags=re.M).strip() + "\n"


class Container(Host):
    """A machine with systemd as its first process.

    Files that are put below `upper` before it boots are part of its root tree.
    """

    def __init__(self, directory: Union[str, Path], tree: Path, boot: bool = True) -> None:
        self.directory, self.tree = Path(directory).resolve(), tree
        self.upper = self.directory / "upper"
        self.state = self.upper / "var/lib/cachix-deploy"
        self.environment = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8"}
        self.user_namespace = False
        self.holder: Optional[subprocess.Popen[bytes]] = None
        self.group = ""
        self.init = 0  # the pid, for the test, of the container's systemd
        for name in ("nix", "upper", "work", "root"):
            (self.directory / name).mkdir(parents=True)
        self.write("/etc/nix/nix.conf", NIX_CONF)

    def write(self, path: str, text: str, mode: int = 0o644) -> Path:
        """Write a file into its root tree before it boots; return where the file is."""
        file = self.upper / path[1:]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)
        return file

    # --- its life ---

    def boot(self) -> None:
        """Boot the boot loader's default, and wait until systemd has started everything."""
        default = self.boot_default()
        if default is not None:
            self.write("/etc/tmpfiles.d/nixos.conf", f"L+ /run/current-system - - - - {default}\n")
        self.group = f"{control_groups()}/cachix-{uuid.uuid4().hex[:8]}"
        with open(self.directory / "console", "ab") as console:
            self.holder = subprocess.Popen(
                [*NAMESPACES, BOOT, str(self.directory), str(self.tree), self.group],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
                cwd="/",
                env={"PATH": PATH, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            )
        wait_until(self.is_up, 30, f"the container to boot: {self.directory}/console")

    def is_up(self) -> bool:
        assert self.holder is not None and self.holder.poll() is None, (
            self.directory / "console"
        ).read_text()
        processes = [child for nspawn in children(self.holder.pid) for child in children(nspawn)]
        self.init = processes[0] if processes else 0
        state = self.systemctl("is-system-running").stdout.strip() if self.init else ""
        return state in ("running", "degraded")

    def poweroff(self, timeout: float = 30.0) -> None:
        """Shut it down in order."""
        assert self.holder is not None
        self.systemctl("poweroff")
        self.holder.wait(timeout)
        self.close()

    def reboot(self) -> None:
        self.poweroff()
        self.boot()

    def close(self) -> None:
        """Kill everything that runs in it. Its disk stays; its journal is saved in `journal`."""
        if self.holder is None:
            return
        if self.holder.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                (self.directory / "journal").write_text(
                    self.run(["journalctl", "--no-pager"], 10).stdout
                )
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.init or self.holder.pid, signal.SIGKILL)
        self.holder.wait(15)
        self.holder, self.init = None, 0
        wait_until(self.clear_groups, 10, f"the control group {self.group} to be removed")

    def clear_groups(self) -> bool:
        name = os.path.basename(self.group)
        groups = [
            path for pattern in ("*", "*/*") for path in glob.glob(f"/sys/fs/cgroup/{pattern}")
        ]
        for top in [path for path in groups if os.path.basename(path) == name]:
            for place, _, _ in os.walk(top, topdown=False):
                try:
                    os.rmdir(place)
                except OSError:
                    return False
        return True

    def processes(self) -> dict[int, str]:
        """Return the command lines of its processes, by the process ids that the test sees."""
        namespace, lines = os.readlink(f"/proc/{self.init}/ns/pid"), {}
        for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/ns/pid") == namespace:
                    lines[pid] = command_line(pid)
        return lines

    # --- running things ---

    def enter(self, cwd: Union[str, Path] = "/") -> list[str]:
        return ["nsenter", "--target", str(self.init), "--all", "--"]  # `cwd` would be the test's

    def systemctl(self, *args: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run systemctl in it. Never raises for an exit status."""
        return self.run(["systemctl", *args], timeout)

    def show(self, name: str, unit: str = UNIT) -> str:
        """Return a property of a unit."""
        return self.output("systemctl", "show", f"--property={name}", "--value", unit).strip()

    def path(self, path: str) -> Path:
        if path.startswith("/nix/") or path == "/nix":
            return self.directory / path[1:]
        return Path(f"/proc/{self.init}/root") / path[1:] if self.init else self.upper / path[1:]


def children(pid: int) -> list[int]:
    """Return the process ids of a process's children."""
    try:
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    except OSError:
        return []


class ServiceMachine(Machine):
    """A container with the agent as a service, by the unit in README.rst."""

    host: Container

    def __init__(
        self,
        host: Container,
        program: Path,
        workspace: Workspace,
        name: str,
        *args: str,
        unit: str = "",
    ) -> None:
        """Prepare the container. `program` is the file that `make pyz` builds.

        `unit` is the text of another unit than README's, with all that it needs.
        """
        self.host, self.workspace, self.name = host, workspace, name
        self.unit = unit or readme_unit().replace(
            README_COMMAND, " ".join([f"agent {name} --host={workspace.url}", *args])
        )
        assert workspace.url in self.unit
        host.write(f"/etc/systemd/system/{UNIT}", self.unit)
        host.write(TOKEN_FILE, workspace.token("agent") + "\n", 0o600)
        wants = host.upper / "etc/systemd/system/multi-user.target.wants"
        wants.mkdir()
        (wants / UNIT).symlink_to(f"../{UNIT}")
        (host.upper / "usr/local/bin").mkdir(parents=True)
        shutil.copy(program, host.upper / "usr/local/bin/cachix-deploy")

    def boot(self) -> None:
        """Boot it, and wait until its agent is connected."""
        before = time.time()
        self.host.boot()
        self.wait_registered(before)

    def wait_registered(self, since: float, timeout: float = 30.0) -> None:
        """Wait until an agent has registered after `since` (seconds since the epoch)."""
        path = self.host.state / f"registered-{self.name}.json"
        wait_until(
            lambda: path.exists() and path.stat().st_mtime >= since,
            timeout,
            "the agent to register",
        )

    def main_pid(self) -> int:
        """Return the agent's process id in the container; 0 if it does not run."""
        return int(self.host.show("MainPID"))

    def switch(self, deployment_id: str) -> int:
        """Return the process id, for the test, of a deployment's switch process."""
        pids = [
            pid
            for pid, line in self.host.processes().items()
            if line.strip().endswith(f"switch {deployment_id}")
        ]
        assert len(pids) == 1, self.host.processes()
        return pids[0]

    def unit_of(self, pid: int) -> str:
        """Return the systemd unit that a process belongs to."""
        match = re.search(r"^0::(.*)$", Path(f"/proc/{pid}/cgroup").read_text(), re.M)
        assert match
        return os.path.basename(match[1])

    def stop(self) -> float:
        """Stop the service as an operator does; return how many seconds that took."""
        start = time.monotonic()
        result = self.host.systemctl("stop", UNIT)
        assert result.returncode == 0, result.stderr
        return time.monotonic() - start

    def states(self) -> dict[str, Any]:
        """Return the state, result and exit status of the service as systemd has them."""
        names = ("ActiveState", "Result", "ExecMainStatus")
        lines = self.host.output("systemctl", "show", f"--property={','.join(names)}", UNIT).split()
        return dict(line.split("=", 1) for line in lines)

    def leaks(self, token: str) -> list[str]:
        """Return where the token can be read: output of systemd, its journal, files, processes."""
        secret, places = token.encode(), []
        for argv in (
            ["systemctl", "show", "*"],
            ["systemctl", "status", "--all"],
            ["journalctl", "--no-pager"],
        ):
            places += [" ".join(argv)] if token in self.host.run(argv).stdout else []
        for path in [
            path for path in self.host.upper.rglob("*") if path.is_file() and not path.is_symlink()
        ]:
            if secret in path.read_bytes() and path != self.host.upper / TOKEN_FILE[1:]:
                places.append(str(path))
        for pid, line in self.host.processes().items():
            with contextlib.suppress(OSError):
                if token in line or secret in Path(f"/proc/{pid}/environ").read_bytes():
                    places.append(f"process {pid}: {line}")
        return places
