"""The overview of all agents: its first page with 5,000 of them, beside one with 50."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import exhibits
from _figures import directory, figure, say, spread
from exhibits import Gallery

from cachix_workspace.pages.access import COOKIE

MANY, FEW, HISTORY = 5000, 50, 30
ROUNDS = 15
TARGET = 300.0  # milliseconds


def measure(gallery: Gallery, path: str, changes: bool) -> tuple[list[float], list[float]]:
    """Wall and CPU milliseconds of answers to GET `path`, after a change before each if wanted."""
    client = gallery.app.test_client()
    client.set_cookie(COOKIE, gallery.cookie())
    walls, spent = [], []
    for _ in range(ROUNDS):
        if changes:
            gallery.workspace.feed.publish("agents")
        start, cpu = time.perf_counter(), time.process_time()
        answer = client.get(path, headers={"Accept": "text/html"})
        spent.append((time.process_time() - cpu) * 1000)
        walls.append((time.perf_counter() - start) * 1000)
        assert answer.status_code == 200, answer.status
    return walls, spent


def compare(many: Gallery, few: Gallery, path: str, changes: bool) -> None:
    """Print what a page costs in both workspaces, measured in turns."""
    when = "after a change" if changes else "again, nothing changed"
    walls, spent = measure(many, path, changes)
    small, small_spent = measure(few, path, changes)
    say(f"GET {path} {when}, {MANY} agents: {spread(walls)} ms, CPU {spread(spent)} ms")
    say(f"GET {path} {when}, {FEW} agents: {spread(small)} ms, CPU {spread(small_spent)} ms")
    middle = sorted(walls)[ROUNDS // 2]
    figure(f"GET {path} {when}, {MANY} agents", middle, "ms", TARGET)
    ratio = sorted(spent)[ROUNDS // 2] / sorted(small_spent)[ROUNDS // 2]
    say(f"ratio of the CPU time, {MANY} to {FEW} agents: {ratio:.1f}")


def main() -> None:
    history = int(sys.argv[1]) if len(sys.argv) > 1 else HISTORY
    with directory() as place:
        start = time.monotonic()
        few = exhibits.gallery(Path(place, "few"), FEW, history, with_cache=False)
        many = exhibits.gallery(Path(place, "many"), MANY, history, with_cache=False)
        with few as small, many as large:
            say(f"{history} deployments each, written in {time.monotonic() - start:.0f} s")
            for path in ("/", "/?q=web-1&label=prod", "/runs"):
                for changes in (True, False):
                    compare(large, small, path, changes)


if __name__ == "__main__":
    main()
