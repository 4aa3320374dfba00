"""The start of an agent, until it is registered, and of `agent --if-stopped` and `status`.

Each way to run the program has its turn in each round: as it is installed here, so with the
system's Python, and as dist/cachix-deploy.pyz with the system's Python.
"""

from __future__ import annotations

import collections
import os
import re
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from _figures import directory, figure, say, spread
from _programs import ways
from hosts import clean_environment
from peer import Peer

ROUNDS, WARM_UPS, TRACED = 21, 2, 5
REGISTERED, QUICK = 60.0, 25.0  # ms, the targets
NAME = "bench"
IMPORT = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)")
MOST_PACKAGES = 14  # in the table of imports


@dataclass
class Times:
    """Milliseconds of several runs: by the clock, and of all processors."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def add(self, wall: float, processor: float) -> None:
        """Add a run, in seconds."""
        self.wall.append(1000 * wall)
        self.processor.append(1000 * processor)

    @property
    def middle(self) -> float:
        return statistics.median(self.wall)


class Starter:
    """Starts programs in an environment without the developer's own."""

    def __init__(self, place: Path, url: str) -> None:
        self.options = [f"--host={url}", "agent", NAME]
        self.environment = {
            **clean_environment(place),
            "STATE_DIRECTORY": str(place / "state"),
            "CACHIX_AGENT_TOKEN": "bench",
        }

    def agent(self, words: list[str]) -> tuple[subprocess.Popen[bytes], str]:
        """Start an agent; return it, and what it has printed, when it is registered."""
        argv = [*words, *self.options]
        agent = subprocess.Popen(argv, env=self.environment, stderr=subprocess.PIPE)
        assert agent.stderr is not None
        text = b""
        while b"is connected to" not in text:
            line = agent.stderr.readline()
            text += line
            assert line, f"{argv} has ended: {text.decode(errors='replace')}"
        return agent, text.decode(errors="replace")

    def register(self, words: list[str], times: Times) -> str:
        """Add the times of an agent until it is registered; return what it has printed."""
        start = time.monotonic()
        agent, text = self.agent(words)
        times.add(time.monotonic() - start, processor(agent.pid))
        end(agent)
        return text

    def run(self, argv: list[str], times: Times) -> None:
        """Add the times of a program that ends by itself."""
        start = time.monotonic()
        program = subprocess.Popen(argv, env=self.environment, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(program.pid, 0)
        program.returncode = os.waitstatus_to_exitcode(status)
        times.add(time.monotonic() - start, usage.ru_utime + usage.ru_stime)
        assert program.returncode == 0, f"{argv} ended with status {program.returncode}"


def end(agent: subprocess.Popen[bytes]) -> None:
    """Stop an agent, whatever it still prints."""
    agent.terminate()
    assert agent.stderr is not None
    with agent.stderr:
        agent.stderr.read()
    assert agent.wait(12) == 0


def processor(pid: int) -> float:
    """Return the seconds that the threads of a process have run so far."""
    files = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(file.read_text().split()[0]) for file in files) / 1e9


def say_where_the_time_goes(starter: Starter, words: list[str], bare: float) -> None:
    """Print the imports of a start, those of a package together; of several runs the quickest.

    `bare` has the milliseconds of a Python that does nothing.
    """
    runs: list[dict[str, float]] = []
    times = Times()
    for _ in range(TRACED):
        text = starter.register([words[0], "-X", "importtime", *words[1:]], times)
        run: dict[str, float] = collections.defaultdict(float)
        for microseconds, module in IMPORT.findall(text):
            package = module.partition(".")[0]
            is_ours = package == "activate" or package.startswith("cachix_")
            run["ours" if is_ours else package] += int(microseconds) / 1000
        runs.append(run)
    least = {name: min(run.get(name, 0) for run in runs) for name in runs[-1]}
    largest = sorted(least, key=lambda name: -least[name])[:MOST_PACKAGES]
    imports, total = sum(least.values()), min(times.processor)
    say(f"    Python alone {bare:.0f} ms; with -X importtime: processor {total:.0f} ms, of it")
    say(f"    imports {imports:.0f} ms: " + ", ".join(f"{n} {least[n]:.1f}" for n in largest))


def measure(starter: Starter, programs: dict[str, list[str]]) -> None:
    """Time all ways in turns, and print their figures."""
    python = programs.get("pyz", programs["installed"])[0]
    bare = {"-c pass": [python, "-c", "pass"], "-I -S -c pass": [python, "-I", "-S", "-c", "pass"]}
    quick = {"--if-stopped": [*starter.options, "--if-stopped"], "status": ["status"]}
    names = [*bare, *programs, *(f"{way}, {what}" for what in quick for way in programs)]
    times = {name: Times() for name in names}
    for number in range(WARM_UPS + ROUNDS):
        if number == WARM_UPS:
            times = {name: Times() for name in names}
        for name, argv in bare.items():
            starter.run(argv, times[name])
        for way, words in programs.items():
            starter.register(words, times[way])
        agent, _ = starter.agent(programs["installed"])
        for what, options in quick.items():
            for way, words in programs.items():
                starter.run([*words, *options], times[f"{way}, {what}"])
        end(agent)
    say(f"start, ms, median (quartiles) of {ROUNDS} rounds, then processor time")
    for name, taken in times.items():
        say(f"  {name}: {spread(taken.wall)}; {spread(taken.processor)}")
    for way, words in programs.items():
        figure(f"  start to registered, {way}", times[way].middle, "ms", REGISTERED)
        say_where_the_time_goes(starter, words, min(times["-c pass"].processor))
    for what in quick:
        for way in programs:
            name = f"{way}, {what}"
            if not figure(f"  {what} where an agent runs, {way}", times[name].middle, "ms", QUICK):
                used, alone = times[name].processor, times["-c pass"].processor
                say(
                    f"    missed because of: processor {statistics.median(used):.0f} ms,"
                    f" of it Python alone {statistics.median(alone):.0f} ms"
                )


def main() -> None:
    with directory() as place, Peer() as peer:
        measure(Starter(place / "home", peer.url), ways(place / "venv"))


if __name__ == "__main__":
    main()
