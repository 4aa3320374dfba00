"""A machine on which programs misbehave by order, and what is seen of all that happens on it.

Between the agent and the real programs stand small scripts, first in PATH. Each, and each activation script of the
closures in `scenes.py`, tells the test where it is (a *visit*) and does what the test answers: go on, end with a
status, hang, kill itself. What else the order says the test does by itself before it answers: kill the switch process,
the agent or both, cut the power. All other parts are real.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Optional, Union

from caches import Files
from disk import Disk
from hosts import CURRENT_SYSTEM, Host, Program, wait_until
from live import Workspace
from machines import FINAL

WAITS = {
    "unit_recheck": 0.2,
    "backoff": 0.05,
    "slowest": 0.3,
    "ready": 1.5,
    "download": 5.0,
    "tail": 0.05,
}
OPTIONS = ("--activation-timeout=5", "--confirm-timeout=10")
ALWAYS = 1 << 30
UNKNOWN = "?"  # instead of a step
CHANGES = ("test", "boot", "activate", "nix-env")  # programs that change the machine: one at a time
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
esac
"""


@dataclass(frozen=True)
class Visit:
    """Where a program was: `point` is its name, with `.end` when it has had its effect; `step` is the journal's."""

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
    """What is to happen where a pattern matches `point argument`, so many times."""

    pattern: str
    reply: Reply
    times: int = 1


@dataclass(frozen=True)
class Asked:
    """A deployment that was ordered: what it would bring, and what must run if it fails."""

    id: str
    path: str
    before: Optional[str]


@dataclass
class World:
    """A host with an agent at a workspace. `url` may lead there by a proxy. `kind` names the machine's."""

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
        self.lost: set[str] = set()  # deployments whose state was taken away
        self.blind = False  # for now the step on disk is not the one that was taken
        self.cuts = 0
        self.faults = self.directory / "faults"
        self.faults.mkdir(parents=True)
        self.disk = (
            Disk(self.directory / "disk.img", self.directory / "disk") if self.power else None
        )
        place = self.directory / "host"
        place.mkdir()
        for name in ("nix", "state", "home"):  # what a power loss may take
            (self.directory / "disk" / name).mkdir(parents=True, exist_ok=True)
            (place / name).symlink_to(self.directory / "disk" / name)
        self.host = Host(place)
        self._programs()
        self.token = self.workspace.token("agent")
        os.mkfifo(self.faults / "visits")
        self._fifo = os.open(self.faults / "visits", os.O_RDWR)
        self._closing = False
        self._coming: queue.SimpleQueue[Optional[tuple[int, Visit]]] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=one, name="driver", daemon=True)
            for one in (self._listen, self._drive)
        ]
        for thread in self._threads:
            thread.start()
        self.came_up()

    def _programs(self) -> None:
        """The scripts that stand in front of the real programs."""
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
        """End all."""
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

    # --- its life ---

    def came_up(self) -> None:
        """What is there after each boot: systemd."""
        self.host.path("/run/systemd/system").mkdir(parents=True, exist_ok=True)
        (self.faults / "system").write_text("running\n")
        if self.kind == "darwin" and self.host.running() is None and self.host.profile():
            os.symlink(
                str(self.host.profile()), self.host.path(CURRENT_SYSTEM)
            )  # as launchd does at boot

    def start(self) -> Program:
        """Start an agent, as the machine's init would."""
        url = self.url or self.workspace.url
        self.agents.append(self.host.agent(self.name, url, self.token, *self.args))
        return self.agent

    def connected(self) -> None:
        """Wait until the agent that was started last is connected."""
        wait_until(
            lambda: self.agent.text().count("is connected to") > 0,
            30,
            f"a connection: {self.agent.output}",
        )

    def switches(self) -> list[int]:
        """The switch processes."""
        return [
            pid
            for pid, line in self.host.processes().items()
            if re.search(r" switch [0-9a-f-]{36}\s*$", line)
        ]

    def descendants(self, pids: list[int]) -> list[int]:
        """These processes, and what they have started, as far as it runs."""
        known = list(pids)
        while True:
            more = [
                pid for pid in self.host.processes() if pid not in known and _parent(pid) in known
            ]
            if not more:
                return known
            known += more

    def kill(self, switch: bool = False, agent: bool = False) -> None:
        """SIGKILL at once; another agent is started where one was killed."""
        switches = self.switches() if switch else []
        pids = [
            *([self.agent.pid] if agent else []),
            *switches,
        ]  # else the agent would see the other one's end
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(map(_runs, pids)), 10, "killed processes to end")
        if agent:
            self.agent.wait()
            self.start()

    def lose_power(self) -> None:
        """The power goes, and comes back: what was not synced is gone, what boots is what the boot loader has."""
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
        """As systemd does it: SIGTERM to all, after a while SIGKILL; then the machine boots again."""
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
        """Give the state a small disk of its own, before the agent starts. Needs root."""
        self.host.close()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(self.host.state.resolve())],
            check=True,
        )
        self.host.reboot()
        self.came_up()

    # --- orders ---

    def order(self, pattern: str, reply: Reply, times: int = 1) -> Order:
        """Something is to happen where `point argument` matches; the latest order that matches counts."""
        made = Order(pattern, reply, times)
        self.orders.insert(0, made)
        return made

    def heal(self) -> None:
        """Nothing is to happen any more."""
        self.orders.clear()

    def _listen(self) -> None:
        """Note who comes, and in which step, whatever the driver is doing meanwhile."""
        buffer = b""
        while not self._closing:
            buffer += os.read(self._fifo, 1 << 16)
            *lines, buffer = buffer.split(b"\n")
            for line in filter(None, lines):
                helper, pid, rest = line.decode().split(" ", 2)
                point, _, argument = rest.partition(" ")
                step = self.step(_switch_of(int(pid)))
                self._coming.put(
                    (int(helper), Visit(point, argument, int(pid), _session(int(helper)), step))
                )
        self._coming.put(None)

    def _drive(self) -> None:
        for helper, visit in iter(self._coming.get, None):
            try:
                self._receive(helper, visit)
            except Exception as error:  # said by the invariants
                self.problems.append(f"{visit}: {type(error).__name__}: {error}")

    def _receive(self, helper: int, visit: Visit) -> None:
        self._look_for_overlap(visit)
        text = f"{visit.point} {visit.argument}"
        found = next((o for o in self.orders if o.times > 0 and re.search(o.pattern, text)), None)
        reply = "go"
        if found is not None and _runs(
            helper
        ):  # who was ended while it waited for its turn meets no fault
            found.times -= 1
            reply = found.reply if isinstance(found.reply, str) else found.reply(self, visit)
        named = found.reply if found is not None and isinstance(found.reply, str) else reply
        self.visits.append(
            Visit(visit.point, visit.argument, visit.pid, visit.session, visit.step, named)
        )
        self._answer(helper, reply)

    def _answer(self, helper: int, reply: str) -> None:
        path = self.faults / f"answer.{helper}"
        deadline = time.monotonic() + 10
        while _runs(helper) and time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # nobody reads yet
                fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
                os.write(fd, f"{reply}\n".encode())
                os.close(fd)
                return
            time.sleep(0.0005)
        path.unlink(missing_ok=True)

    def _look_for_overlap(self, visit: Visit) -> None:
        """At most one program that changes the machine at a time; what it starts itself is part of it."""
        if visit.point not in CHANGES:
            return
        earlier = {one.session for one in self.visits if one.point in CHANGES} - {visit.session}
        earlier = {session for session in earlier if not self._has_ended(session)}
        for session in earlier & _sessions() if earlier else ():
            self.overlaps.append(f"{visit} began while {self._begun(session)} ran")

    def _begun(self, session: int) -> str:
        return str(next(one for one in reversed(self.visits) if one.session == session))

    def _has_ended(self, session: int) -> bool:
        """Whether a program has told of its end, and was let go: it has no more to do."""
        own = [one for one in self.visits if one.session == session]
        return own[-1].point == f"{own[0].point}.end" and own[-1].order == "go"

    def step(self, deployment: str = "*") -> str:
        """What the journal of a deployment says now, or the newest one."""
        if self.blind:
            return UNKNOWN
        newest = ("", 0.0)
        with contextlib.suppress(OSError):
            for path in self.host.state.glob(f"deployments/{deployment}/journal.json"):
                with contextlib.suppress(OSError, ValueError):
                    record = json.loads(path.read_bytes())
                    newest = max(
                        newest,
                        (record["step"], max(record["times"].values())),
                        key=lambda one: one[1],
                    )
        return newest[0]

    # --- deployments ---

    def install(self, path: str) -> None:
        """Make a path what the machine has run all the time."""
        self.workspace.push(path)
        self.host.install(self.workspace.cache_url, self.files.key.public, path)
        os.sync() if self.disk is None else os.system(f"sync -f {self.disk.directory}")
        self.visits.clear()

    def deploy(self, path: str, script: Optional[str] = None) -> str:
        """Push and order a deployment; its id."""
        self.workspace.push(path, *([script] if script else []))
        deployment = self.workspace.deploy(self.name, path, script)
        self.asked.append(Asked(deployment, path, self.running()))
        return deployment

    def running(self) -> Optional[str]:
        """What the machine runs, by its kind."""
        if self.kind == "home_manager":
            return self.host.current_home()
        return self.host.profile() if self.kind == "plain" else self.host.running()

    def profile(self) -> Optional[str]:
        return (
            self.host.profile(self.host.home_profile())
            if self.kind == "home_manager"
            else self.host.profile()
        )

    def ended(self, deployment: str, timeout: float = 60.0) -> str:
        """Wait for the end of a deployment, on the machine and at the workspace; its last step."""
        if (
            deployment not in self.lost
        ):  # files first: to ask the workspace all the time would slow all other tests
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
        with contextlib.suppress(OSError, ValueError):
            told = json.loads(
                (self.host.state / "deployments" / deployment / "reported.json").read_bytes()
            )
            return bool(told["logged"] and told["ended"])
        return False

    def chain(self) -> list[str]:
        """The calls so far, each with the step in which it came; paths by their versions."""
        return [re.sub(r"/nix/store/\S+-(\w+)(?=\s|$)", r"\1", str(visit)) for visit in self.visits]

    def story(self) -> str:
        """The calls so far in short, a line for each step, which a fault or another download begins anew: what was
        begun, and what the test has answered where that was not `go`. What Nix only looks at is left out."""
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
        """Where the token can be read that must not be."""
        secret, places = self.token.encode(), []
        for top in ("state", "home", "run", "nix/var"):
            for path in (self.host.directory / top).resolve().rglob("*"):
                with contextlib.suppress(FileNotFoundError):  # it was just replaced
                    if path.is_file() and not path.is_symlink() and secret in path.read_bytes():
                        places.append(str(path))
        lines = self.host.processes()
        for pid, line in lines.items():
            with contextlib.suppress(OSError):
                environment = secret in Path(f"/proc/{pid}/environ").read_bytes()
                forked = _parent(pid) == self.agent.pid and line == lines.get(
                    self.agent.pid
                )  # runs nothing else yet
                if self.token in line or (environment and pid != self.agent.pid and not forked):
                    places.append(f"process {pid}: {line}")
        places += [str(one.output) for one in self.agents if self.token in one.text()]
        return places

    def journals(self) -> dict[str, dict[str, Any]]:
        """The journals by their deployments."""
        found = {}
        for path in self.host.state.glob("deployments/*/journal.json"):
            found[path.parent.name] = json.loads(path.read_bytes())
        return found


def _short(call: str) -> str:
    """A call as `World.story` tells it; empty for what changes nothing."""
    if call.startswith("nix-store"):
        root = re.search(r"--realise (\w+) .*/current-home", call)
        found = re.search(r"--realise (\w+) .*--indirect --max-jobs 32", call)
        return f"current-home {root[1]}" if root else f"download {found[1]}" if found else ""
    if call.startswith("systemd-run"):
        return ""
    call = re.sub(r"^nix-env(\.end)? .*--set ", r"set\1 ", call)
    return re.sub(r"^nix-env(\.end)? .*--switch-generation ", r"generation\1 ", call)


def _switch_of(pid: int) -> str:
    """The deployment whose switch process has started a process; `*` where none has."""
    while pid > 1:
        with contextlib.suppress(OSError):
            found = re.search(
                rb"\0switch\0([0-9a-f-]{36})\0", Path(f"/proc/{pid}/cmdline").read_bytes()
            )
            if found:
                return found[1].decode()
        pid = _parent(pid)
    return "*"


def _runs(pid: int) -> bool:
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def _session(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[3])
    return 0


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _sessions() -> set[int]:
    """The sessions in which something runs."""
    return {_session(pid) for pid in _pids() if _runs(pid)}


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())
