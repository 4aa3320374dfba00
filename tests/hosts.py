"""Machines to deploy to, several on one real machine.

A host is a directory that its processes see as their own /nix and /run, in a mount namespace that a
small process holds open. Every process of the host joins that namespace, so that all of them can be
found, and end when the host is closed or the test run itself dies. Process table, network and the
rest of the file system are those of the real machine. HOME, the XDG directories, TMPDIR and the
agent's state lie in the host's directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any, Callable, Optional, Union

PROJECT = Path(__file__).resolve().parent.parent
SYSTEM = "/nix/var/nix/profiles/system"
CURRENT_SYSTEM = "/run/current-system"
BOOT_DEFAULT = "/nix/var/boot-default"  # what the fake boot loader would boot; survives a reboot
RECORD = "/nix/var/record"  # a line for each call of an activation script; survives a reboot
NIX_CONF = """\
build-users-group =
sandbox = false
substituters =
trusted-public-keys =
experimental-features = nix-command flakes
"""
MOUNTS = """
mount --bind "$0/nix" /nix && mount --bind "$0/run" /run &&
mount --bind "$0/boot-id" /proc/sys/kernel/random/boot_id && exec "$@"
"""
# Holds the namespace until its stdin is closed, also by the death of the tests. Then it kills every
# other process in the namespace.
HOLDER = """
import os, signal, sys, time
def others():
    own = os.readlink("/proc/self/ns/mnt")
    for pid in os.listdir("/proc"):
        try:
            if pid.isdigit() and int(pid) != os.getpid():
                if os.readlink("/proc/%s/ns/mnt" % pid) == own:
                    yield int(pid)
        except OSError:
            pass
for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(name, signal.SIG_IGN)
os.write(1, b"ready\\n")
while os.read(0, 100):
    pass
end = time.monotonic() + 10
pids = list(others())
while pids and time.monotonic() < end:
    for number in (signal.SIGSTOP, signal.SIGKILL):  # none is to see another one's end
        for pid in pids:
            try:
                os.kill(pid, number)
            except OSError:
                pass
    time.sleep(0.002)
    pids = list(others())
"""


def wait_until(condition: Callable[[], Any], timeout: float = 30.0, what: str = "") -> Any:
    """Wait for a true value of `condition` and return it. Fails after thrice `timeout` seconds.

    `timeout` is enough on a quiet machine; one that runs other tests beside may stand still.
    `what` names what the test waits for, in the message of that failure.
    """
    deadline = time.monotonic() + 3 * timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {3 * timeout:.0f} s in vain for {what or condition}")
        time.sleep(0.01)


def command(name: str) -> list[str]:
    """Return a command of this project: installed beside this Python, else from the sources."""
    script = Path(sys.executable).parent / name
    if script.exists():
        return [str(script)]
    if name == "cachix-workspace":
        return [sys.executable, "-m", "cachix_workspace"]
    return [sys.executable, str(PROJECT / "cachix_deploy.py")]


def command_line(pid: int) -> str:
    """Return the command line of a process. Raises OSError if it has ended."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return b" ".join(words).decode(errors="replace")


def clean_environment(directory: Path) -> dict[str, str]:
    """Return an environment without the developer's own: HOME and the like lie in `directory`."""
    path = [str(Path(sys.executable).parent), *os.environ.get("PATH", os.defpath).split(":")]
    own = {name: str(directory / name.lower()) for name in ("HOME", "TMPDIR")}
    xdg = {
        f"XDG_{name}_HOME": str(directory / "home" / name.lower())
        for name in ("CACHE", "STATE", "CONFIG", "DATA")
    }
    names = {"USER": "root", "LOGNAME": "root", "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1"}
    for place in (*own.values(), *xdg.values()):
        os.makedirs(place, exist_ok=True)
    return {"PATH": ":".join(dict.fromkeys(part for part in path if part)), **own, **xdg, **names}


class Program:
    """A process that runs beside the test, with all its output in one file."""

    def __init__(
        self, argv: list[str], output: Path, start: Callable[..., subprocess.Popen[Any]], **kw: Any
    ) -> None:
        self.argv, self.output = argv, output
        with open(output, "ab") as file:
            self.process = start(
                argv, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, **kw
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def text(self) -> str:
        """Return everything that it has printed."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, pattern: str, timeout: float = 30.0) -> re.Match[str]:
        """Wait for output that matches; return the first match. Fails with the output."""
        deadline = time.monotonic() + timeout
        while True:
            ended = self.process.poll() is not None
            match = re.search(pattern, self.text())
            if match:
                return match
            if ended or time.monotonic() > deadline:
                status = self.process.returncode
                why = f"ended with status {status}" if ended else f"ran for {timeout:.0f} s"
                raise AssertionError(
                    f"{self.argv} {why} without printing {pattern!r}, but:\n{self.text()[-4000:]}"
                )
            time.sleep(0.005)

    def wait(self, timeout: float = 30.0) -> int:
        """Wait for its exit status (negative: the signal that ended it). Fails with the output."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self.argv} did not end in {timeout:.0f} s:\n{self.text()[-4000:]}"
            ) from None

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self, timeout: float = 12.0) -> int:
        """Send SIGTERM, and return its exit status."""
        self.process.terminate()
        return self.wait(timeout)

    def kill(self) -> int:
        """Kill this process, but not its children, and return its exit status."""
        self.process.kill()
        return self.wait()

    def catches(self, number: int) -> bool:
        """Whether it has installed a handler for a signal, which would otherwise just end it."""
        match = re.search(r"SigCgt:\s+(\w+)", Path(f"/proc/{self.pid}/status").read_text())
        return match is not None and bool(int(match[1], 16) >> (number - 1) & 1)

    def memory(self, name: str = "VmRSS") -> int:
        """Return its resident memory in bytes: now, or its peak (`VmHWM`)."""
        match = re.search(rf"{name}:\s+(\d+)", Path(f"/proc/{self.pid}/status").read_text())
        return int(match[1]) * 1024 if match else 0


class Host:
    """A machine in a directory. Use it as a context manager, or close it."""

    def __init__(self, directory: Union[str, Path]) -> None:
        self.directory = Path(directory).resolve()
        self.holder: Optional[subprocess.Popen[bytes]] = None
        self.user_namespace = os.geteuid() != 0
        nix = shutil.which("nix-store")
        if nix is None or os.path.realpath(nix).startswith("/nix/") or not os.path.isdir("/nix"):
            raise RuntimeError(
                "hosts need the directory /nix, and a Nix outside of it such as Debian's nix-bin:"
                " run `make setup`"
            )
        for name in ("nix", "run", "state", "etc"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        (self.directory / "etc/nix.conf").write_text(NIX_CONF)
        self.state = self.directory / "state"
        self.environment = {
            **clean_environment(self.directory),
            "NIX_CONF_DIR": str(self.directory / "etc"),
            "STATE_DIRECTORY": str(self.state),
        }
        self.boot()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- boot and end ---

    def boot(self) -> None:
        """Start the host, with a new boot id; the boot loader's default becomes what runs."""
        (self.directory / "boot-id").write_text(f"{uuid.uuid4()}\n")
        default = self.boot_default()
        if default is not None:
            os.symlink(default, self.path(CURRENT_SYSTEM))
        user = ["--user", "--map-root-user"] if self.user_namespace else []
        argv = ["unshare", *user, "--mount", "--propagation", "private"]
        argv += ["/bin/sh", "-c", MOUNTS, str(self.directory)]
        argv += [sys.executable, "-I", "-S", "-c", HOLDER]
        kw: dict[str, Any] = {"cwd": "/", "env": self.environment, "start_new_session": True}
        self.holder = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **kw)
        assert self.holder.stdout is not None
        if self.holder.stdout.readline() != b"ready\n":
            raise RuntimeError(
                "tests can't make mount namespaces on this machine (unshare failed, see above):"
                " run them as root, or allow unprivileged user namespaces"
            )

    def close(self) -> None:
        """Kill everything that runs in it, as a power loss would. Its disk stays whole."""
        if self.holder is None:
            return
        assert self.holder.stdin is not None and self.holder.stdout is not None
        self.holder.stdin.close()
        self.holder.wait(15)
        self.holder.stdout.close()
        self.holder = None

    def reboot(self) -> None:
        """Lose power and boot: /run is empty, except for the boot loader's default as what runs."""
        self.close()
        shutil.rmtree(self.path("/run"))
        self.path("/run").mkdir()
        self.boot()

    def processes(self) -> dict[int, str]:
        """Return the command lines of all processes in this host, by process id."""
        assert self.holder is not None
        namespace, lines = os.readlink(f"/proc/{self.holder.pid}/ns/mnt"), {}
        for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
            with contextlib.suppress(OSError):
                if pid != self.holder.pid and os.readlink(f"/proc/{pid}/ns/mnt") == namespace:
                    lines[pid] = command_line(pid)
        return lines

    def exposing(self, token: str, agent: int) -> list[str]:
        """Return the processes but for the agent whose command line or environment has a token."""
        places, lines = [], self.processes()
        for pid, line in lines.items():
            with contextlib.suppress(OSError):
                environment = token.encode() in Path(f"/proc/{pid}/environ").read_bytes()
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                # A fork of the agent has its environment until it runs another program.
                is_fork = parent == agent and line == lines.get(agent)
                if token in line or (environment and pid != agent and not is_fork):
                    places.append(f"process {pid}: {line}")
        return places

    # --- running things ---

    def enter(self, cwd: Union[str, Path] = "/") -> list[str]:
        """Return the words that, put before a command, run it in this host."""
        assert self.holder is not None
        place = f"/proc/{self.holder.pid}/ns"
        user = ["--preserve-credentials", f"--user={place}/user"] if self.user_namespace else []
        return ["nsenter", *user, f"--mount={place}/mnt", f"--wd={cwd}", "--"]

    def popen(
        self,
        argv: list[str],
        env: Optional[dict[str, str]] = None,
        cwd: Union[str, Path] = "/",
        **kw: Any,
    ) -> subprocess.Popen[Any]:
        """Start a command in the host, with `env` added to the host's environment.

        The process id is the command's own.
        """
        kw.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.Popen(
            [*self.enter(cwd), *argv], env={**self.environment, **(env or {})}, **kw
        )

    def run(
        self,
        argv: list[str],
        timeout: float = 60.0,
        env: Optional[dict[str, str]] = None,
        **kw: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the host; return its status, stdout and stderr.

        Never raises for a status. Raises subprocess.TimeoutExpired after `timeout` seconds.
        """
        process = self.popen(argv, env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(
            argv, process.returncode, out.decode(errors="replace"), err.decode(errors="replace")
        )

    def output(self, *argv: str, timeout: float = 60.0) -> str:
        """Run a command in the host and return its stdout. Fails if its status is not 0."""
        result = self.run(list(argv), timeout)
        status = result.returncode
        assert status == 0, f"{argv} ended with status {status}:\n{result.stderr}"
        return result.stdout

    def start(
        self, name: str, argv: list[str], env: Optional[dict[str, str]] = None, **kw: Any
    ) -> Program:
        """Start a program in the host. Its output goes to NAME.out in the host's directory."""
        return Program(
            argv, self.directory / f"{name}.out", lambda a, **k: self.popen(a, env, **k), **kw
        )

    def agent(
        self, name: str, url: str, token: str, *args: str, env: Optional[dict[str, str]] = None
    ) -> Program:
        """Start `cachix-deploy agent NAME ARGS` for the workspace at `url`."""
        argv = [*command("cachix-deploy"), "--host", url, "agent", name, *args]
        return self.start(f"agent-{name}", argv, {"CACHIX_AGENT_TOKEN": token, **(env or {})})

    # --- its files, from outside ---

    def path(self, path: str) -> Path:
        """Return where a path of the host is for the test."""
        own = path.startswith(("/nix/", "/run/")) or path in ("/nix", "/run")
        return self.directory / path[1:] if own else Path(path)

    def target(self, link: str) -> Optional[str]:
        """Return the store path that a link of the host leads to; None if it leads to none."""
        for _ in range(40):
            directory = os.path.dirname(link)
            if directory == "/nix/store":
                return link
            try:
                link = os.path.normpath(os.path.join(directory, os.readlink(self.path(link))))
            except OSError:
                return None
        return None

    def running(self) -> Optional[str]:
        """Return the system that a NixOS or nix-darwin host runs."""
        return self.target(CURRENT_SYSTEM)

    def profile(self, profile: str = SYSTEM) -> Optional[str]:
        """Return the store path that a profile points at."""
        return self.target(profile)

    def current_home(self) -> Optional[str]:
        """Return the home-manager generation whose activation ended last."""
        state = self.environment["XDG_STATE_HOME"]
        return self.target(f"{state}/home-manager/gcroots/current-home")

    def home_profile(self) -> str:
        """Return the profile in which home-manager keeps its generations on this host."""
        own = Path(self.environment["XDG_STATE_HOME"], "nix/profiles")
        directory = str(own) if own.is_dir() else "/nix/var/nix/profiles/per-user/root"
        return f"{directory}/home-manager"

    def generations(self, profile: str = SYSTEM) -> dict[int, str]:
        """Return the store paths of a profile's generations, by their numbers."""
        directory, name = os.path.split(profile)
        pattern = re.compile(rf"{re.escape(name)}-(\d+)-link")
        matches = map(pattern.fullmatch, os.listdir(self.path(directory)))
        return {
            int(match[1]): os.readlink(self.path(f"{directory}/{match[0]}"))
            for match in matches
            if match
        }

    def boot_default(self) -> Optional[str]:
        """Return the system that would boot now."""
        return self.target(BOOT_DEFAULT)

    def record(self) -> list[tuple[str, str]]:
        """Return the calls of activation scripts so far, in order: (action, store path)."""
        try:
            text = self.path(RECORD).read_text()
        except FileNotFoundError:
            return []
        return [tuple(line.split(" ", 1)) for line in text.splitlines()]  # type: ignore[misc]

    def journal(self, deployment_id: str) -> dict[str, Any]:
        """Return the journal of a deployment as it is on disk."""
        text = (self.state / "deployments" / deployment_id / "journal.json").read_text()
        return json.loads(text)  # type: ignore[no-any-return]

    def step(self, deployment_id: str) -> str:
        """Return the step of a deployment; empty if it has no journal (yet)."""
        with contextlib.suppress(OSError, ValueError):
            return str(self.journal(deployment_id).get("step", ""))
        return ""

    def valid(self, path: str) -> bool:
        """Whether a store path is valid for Nix, so that not just its files exist."""
        return self.run(["nix-store", "--check-validity", path]).returncode == 0

    # --- preparing it ---

    def fetch(self, url: str, key: str, *paths: str) -> None:
        """Download closures without an agent."""
        options = ["--option", "substituters", url, "--option", "trusted-public-keys", key]
        options += ["--option", "narinfo-cache-negative-ttl", "0", "--max-jobs", "8"]
        self.output("nix-store", "--realise", *paths, *options)

    def install(self, url: str, key: str, path: str, profile: str = SYSTEM) -> None:
        """Make a NixOS system, nix-darwin system or plain path run as if it always had."""
        self.fetch(url, key, path)
        self.path(os.path.dirname(profile)).mkdir(parents=True, exist_ok=True)
        self.output("nix-env", "--profile", profile, "--set", path)
        for kind, link in (
            ("nixos-version", BOOT_DEFAULT),
            ("nixos-version", CURRENT_SYSTEM),
            ("darwin-version", CURRENT_SYSTEM),
        ):
            if os.path.lexists(self.path(path) / kind):
                self.path(link).unlink(missing_ok=True)
                os.symlink(path, self.path(link))


def kill_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process that leads a session, and its whole process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
