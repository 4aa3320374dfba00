"""A machine on which programs misbehave on demand, and a record of what happens on it.

Small scripts, first in PATH, stand between the agent and the real programs. Each of them, and each
activation script of the closures in `scenes.py`, tells the test where it is (a *visit*) and does
what the test answers: go on, exit with a status, hang, kill its parent. The test may do something
itself before it answers: kill the switch process, the agent or both, cut the power. All other parts
are real.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Optional, Union

from caches import Files
from disk import Disk
from hosts import CURRENT_SYSTEM, Host, Program, wait_until
from live import Workspace
from machines import FINAL

WAITS = {
    "unit_recheck": 0.2,
    "retry": 0.05,
    "backoff": 0.05,
    "slowest": 0.3,
    "ready": 1.5,
    "download": 5.0,
    "tail": 0.05,
}
OPTIONS = ("--activation-timeout=5", "--confirm-timeout=10")
ALWAYS = 1 << 30
UNKNOWN = "?"  # instead of a step
CHANGES = (
    "test",
    "boot",
    "activate",
    "nix-env",
    "reboot",
)  # change the machine, so only one at a time
VISIT = """#!/bin/sh
answer=$NIX_FAULTS/answer.$$
mkfifo "$answer" || exit 0
printf '%s\\n' "$$ $PPID $*" >"$NIX_FAULTS/visits"
read -r order number <"$answer"
rm -f "$answer"
case $order in
exit) exit "$number" ;;
hang) exec sleep 3600 ;;
linger) sleep "$number" ;;
die) kill -9 "$PPID" ;;
esac
exit 0
"""
WRAPPER = """#!/bin/sh
visit {name} "$*" || exit $?
{code}
"""
CODES = {
    "nix-store": 'exec {real} "$@"',
    "nix-env": '{real} "$@"\nstatus=$?\nvisit nix-env.end "$*" || exit $?\nexit $status',
    "systemd-run": 'while [ "$1" != -- ]; do shift; done\nshift\nexec "$@"',
}
SYSTEMCTL = """#!/bin/sh
case $1 in
is-system-running) cat "$NIX_FAULTS/system" ;;
is-active) shift; for unit; do echo active; done ;;
reboot) visit reboot || exit $? ;;
esac
"""


@dataclass(frozen=True)
class Visit:
    """Where a program is: `point` is its name, with `.end` after its effect; `step` the journal's.

    `order` is what the test answered.
    """

    point: str
    argument: str
    pid: int
    session: int
    step: str
    order: str = "go"

    def __str__(self) -> str:
        return f"{self.step}: {self.point} {self.argument}".rstrip()


Reply = Union[str, Callable[["World", Visit], str]]


@dataclass
class Order:
    """The fault that meets visits whose `point argument` matches, `times` times."""

    pattern: str
    reply: Reply
    times: int = 1


@dataclass(frozen=True)
class Asked:
    """A deployment that was ordered: its path, and the path that must run if it fails."""

    id: str
    path: str
    before: Optional[str]
    operation: str = "switch"


@dataclass
class World:
    """A host with an agent at a workspace. `url` is that of a proxy, if there is one."""

    directory: Path
    workspace: Workspace
    name: str
    kind: str = "nixos"
    url: str = ""
    args: tuple[str, ...] = OPTIONS
    power: bool = True  # the host's disk can lose power
    waits: dict[str, float] = field(default_factory=lambda: dict(WAITS))

    def __post_init__(self) -> None:
        self.visits: list[Visit] = []
        self.orders: list[Order] = []
        self.asked: list[Asked] = []
        self.overlaps: list[str] = []
        self.problems: list[str] = []  # of the harness itself
        self.agents: list[Program] = []
        self.lost: set[str] = set()  # deployments whose state the test has damaged
        self.by_hand: set[str] = set()  # deployments that no workspace knows
        self.blind = False  # the step on disk is not to be trusted for now
        self.cuts = 0
        self.faults = self.directory / "faults"
        self.faults.mkdir(parents=True)
        storage = self.directory / "disk"  # what a power loss may affect
        self.disk = Disk(self.directory / "disk.img", storage) if self.power else None
        place = self.directory / "host"
        place.mkdir()
        for name in ("nix", "state", "home"):
            (storage / name).mkdir(parents=True, exist_ok=True)
            (place / name).symlink_to(storage / name)
        self.host = Host(place)
        self._write_programs()
        self.token = self.workspace.token("agent")
        os.mkfifo(self.faults / "visits")
        self._fifo = os.open(self.faults / "visits", os.O_RDWR)
        self._closing = False
        self._queue: queue.SimpleQueue[Optional[tuple[int, Visit]]] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=target, name="driver", daemon=True)
            for target in (self._listen, self._drive)
        ]
        for thread in self._threads:
            thread.start()
        self.came_up()

    def _write_programs(self) -> None:
        """Write the scripts that stand in front of the real programs."""
        programs = self.faults / "bin"
        programs.mkdir()
        texts = {"visit": VISIT, "systemctl": SYSTEMCTL}
        for name, code in CODES.items():
            texts[name] = WRAPPER.format(name=name, code=code.format(real=shutil.which(name)))
        for name, text in texts.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        (self.faults / "system").write_text("running\n")
        self.host.environment["PATH"] = f"{programs}:{self.host.environment['PATH']}"
        self.host.environment["NIX_FAULTS"] = str(self.faults)
        self.host.environment["CACHIX_DEPLOY_WAITS"] = json.dumps(self.waits)

    def close(self) -> None:
        """Kill everything on the machine, and remove its disk."""
        self._closing = True
        self.host.close()
        os.write(self._fifo, b"\n")
        for thread in self._threads:
            thread.join(10)
        os.close(self._fifo)
        if self.disk is not None:
            self.disk.close()

    @property
    def files(self) -> Files:
        return self.workspace.files

    @property
    def agent(self) -> Program:
        return self.agents[-1]

    # --- boots, kills and power losses ---

    def came_up(self) -> None:
        """Provide what is there after each boot: systemd, and on macOS what launchd has run."""
        self.host.path("/run/systemd/system").mkdir(parents=True, exist_ok=True)
        (self.faults / "system").write_text("running\n")
        profile = self.host.profile()
        if self.kind == "darwin" and profile and self.host.running() is None:
            os.symlink(profile, self.host.path(CURRENT_SYSTEM))

    def start(self) -> Program:
        """Start an agent, as the machine's init would."""
        url = self.url or self.workspace.url
        self.agents.append(self.host.agent(self.name, url, self.token, *self.args))
        return self.agent

    def connected(self) -> None:
        """Wait until the newest agent is connected."""
        wait_until(
            lambda: self.agent.text().count("is connected to") > 0,
            30,
            f"a connection: {self.agent.output}",
        )

    def switches(self) -> list[int]:
        """Return the process ids of the switch processes."""
        return [
            pid
            for pid, line in self.host.processes().items()
            if re.search(r" switch [0-9a-f-]{36}\s*$", line)
        ]

    def descendants(self, pids: list[int]) -> list[int]:
        """Return these processes and all their running descendants."""
        family = list(pids)
        while True:
            children = [
                pid for pid in self.host.processes() if pid not in family and _parent(pid) in family
            ]
            if not children:
                return family
            family += children

    def kill(self, switch: bool = False, agent: bool = False) -> None:
        """Kill the switch processes, the agent or both. A killed agent is replaced by a new one."""
        switches = self.switches() if switch else []
        lines = self.host.processes()
        starters = [pid for pid in switches if "systemd-run --scope" in lines.get(pid, "")]
        switches += self.descendants(starters)[len(starters) :]  # the real one has no children
        # The agent first: it must not see the end of the switch process.
        pids = [*([self.agent.pid] if agent else []), *switches]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(map(_runs, pids)), 10, "killed processes to end")
        if agent:
            self.agent.wait()
            self.start()

    def lose_power(self) -> None:
        """Cut the power and boot: unsynced data is gone, and the boot loader's default runs."""
        self.cuts += 1
        self.host.close()
        if self.disk is not None:
            self.disk.lose_power()
        shutil.rmtree(self.host.path("/run"))
        self.host.path("/run").mkdir()
        self.host.boot()
        self.came_up()
        self.start()

    def shut_down(self) -> None:
        """Shut down as systemd does: SIGTERM to all, after a while SIGKILL. Then boot again."""
        (self.faults / "system").write_text("stopping\n")
        for number, patience in ((signal.SIGTERM, 9.0), (signal.SIGKILL, 5.0)):
            for pid in self.host.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            deadline = time.monotonic() + patience
            while self.host.processes() and time.monotonic() < deadline:
                time.sleep(0.01)
        self.agent.wait(5)
        self.host.reboot()
        self.came_up()
        self.start()

    def separate_state(self, size: str) -> None:
        """Give the state a small disk of its own, before an agent starts. Needs root."""
        self.host.close()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(self.host.state.resolve())],
            check=True,
        )
        self.host.reboot()
        self.came_up()

    # --- orders ---

    def order(self, pattern: str, reply: Reply, times: int = 1) -> Order:
        """Misbehave at visits whose `point argument` matches; the latest order counts."""
        order = Order(pattern, reply, times)
        self.orders.insert(0, order)
        return order

    def heal(self) -> None:
        """Drop all orders."""
        self.orders.clear()

    def _listen(self) -> None:
        """Queue the visits, each with its step, also while the driver is busy."""
        buffer = b""
        while not self._closing:
            buffer += os.read(self._fifo, 1 << 16)
            *lines, buffer = buffer.split(b"\n")
            for line in filter(None, lines):
                helper, pid, rest = line.decode().split(" ", 2)
                point, _, argument = rest.partition(" ")
                step = self.step(_switch_of(int(pid)))
                visit = Visit(point, argument, int(pid), _session(int(helper)), step)
                self._queue.put((int(helper), visit))
        self._queue.put(None)

    def _drive(self) -> None:
        for helper, visit in iter(self._queue.get, None):
            try:
                self._receive(helper, visit)
            except Exception as error:  # the invariants report it
                self.problems.append(f"{visit}: {type(error).__name__}: {error}")

    def _receive(self, helper: int, visit: Visit) -> None:
        self._look_for_overlap(visit)
        text = f"{visit.point} {visit.argument}"
        order = next((o for o in self.orders if o.times > 0 and re.search(o.pattern, text)), None)
        reply = "go"
        # A program that was killed while it waited for its turn meets no fault.
        if order is not None and _runs(helper):
            order.times -= 1
            reply = order.reply if isinstance(order.reply, str) else order.reply(self, visit)
        if order is not None and isinstance(order.reply, str):
            self.visits.append(replace(visit, order=order.reply))
        else:
            self.visits.append(replace(visit, order=reply))
        self._answer(helper, reply)

    def _answer(self, helper: int, reply: str) -> None:
        path = self.faults / f"answer.{helper}"
        deadline = time.monotonic() + 10
        while _runs(helper) and time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # the script does not read yet
                fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
                os.write(fd, f"{reply}\n".encode())
                os.close(fd)
                return
            time.sleep(0.0005)
        path.unlink(missing_ok=True)

    def _look_for_overlap(self, visit: Visit) -> None:
        """Record if two programs change the machine at once, unless one has started the other."""
        if visit.point not in CHANGES:
            return
        earlier = {past.session for past in self.visits if past.point in CHANGES} - {visit.session}
        earlier = {session for session in earlier if not self._has_ended(session)}
        for session in earlier & _sessions() if earlier else ():
            self.overlaps.append(f"{visit} began while {self._last_visit(session)} ran")

    def _last_visit(self, session: int) -> str:
        return str(next(past for past in reversed(self.visits) if past.session == session))

    def _has_ended(self, session: int) -> bool:
        """Whether a program has reported its end and may go on: it has nothing more to do then."""
        visits = [visit for visit in self.visits if visit.session == session]
        return visits[-1].point == f"{visits[0].point}.end" and visits[-1].order == "go"

    def step(self, deployment: str = "*") -> str:
        """Return the step in the journal of a deployment, or in the newest journal."""
        if self.blind:
            return UNKNOWN
        newest, newest_time = "", 0.0
        with contextlib.suppress(OSError):
            for path in self.host.state.glob(f"deployments/{deployment}/journal.json"):
                with contextlib.suppress(OSError, ValueError):
                    record = json.loads(path.read_bytes())
                    moment = max(record["times"].values())
                    if moment > newest_time:
                        newest, newest_time = record["step"], moment
        return newest

    # --- deployments ---

    def install(self, path: str) -> None:
        """Make the machine run a path as if it always had."""
        self.workspace.push(path)
        self.host.install(self.workspace.cache_url, self.files.key.public, path)
        os.sync() if self.disk is None else os.system(f"sync -f {self.disk.directory}")
        self.visits.clear()

    def deploy(self, path: str, script: Optional[str] = None, **options: str) -> str:
        """Push and order a deployment. Returns its id."""
        self.workspace.push(path, *([script] if script else []))
        deployment = self.workspace.deploy(self.name, path, script, **options)
        operation = options.get("operation", "switch")
        self.asked.append(Asked(deployment, path, self.running(), operation))
        return deployment

    def running(self) -> Optional[str]:
        """Return the path that the machine runs, by its kind."""
        if self.kind == "home_manager":
            return self.host.current_home()
        return self.host.profile() if self.kind == "plain" else self.host.running()

    def profile(self) -> Optional[str]:
        """Return the path that the profile of the machine's kind points at."""
        if self.kind == "home_manager":
            return self.host.profile(self.host.home_profile())
        return self.host.profile()

    def ended(self, deployment: str, timeout: float = 60.0) -> str:
        """Wait until a deployment has ended, also at the workspace. Returns its last step."""
        # Reads files first: many requests to the workspace would slow down all other tests.
        if deployment not in self.lost:
            wait_until(
                lambda: self.host.step(deployment) in FINAL,
                timeout,
                f"the end of {deployment} in its journal",
            )
            wait_until(
                lambda: self.is_reported(deployment), 30, f"the whole report of {deployment}"
            )
        self.workspace.wait(deployment, timeout)
        return self.host.step(deployment)

    def is_reported(self, deployment: str) -> bool:
        """Whether the workspace has acknowledged the whole log and the final report."""
        path = self.host.state / "deployments" / deployment / "reported.json"
        with contextlib.suppress(OSError, ValueError):
            reported = json.loads(path.read_bytes())
            return bool(reported["logged"] and reported["ended"])
        return False

    def chain(self) -> list[str]:
        """Return the calls so far, each with its step; store paths are shortened to versions."""
        return [re.sub(r"/nix/store/\S+-(\w+)(?=\s|$)", r"\1", str(visit)) for visit in self.visits]

    def story(self) -> str:
        """Return the calls so far in short, a line for each step.

        A fault or another download also begins a line. Each call is followed by the test's answer,
        unless that was `go`. Calls of Nix that change nothing are left out.
        """
        lines: list[list[str]] = []
        begin, last = True, ""
        for text, visit in zip(self.chain(), self.visits):
            words = _short(text.partition(": ")[2])
            if not words:
                continue
            point, _, argument = words.partition(" ")
            if point.endswith(".end"):
                if visit.order == "go":
                    continue
                words = f"{point[:-4]} {argument} (done)"
            if begin or visit.step != last or point == "download":
                lines.append([f"{visit.step}: "])
            lines[-1].append(words if visit.order == "go" else f"{words} -> {visit.order}")
            begin, last = visit.order != "go", visit.step
        return "\n".join(head + ", ".join(calls) for head, *calls in lines)

    def leaks(self) -> list[str]:
        """Return where the token can be read: files, processes, output of agents."""
        secret, places = self.token.encode(), []
        for top in ("state", "home", "run", "nix/var"):
            for path in (self.host.directory / top).resolve().rglob("*"):
                with contextlib.suppress(FileNotFoundError):  # it was just replaced
                    if path.is_file() and not path.is_symlink() and secret in path.read_bytes():
                        places.append(str(path))
        places += self.host.exposing(self.token, self.agent.pid)
        places += [str(agent.output) for agent in self.agents if self.token in agent.text()]
        return places

    def journals(self) -> dict[str, dict[str, Any]]:
        """Return the journals by their deployments."""
        paths = self.host.state.glob("deployments/*/journal.json")
        return {path.parent.name: json.loads(path.read_bytes()) for path in paths}


def _short(call: str) -> str:
    """Return a call in the form of `World.story`; empty if it changes nothing."""
    if call.startswith("nix-store"):
        root = re.search(r"--realise (\w+) .*/current-home", call)
        download = re.search(r"--realise (\w+) .*--indirect --max-jobs 32", call)
        if root:
            return f"current-home {root[1]}"
        return f"download {download[1]}" if download else ""
    if call.startswith("systemd-run"):
        return ""
    call = re.sub(r"^nix-env(\.end)? .*--set ", r"set\1 ", call)
    return re.sub(r"^nix-env(\.end)? .*--switch-generation ", r"generation\1 ", call)


def _switch_of(pid: int) -> str:
    """Return the deployment whose switch process is an ancestor of a process; `*` without one."""
    while pid > 1:
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            match = re.search(rb"\0switch\0([0-9a-f-]{36})\0", line)
            if match:
                return match[1].decode()
        pid = _parent(pid)
    return "*"


def _stat(pid: int, index: int) -> str:
    """Return a field of a process' /proc/PID/stat, counted after its name; empty without one."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[index]
    return ""


def _runs(pid: int) -> bool:
    return _stat(pid, 0) not in ("", "Z", "X")


def _session(pid: int) -> int:
    return int(_stat(pid, 3) or 0)


def _parent(pid: int) -> int:
    return int(_stat(pid, 1) or 0)


def _sessions() -> set[int]:
    """Return the sessions that have a running process."""
    return {_session(pid) for pid in _pids() if _runs(pid)}


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())
