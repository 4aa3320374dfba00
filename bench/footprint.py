"""The agent at rest: its memory, its wake-ups, and the size of dist/cachix-deploy.pyz."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from pathlib import Path

from _figures import Light, directory, figure, say
from caches import Cache
from closures import plain
from hosts import PROJECT, Host, Program
from peer import Gone

MIB = 1 << 20
SECONDS = 60.0
PYZ = PROJECT / "dist" / "cachix-deploy.pyz"
SERVER_PINGS = 25.0  # seconds between two pings of our workspace


def wake_ups(pid: int) -> int:
    """Return how often a processor has run the threads of a process so far."""
    total = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        with contextlib.suppress(OSError):
            counts = re.findall(r"voluntary_ctxt_switches:\s+(\d+)", status.read_text())
            total += sum(map(int, counts))
    return total


def keep_pinging(light: Light, stop: threading.Event) -> None:
    """Ping the agent as our workspace does."""
    while not stop.wait(SERVER_PINGS):
        with contextlib.suppress(Gone, AssertionError):
            light.agent(1).send("ping")


def resident(agent: Program) -> float:
    """Return its resident memory in MiB, once it is at rest."""
    time.sleep(1.5)
    return agent.memory() / MIB


def main() -> None:
    stop = threading.Event()
    with directory() as place, Host(place / "host") as host, Light() as light:
        cache = Cache(place / "cache")
        light.cache = cache.wire()
        path = plain(cache, 1)
        agent = host.agent("rest", light.url, "bench", "bench")
        agent.wait_for("is connected to")
        threading.Thread(target=keep_pinging, args=(light, stop), name="pings", daemon=True).start()
        figure("agent at rest, resident before its first report", resident(agent), "MiB", 22)
        light.time(path)
        figure("agent at rest, resident after a deployment", resident(agent), "MiB", 32)
        before = wake_ups(agent.pid)
        time.sleep(SECONDS)
        count = wake_ups(agent.pid) - before
        figure("agent at rest, wake-ups of all its threads", count, "a minute", 10)
        stop.set()
        agent.stop()
        cache.close()
    if PYZ.exists():
        size = PYZ.stat().st_size / 1024
        say(f"dist/cachix-deploy.pyz, the agent and the CI command in one file: {size:.0f} KiB")


if __name__ == "__main__":
    main()
