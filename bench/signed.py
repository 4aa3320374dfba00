"""The cost of deployment keys: an agent that wants signatures, and one that does not."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any, Optional

from _figures import Light, directory, figure, say, spread
from caches import Cache
from closures import plain
from hosts import Host

from cachix_signed import SecretKey, Statement, plain_host

ROUNDS, WARM_UPS = 31, 3
TARGET = 15.0  # percent more time: for two checks, and a note that is written durably
KEY = SecretKey("ci-1", b"c" * 32)


class Signed(Light):
    """A workspace whose CI signs for the agent `signed`."""

    def __init__(self) -> None:
        super().__init__()
        self.sequence = itertools.count(1)
        self.signature: dict[str, Any] = {}

    def time(self, path: str) -> tuple[str, float, list[tuple[float, str]]]:
        """Sign first, which is not the agent's work."""
        place = (plain_host(self.url), "signed", path)
        self.signature = KEY.sign(Statement(*place, next(self.sequence)))
        return super().time(path)

    def deploy(
        self, store_path: str, script: Optional[str] = None, fragments: int = 1, **more: Any
    ) -> str:
        return super().deploy(store_path, script, fragments, signature=self.signature, **more)


def main() -> None:
    with directory() as place, Host(place / "host") as host, Light() as light, Signed() as signed:
        cache = Cache(place / "cache")
        light.cache = signed.cache = cache.wire()
        paths = [plain(cache, version) for version in (1, 2)]
        host.fetch(cache.url, cache.key.public, *paths)
        for number, path in enumerate(paths):
            root = ["--add-root", f"/nix/var/kept-{number}", "--indirect"]
            host.output("nix-store", "--realise", path, *root)
        agents = [
            host.agent("plain", light.url, "bench", "plain"),
            host.agent(
                "signed", signed.url, "bench", "signed", f"--deployment-key={KEY.public_text()}"
            ),
        ]
        for agent in agents:
            agent.wait_for("is connected to")
        measure(light, signed, paths)
        for agent in agents:
            agent.stop()
        cache.close()


def measure(light: Light, signed: Light, paths: list[str]) -> None:
    """Time both in turns, and print their figures."""
    without: list[float] = []
    with_keys: list[float] = []
    for number in range(WARM_UPS + ROUNDS):
        path = paths[number % 2]  # never the one before, so that each makes a generation
        times = {}
        turns = [(without, light), (with_keys, signed)]
        for values, workspace in turns if number % 2 else reversed(turns):
            times[id(values)] = 1000 * workspace.time(path)[1]
            time.sleep(0.1)  # its switch process ends
        if number >= WARM_UPS:
            without.append(times[id(without)])
            with_keys.append(times[id(with_keys)])
    say(f"deployment of a tiny path in the store, ms, median (quartiles) of {ROUNDS} rounds")
    say(f"  without deployment keys: {spread(without)}")
    say(f"  with one, each deployment signed: {spread(with_keys)}")
    ratio = statistics.median(b / a for a, b in zip(without, with_keys))
    figure("  with, more than without", 100 * (ratio - 1), "%", TARGET)
    extra = statistics.median(b - a for a, b in zip(without, with_keys))
    say(f"  with minus without: {extra:.1f} ms")


if __name__ == "__main__":
    main()
