"""The agent at rest: its memory, its wake-ups, and the size of dist/cachix-deploy.pyz.

Memory is PSS, in which processes share what they have in common: an agent alone on its Python has
some MiB more of that than one beside others. With the Python of `make bench` it is not alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import threading
import time
from pathlib import Path

from _figures import Light, directory, figure, say
from _programs import PYZ, ways
from caches import Cache
from closures import plain
from hosts import Host
from peer import Gone

SECONDS = 60.0
SERVER_PINGS = 25.0  # seconds between two pings of our workspace
MEMORY, AFTER_DEPLOYMENT = 12.0, 16.0  # MiB
WAKE_UPS = 4.0  # a minute
REST = 3.0  # seconds until an agent is at rest


def wake_ups(host: Host) -> int:
    """Return how often a processor has run any thread of the agents of a host so far."""
    total = 0
    for pid in host.processes():
        for status in Path(f"/proc/{pid}/task").glob("*/status"):
            with contextlib.suppress(OSError):
                counts = re.findall(r"voluntary_ctxt_switches:\s+(\d+)", status.read_text())
                total += sum(map(int, counts))
    return total


def memory(host: Host) -> float:
    """Return the PSS of all processes of a host in MiB, once they are at rest."""
    time.sleep(REST)
    return sum(map(pss, host.processes()))


def say_why(words: list[str]) -> None:
    """Print how much of that a Python has by itself, and with the libraries of an agent."""
    texts = []
    environment = {**os.environ, **({"PYTHONPATH": str(PYZ)} if str(PYZ) in words else {})}
    for what, names in (("Python alone", "time"), ("with websocket-client", "time, websocket")):
        code = f"import {names}; print(flush=True); time.sleep(60)"
        argv = [words[0], "-c", code]
        with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE) as program:
            assert program.stdout is not None
            program.stdout.readline()
            texts.append(f"{what} {pss(program.pid):.1f} MiB")
            program.kill()
    say(f"  missed because of: {', '.join(texts)}")


def pss(pid: int) -> float:
    """Return the PSS of a process in MiB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.findall(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)[0]) / 1024


def keep_pinging(light: Light, stop: threading.Event) -> None:
    """Ping the agent as our workspace does."""
    while not stop.wait(SERVER_PINGS):
        with contextlib.suppress(Gone, AssertionError):
            light.agent(1).send("ping")


def measure(host: Host, light: Light, way: str, words: list[str], path: str) -> None:
    """Print the figures of an agent."""
    argv = [*words, f"--host={light.url}", "agent", "bench"]
    agent = host.start("bench", argv, {"CACHIX_AGENT_TOKEN": "bench"})
    agent.wait_for("is connected to")
    if not figure(f"at rest, {way}: PSS", memory(host), "MiB", MEMORY):
        say_why(words)
    before = wake_ups(host)
    time.sleep(SECONDS)
    count = 60 * (wake_ups(host) - before) / SECONDS
    figure(f"at rest, {way}: wake-ups of all threads", count, "a minute", WAKE_UPS)
    light.time(path)
    figure(f"after a deployment, {way}: PSS", memory(host), "MiB", AFTER_DEPLOYMENT)
    agent.stop()
    (host.directory / "bench.out").unlink()


def main() -> None:
    stop = threading.Event()
    with directory() as place, Light() as light:
        cache = Cache(place / "cache")
        light.cache = cache.wire()
        path = plain(cache, 1)
        threading.Thread(target=keep_pinging, args=(light, stop), name="pings", daemon=True).start()
        for way, words in ways(place / "venv").items():
            with Host(place / "host") as host:
                measure(host, light, way, words, path)
        stop.set()
        cache.close()
    if PYZ.exists():
        size = PYZ.stat().st_size / 1024
        say(f"dist/cachix-deploy.pyz, the agent and the CI command in one file: {size:.0f} KiB")


if __name__ == "__main__":
    main()
