"""A fleet: what idle agents cost, how fast all come back, and how fast a deployment reaches them.

The clients have a process of their own, beside a bare server that only has a selector. The table
shows how the cost grows.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from _figures import figure, say
from workspace_support import Server

HERE = Path(__file__).resolve().parent
SIZES = tuple(map(int, os.environ.get("FLEET", "1000,3000,10000").split(",")))
LONG = 120.0  # seconds for anything
REST = 15.0  # seconds of which the time at rest is measured
PATH = f"/nix/store/{'a' * 32}-system"
FRAME = 520  # bytes of a Deployment, about


class Child:
    """A program of this directory that takes lines and answers with lines."""

    def __init__(self, name: str) -> None:
        argv = [sys.executable, str(HERE / name)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True)

    def ask(self, line: str) -> str:
        """The answer to a line."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.read()

    def read(self) -> str:
        """The next line."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def do(self, **command: Any) -> dict[str, Any]:
        """The answer to a command."""
        return dict(json.loads(self.ask(json.dumps(command))))

    def until(self, count: int, texts: int = 1) -> dict[str, Any]:
        """Wait until the newest `count` clients have had so many texts; how they are."""
        end = time.monotonic() + LONG
        while True:
            state = self.do(do="state", count=count, texts=texts)
            if state["at_least"] >= count or time.monotonic() > end:
                return state
            time.sleep(0.2)

    def end(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True)
class Usage:
    """What a process uses: MiB of memory, threads, seconds of CPU."""

    memory: float
    threads: int
    cpu: float

    @classmethod
    def of(cls, pid: int) -> Usage:
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks = sum(map(int, stat[11:13])) / os.sysconf("SC_CLK_TCK")
        return cls(int(status["VmRSS"].split()[0]) / 1024, int(status["Threads"]), ticks)


def worker_of(server: Server) -> int:
    """The server's worker."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    return int(children.read_text().split()[0])


@contextlib.contextmanager
def serving(most: int) -> Iterator[Server]:
    """A server for so many agents, all from one address."""
    with tempfile.TemporaryDirectory() as place:
        more = [f"--max-connections={most * 3 // 2 + 2000}"] if most > 10_000 else []
        options = ("--max-per-address=0", *more)
        server = Server(Path(place, "data"), *options)
        server.argv[server.argv.index("--listen=127.0.0.1:0")] = f"--listen=127.0.0.1:{server.port}"
        try:
            yield server
        finally:
            with contextlib.suppress(ProcessLookupError):
                server.kill()


@contextlib.contextmanager
def child(name: str) -> Iterator[Child]:
    one = Child(name)
    try:
        yield one
    finally:
        one.end()


def p99(values: list[float]) -> float:
    """The value that 99 of 100 do not exceed."""
    return statistics.quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Row:
    """What a fleet of some size costs."""

    agents: int
    first: float  # seconds until all had registered, each for the first time
    again: float  # after a restart
    refused: int
    memory: float
    threads: int
    rest: float  # per cent of a core
    posted: float  # seconds of the order
    reached: float  # p99 of the seconds until a deployment has come
    cpu: float  # seconds of CPU that this took
    bare_memory: float
    bare_reached: float


def measure(agents: int) -> Row:
    """Measure a fleet of this size."""
    bare_memory, bare_reached = measure_bare(agents)
    with serving(agents) as server, child("_crowd.py") as crowd:
        token, ci = server.token("agent"), server.token("activate")
        began = time.monotonic()
        place = {"port": server.port, "token": token, "paths": ["/ws"]}
        crowd.do(do="add", first=0, count=agents, **place)
        first = max(crowd.until(agents)["moments"]) - began
        again, refused = restart(server, crowd, agents)
        time.sleep(3)
        before = Usage.of(worker_of(server))
        time.sleep(REST)
        after = Usage.of(worker_of(server))
        rest = (after.cpu - before.cpu) / REST * 100
        posted, reached = deploy(server, crowd, agents, ci)
        cpu = Usage.of(worker_of(server)).cpu - after.cpu
    idle = (after.memory, after.threads, rest)
    bare = (bare_memory, bare_reached)
    return Row(agents, first, again, refused, *idle, posted, reached, cpu, *bare)


def restart(server: Server, crowd: Child, agents: int) -> tuple[float, int]:
    """Restart; the seconds until all agents are back, and how many were refused meanwhile."""
    crowd.do(do="forget")
    server.stop()
    server.start()
    began = time.monotonic()
    state = crowd.until(agents)
    refused = [each for each in state["refused"] if each.startswith("HTTP")]
    assert len(state["moments"]) == agents, f"{len(state['moments'])} of {agents} are back"
    return max(state["moments"]) - began, len(refused)


def deploy(server: Server, crowd: Child, agents: int, token: str) -> tuple[float, float]:
    """Order a deployment for all; the seconds until that is done, and p99 until they hear of it."""
    crowd.do(do="forget")
    spec = {"agents": {f"agent-{number}": PATH for number in range(agents)}}
    header = {"Authorization": f"Bearer {token}"}
    began = time.monotonic()
    url = f"{server.url}/api/v2/deploy/activate"
    answer = requests.post(url, json=spec, headers=header, timeout=LONG)
    posted = time.monotonic() - began
    assert answer.status_code == 200, answer.text[:300]
    moments = crowd.until(agents)["moments"]
    assert len(moments) == agents, f"{len(moments)} of {agents} heard of it"
    return posted, p99([moment - began for moment in moments])


def measure_bare(agents: int) -> tuple[float, float]:
    """The memory of a bare server with so many clients, and p99 until a text has reached them."""
    with child("_echo.py") as echo, child("_crowd.py") as crowd:
        place = {"port": int(echo.read()), "token": "x" * 43, "paths": ["/ws"]}
        crowd.do(do="add", first=0, count=agents, **place)
        end = time.monotonic() + LONG
        while crowd.do(do="state", count=agents)["open"] < agents and time.monotonic() < end:
            time.sleep(0.1)
        memory = Usage.of(echo.process.pid).memory
        began = float(echo.ask(str(FRAME)))
        return memory, p99([moment - began for moment in crowd.until(agents)["moments"]])


def report(rows: list[Row]) -> None:
    """Print the table, and the goals that are for these sizes."""
    say(
        "agents  first s  again s  refused  MiB  threads  rest %  posted s  p99 s"
        "  cpu s   bare: MiB  p99 s"
    )
    for row in rows:
        say(
            f"{row.agents:6}  {row.first:7.1f}  {row.again:7.1f}  {row.refused:7}"
            f"  {row.memory:3.0f}  {row.threads:7}  {row.rest:6.1f}  {row.posted:8.2f}"
            f"  {row.reached:5.2f}  {row.cpu:5.2f}  {row.bare_memory:10.0f}"
            f"  {row.bare_reached:5.2f}"
        )
    for row in rows:
        if row.agents >= 10_000:
            figure(f"memory of {row.agents} idle agents", row.memory, "MiB", 300)
            figure(f"threads with {row.agents} idle agents", row.threads, "", 64)
            figure(f"{row.agents} agents at rest", row.rest, "% of a core", 3)
            figure(f"{row.agents} agents registered for the first time", row.first, "s", 30)
            figure(f"{row.agents} agents back after a restart", row.again, "s", 30)
            figure(f"of them refused at first: {row.refused}", row.refused, "", 0.5)
            figure(f"a deployment to {row.agents} agents, p99", row.reached, "s", 3)
        elif row.agents == 1000:
            figure("a deployment to 1000 agents, p99", row.reached, "s", 0.5)


def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    report([measure(agents) for agents in SIZES])


if __name__ == "__main__":
    main()
