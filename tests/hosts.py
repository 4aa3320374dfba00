"""Machines to deploy to, several on one: each a directory that processes see as their own /nix and /run.

A host is a mount namespace that a small process holds open. Whatever runs in the host joins that namespace, so all of
it can be found, and ends when the host is closed or the test run itself dies. Processes, network and the rest of the
file system are those of the real machine; HOME, XDG directories, TMPDIR and the agent's state lie in its directory.
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
RECORD = "/nix/var/record"  # what activation scripts were asked, a line each; survives a reboot
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
# Holds the namespace until its stdin ends, then ends all that runs in it: also when the tests were killed.
HOLDER = """
import os, signal, sys, time
def others():
    mine = os.readlink("/proc/self/ns/mnt")
    for pid in os.listdir("/proc"):
        try:
            if pid.isdigit() and int(pid) != os.getpid() and os.readlink("/proc/%s/ns/mnt" % pid) == mine:
                yield int(pid)
        except OSError:
            pass
for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(name, signal.SIG_IGN)
os.write(1, b"ready\\n")
while os.read(0, 100):
    pass
end = time.monotonic() + 10
while time.monotonic() < end:
    found = list(others())
    if not found:
        break
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
    time.sleep(0.002)
"""


def wait_until(condition: Callable[[], Any], timeout: float = 30.0, what: str = "") -> Any:
    """The first value of `condition` that is true. Fails after `timeout` seconds, saying `what` was waited for."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout:.0f} s in vain for {what or condition}")
        time.sleep(0.01)


def command(name: str) -> list[str]:
    """A command of this project: as it is installed beside this Python, else from the source tree."""
    installed = Path(sys.executable).parent / name
    if installed.exists():
        return [str(installed)]
    module = {"cachix-workspace": ["-m", "cachix_workspace"]}.get(
        name, [str(PROJECT / "cachix_deploy.py")]
    )
    return [sys.executable, *module]


def clean_environment(directory: Path) -> dict[str, str]:
    """What a program needs that is to see nothing of the developer's own: `directory` is its home and all."""
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
        """All it has printed."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, pattern: str, timeout: float = 30.0) -> re.Match[str]:
        """The first place in the output that matches; fails with the output where none comes."""
        deadline = time.monotonic() + timeout
        while True:
            ended = self.process.poll() is not None
            found = re.search(pattern, self.text())
            if found:
                return found
            if ended or time.monotonic() > deadline:
                why = (
                    f"ended with status {self.process.returncode}"
                    if ended
                    else f"ran for {timeout:.0f} s"
                )
                raise AssertionError(
                    f"{self.argv} {why} without printing {pattern!r}, but:\n{self.text()[-4000:]}"
                )
            time.sleep(0.005)

    def wait(self, timeout: float = 30.0) -> int:
        """Its exit status (negative: the signal that ended it); fails with the output where it does not end."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self.argv} did not end in {timeout:.0f} s:\n{self.text()[-4000:]}"
            ) from None

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self, timeout: float = 12.0) -> int:
        """Ask it to end (SIGTERM); its exit status."""
        self.process.terminate()
        return self.wait(timeout)

    def kill(self) -> int:
        """End this one process, not what it has started."""
        self.process.kill()
        return self.wait()

    def catches(self, number: int) -> bool:
        """Whether it handles a signal; before that the signal just ends it."""
        found = re.search(r"SigCgt:\s+(\w+)", Path(f"/proc/{self.pid}/status").read_text())
        return found is not None and bool(int(found[1], 16) >> (number - 1) & 1)

    def memory(self, name: str = "VmRSS") -> int:
        """Bytes of memory now, or the most there ever was (`VmHWM`)."""
        found = re.search(rf"{name}:\s+(\d+)", Path(f"/proc/{self.pid}/status").read_text())
        return int(found[1]) * 1024 if found else 0


class Host:
    """A machine in a directory. Use it as a context manager, or close it."""

    def __init__(self, directory: Union[str, Path]) -> None:
        self.directory = Path(directory).resolve()
        self.holder: Optional[subprocess.Popen[bytes]] = None
        self.user_namespace = os.geteuid() != 0
        nix = shutil.which("nix-store")
        if nix is None or os.path.realpath(nix).startswith("/nix/") or not os.path.isdir("/nix"):
            raise RuntimeError(
                "hosts need the directory /nix, and a Nix outside of it such as Debian's nix-bin: `make setup`"
            )
        for name in ("nix", "run", "state", "etc"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        (self.directory / "etc/nix.conf").write_text(NIX_CONF)
        more = {
            "NIX_CONF_DIR": str(self.directory / "etc"),
            "STATE_DIRECTORY": str(self.directory / "state"),
        }
        self.environment = {**clean_environment(self.directory), **more}
        self.state = self.directory / "state"
        self.boot()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- its life ---

    def boot(self) -> None:
        """Begin to exist, with a boot id of its own and what the boot loader has as its default running."""
        (self.directory / "boot-id").write_text(f"{uuid.uuid4()}\n")
        default = self.boot_default()
        if default is not None:
            os.symlink(default, self.path(CURRENT_SYSTEM))
        user = ["--user", "--map-root-user"] if self.user_namespace else []
        argv = [
            "unshare",
            *user,
            "--mount",
            "--propagation",
            "private",
            "/bin/sh",
            "-c",
            MOUNTS,
            str(self.directory),
        ]
        argv += [sys.executable, "-I", "-S", "-c", HOLDER]
        kw: dict[str, Any] = {"cwd": "/", "env": self.environment, "start_new_session": True}
        self.holder = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **kw)
        assert self.holder.stdout is not None
        if self.holder.stdout.readline() != b"ready\n":
            raise RuntimeError(
                "this machine does not let tests make mount namespaces (unshare failed, see above)"
            )

    def close(self) -> None:
        """End all that runs in it, by SIGKILL: as a power loss would, but for what the disk holds."""
        if self.holder is None:
            return
        assert self.holder.stdin is not None and self.holder.stdout is not None
        self.holder.stdin.close()
        self.holder.wait(15)
        self.holder.stdout.close()
        self.holder = None

    def reboot(self) -> None:
        """Lose power and boot: /run is empty but for the system that the boot loader had as its default."""
        self.close()
        shutil.rmtree(self.path("/run"))
        self.path("/run").mkdir()
        self.boot()

    def processes(self) -> dict[int, str]:
        """The command lines of all that runs in this host, by process id."""
        assert self.holder is not None
        mine, found = os.readlink(f"/proc/{self.holder.pid}/ns/mnt"), {}
        for pid in [
            int(name)
            for name in os.listdir("/proc")
            if name.isdigit() and int(name) != self.holder.pid
        ]:
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/ns/mnt") == mine:
                    found[pid] = (
                        Path(f"/proc/{pid}/cmdline")
                        .read_bytes()
                        .replace(b"\0", b" ")
                        .decode(errors="replace")
                    )
        return found

    # --- running things ---

    def enter(self, cwd: Union[str, Path] = "/") -> list[str]:
        """The words in front of a command that runs in this host."""
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
        """Start a command in the host; `env` is added to the host's environment. Its pid is the command's own."""
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
        """Run a command in the host to its end; status, stdout and stderr. Never raises for a status."""
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
        """What a command prints; fails with its messages where its status is not 0."""
        done = self.run(list(argv), timeout)
        assert done.returncode == 0, f"{argv} ended with status {done.returncode}:\n{done.stderr}"
        return done.stdout

    def start(
        self, name: str, argv: list[str], env: Optional[dict[str, str]] = None, **kw: Any
    ) -> Program:
        """Start a program in the host, with its output in the file NAME.out of the host's directory."""
        return Program(
            argv, self.directory / f"{name}.out", lambda a, **k: self.popen(a, env, **k), **kw
        )

    def agent(
        self, name: str, url: str, token: str, *args: str, env: Optional[dict[str, str]] = None
    ) -> Program:
        """Start `cachix-deploy agent NAME` (`args` follow it) for the workspace at `url`."""
        argv = [*command("cachix-deploy"), "--host", url, "agent", name, *args]
        return self.start(f"agent-{name}", argv, {"CACHIX_AGENT_TOKEN": token, **(env or {})})

    # --- looking at it from outside ---

    def path(self, path: str) -> Path:
        """Where a path of the host lies for the test."""
        own = path.startswith(("/nix/", "/run/")) or path in ("/nix", "/run")
        return self.directory / path[1:] if own else Path(path)

    def target(self, link: str) -> Optional[str]:
        """The store path that a link of the host leads to; None where it leads to none."""
        for _ in range(40):
            if os.path.dirname(link) == "/nix/store":
                return link
            try:
                link = os.path.normpath(
                    os.path.join(os.path.dirname(link), os.readlink(self.path(link)))
                )
            except OSError:
                return None
        return None

    def running(self) -> Optional[str]:
        """The system that runs, of a NixOS or nix-darwin host."""
        return self.target(CURRENT_SYSTEM)

    def profile(self, profile: str = SYSTEM) -> Optional[str]:
        """The store path that a profile points at."""
        return self.target(profile)

    def current_home(self) -> Optional[str]:
        """The home-manager generation whose activation ended last."""
        return self.target(
            f"{self.environment['XDG_STATE_HOME']}/home-manager/gcroots/current-home"
        )

    def home_profile(self) -> str:
        """The profile in which home-manager keeps its generations here."""
        own = Path(self.environment["XDG_STATE_HOME"], "nix/profiles")
        return (
            str(own / "home-manager")
            if own.is_dir()
            else "/nix/var/nix/profiles/per-user/root/home-manager"
        )

    def generations(self, profile: str = SYSTEM) -> dict[int, str]:
        """The generations of a profile and their store paths."""
        directory, name = os.path.split(profile)
        found = [
            re.fullmatch(rf"{re.escape(name)}-(\d+)-link", entry)
            for entry in os.listdir(self.path(directory))
        ]
        return {
            int(match[1]): os.readlink(self.path(f"{directory}/{match[0]}"))
            for match in found
            if match
        }

    def boot_default(self) -> Optional[str]:
        """The system that would boot now."""
        return self.target(BOOT_DEFAULT)

    def record(self) -> list[tuple[str, str]]:
        """What the activation scripts were asked so far: (action, store path), in order."""
        try:
            text = self.path(RECORD).read_text()
        except FileNotFoundError:
            return []
        return [tuple(line.split(" ", 1)) for line in text.splitlines()]  # type: ignore[misc]

    def journal(self, deployment_id: str) -> dict[str, Any]:
        """The journal of a deployment as it is on disk."""
        text = (self.state / "deployments" / deployment_id / "journal.json").read_text()
        return json.loads(text)  # type: ignore[no-any-return]

    def step(self, deployment_id: str) -> str:
        """The step of a deployment; empty where it has no journal (yet)."""
        with contextlib.suppress(OSError, ValueError):
            return str(self.journal(deployment_id).get("step", ""))
        return ""

    def valid(self, path: str) -> bool:
        """Whether Nix has a store path, not only its files."""
        return self.run(["nix-store", "--check-validity", path]).returncode == 0

    # --- bringing it into a state ---

    def fetch(self, url: str, key: str, *paths: str) -> None:
        """Download closures without an agent."""
        options = [
            "--option",
            "substituters",
            url,
            "--option",
            "trusted-public-keys",
            key,
            "--max-jobs",
            "8",
        ]
        options += ["--option", "narinfo-cache-negative-ttl", "0"]
        self.output("nix-store", "--realise", *paths, *options)

    def install(self, url: str, key: str, path: str, profile: str = SYSTEM) -> None:
        """Make a NixOS system, nix-darwin system or plain path what the host has run all the time."""
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
    """End a process that leads its session, and what it has started there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
