"""Shared by the benchmarks: printing figures, and a workspace that costs next to nothing."""

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

from peer import Answer, Peer, Request


def figure(name: str, value: float, unit: str, target: float, at_least: bool = False) -> bool:
    """Print a figure, its target, their ratio, and whether it meets the target; return that."""
    met = value >= target if at_least else value <= target
    bound = "at least" if at_least else "at most"
    say(
        f"{name}: {value:.1f}{unit and ' ' + unit}, target {bound} {target:.1f},"
        f" ratio {value / target:.2f}, {'met' if met else 'missed'}"
    )
    return met


def say(text: str) -> None:
    print(text, flush=True)


def spread(values: Sequence[float]) -> str:
    """Return median and quartiles as text."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


@contextlib.contextmanager
def directory() -> Iterator[Path]:
    """Yield a temporary directory for hosts and workspaces."""
    load = os.getloadavg()[0]
    if load > 1.5:
        note = f"note: this machine is busy (load {load:.1f}), so the figures are too high"
        print(note, file=sys.stderr)
    prefix = "cachix-deploy-bench-"
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as name:
        yield Path(name)


class Light(Peer):
    """A workspace in this process that answers at once, and notes when the final report came."""

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
            size = "" if status["closureSize"] is None else " with the size"
            self.calls.append((now, status["status"] + size))
            if status["status"] != "InProgress":
                self.moment = now
                self.over.set()
        else:
            self.calls.append((now, "log"))
        return answer

    def time(self, path: str) -> tuple[str, float, list[tuple[float, str]]]:
        """Deploy a path; return its id, and the seconds until the final report and each request.

        Time runs from the Deployment frame on.
        """
        self.over.clear()
        self.calls.clear()
        self.agent()
        start = time.monotonic()
        deployment_id = self.deploy(path)
        if not self.over.wait(60):
            raise AssertionError(f"no final report of {path} within 60 s")
        calls = [(moment - start, call) for moment, call in list(self.calls)]
        return deployment_id, self.moment - start, calls
