"""What the benchmarks share: plain lines of text, and a workspace whose own cost does not count."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peer import Answer, Peer, Request


def figure(name: str, value: float, unit: str, target: float, at_least: bool = False) -> None:
    """Print one figure, its target, their ratio, and whether the target was met: nothing here ever fails."""
    met = value >= target if at_least else value <= target
    bound = "at least" if at_least else "at most"
    print(
        f"{name}: {value:.1f}{unit and ' ' + unit}, target {bound} {target:.1f}, ratio {value / target:.2f}, "
        f"{'met' if met else 'missed'}",
        flush=True,
    )


def say(text: str) -> None:
    print(text, flush=True)


def spread(values: Sequence[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


@contextlib.contextmanager
def directory() -> Iterator[Path]:
    """A directory for hosts and workspaces, gone afterwards."""
    load = os.getloadavg()[0]
    if load > 1.5:
        print(
            f"note: this machine is busy (load {load:.1f}), the figures will be too",
            file=sys.stderr,
        )
    with tempfile.TemporaryDirectory(
        prefix="cachix-deploy-bench-", ignore_cleanup_errors=True
    ) as name:
        yield Path(name)


class Light(Peer):
    """A workspace in this process that answers at once and knows when a deployment's final report came."""

    def __init__(self) -> None:
        super().__init__()
        self.reports = "http"
        self.over = threading.Event()
        self.moment = 0.0
        self.calls: list[tuple[float, str]] = []  # when each request came, and what it was

    def _answer(self, request: Request) -> Answer:
        now = time.monotonic()
        answer = super()._answer(request)
        if request.path.endswith("/status"):
            status = request.json()
            self.calls.append(
                (
                    now,
                    status["status"]
                    + (" with the size" if status["closureSize"] is not None else ""),
                )
            )
            if status["status"] != "InProgress":
                self.moment = now
                self.over.set()
        else:
            self.calls.append((now, "log"))
        return answer

    def time(self, path: str) -> tuple[str, float, list[tuple[float, str]]]:
        """Deploy a path: its id, seconds from the frame to the final report, and the requests with their times."""
        self.over.clear()
        self.calls.clear()
        self.agent()
        begin = time.monotonic()
        known: Any = self.deploy(path)
        if not self.over.wait(60):
            raise AssertionError(f"no final report of {path} within 60 s")
        return (
            str(known),
            self.moment - begin,
            [(moment - begin, what) for moment, what in list(self.calls)],
        )
