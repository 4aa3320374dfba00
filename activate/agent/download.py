"""Closures from the binary cache into the store: the estimate, the download, the repair."""

from __future__ import annotations

import os
import re
import time
from typing import Optional

from activate import nix
from activate.agent.failure import LOCAL, DownloadFailed, space
from activate.agent.listen import Messages
from activate.agent.route import Act, Route
from activate.process import Run, say
from activate.text import format_size

DEADLINE = 6 * 3600.0  # seconds for a closure; Nix itself ends a stalled transfer much earlier
LOOK_DEADLINE = 1800.0  # seconds for a question to Nix, which may wait for a garbage collection
UNITS = {"bytes": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
ESTIMATE = re.compile(r"\(([\d.]+) (\w+) download, ([\d.]+) (\w+) unpacked\)")


def parse_estimate(text: str) -> Optional[tuple[int, int]]:
    """Bytes to download and bytes unpacked, from Nix's dry run; None if it would fetch nothing."""
    match = ESTIMATE.search(text)
    if match is None:
        return None
    download, download_unit, unpacked, unpacked_unit = match.groups()
    return (
        int(float(download) * UNITS.get(download_unit, 1)),
        int(float(unpacked) * UNITS.get(unpacked_unit, 1)),
    )


def estimate(route: Route) -> Optional[tuple[int, int]]:
    """How many paths and bytes a download will add to the store; None if Nix does not say.

    Raises DownloadFailed, before anything is downloaded, if a path is missing or does not fit.
    """
    answer = route.dry_run()
    if not answer.has_everything and route.refresh(answer):
        answer = route.dry_run()
    if answer.was_interrupted:
        raise DownloadFailed(route.reason(answer), answer.text, by_signal=True)
    if not answer.has_everything and answer.kind in ("missing", *LOCAL):
        say(route.log, f"$ nix-store --realise --dry-run {' '.join(route.paths)}\n{answer.text}")
        raise DownloadFailed(route.reason(answer), answer.text)
    sizes = parse_estimate(answer.text)
    if sizes is None:
        return None
    download, unpacked = map(format_size, sizes)
    count = answer.messages.listed
    say(route.log, f"to download: {count} paths, {download}, {unpacked} unpacked")
    check_disk_space(sizes[1])
    return count, sizes[1]


def check_disk_space(size: int) -> None:
    """Raise DownloadFailed if `size` bytes do not fit into the store."""
    free = space()[0]
    if size > free:
        raise DownloadFailed(
            f"the closure does not fit: it needs {format_size(size)} ({size} bytes), the file "
            f"system of {nix.STORE} has {format_size(free)} ({free} bytes) free: collect garbage "
            "or enlarge it"
        )


def download(
    paths: list[str],
    previous: list[str],
    link: str,
    source: nix.Source,
    log: int,
    timeout: float = DEADLINE,
) -> bool:
    """Get `paths` and their closures into the store, with GC roots; whether `previous` got some.

    `timeout` is in seconds. Raises DownloadFailed, or CommandFailed if Nix can't be run.
    """
    look = min(LOOK_DEADLINE, timeout)
    may_be_present = nix.may_forbid_substitution() and all(map(os.path.lexists, paths))
    if may_be_present and nix.realise_present([*paths, *previous], link, look):
        say(log, "in the store already: " + " ".join(paths))
        return True
    route = Route(paths, source, log, timeout)

    def act(source: nix.Source, run: Run) -> int:
        return nix.realise(paths, link, source, run)

    while not attempt(route, act, estimate(route)):
        pass
    return False


def attempt(route: Route, act: Act, total: Optional[tuple[int, int]]) -> bool:
    """Download; False if it failed, but may succeed in another way. Raises DownloadFailed.

    Each failure leaves out a substituter, or makes Nix forget what it remembers: that ends.
    """
    progress = Progress(route.log, total)
    answer = route.run(act, progress.show)
    if answer is None:
        return False
    progress.show(answer.messages)
    if answer.status and not route.remedy(answer):
        raise DownloadFailed(route.reason(answer), answer.text, answer.was_interrupted)
    return answer.status == 0


def replace_contents(paths: list[str], source: nix.Source, log: int, timeout: float) -> None:
    """Download paths again that Nix takes for valid. Raises DownloadFailed or CommandFailed."""
    route = Route(paths, source, log, timeout)

    def act(source: nix.Source, run: Run) -> int:
        return nix.repair(paths, source, run)

    while not attempt(route, act, None):
        pass


def repair(paths: list[str], source: nix.Source, log: int, timeout: float) -> None:
    """Download paths again that Nix takes for valid, but that lost their contents in a power loss.

    Raises DownloadFailed, or CommandFailed if Nix can't be run.
    """
    damaged = nix.damaged_paths(paths, timeout)
    try:
        if damaged:
            replace_contents(damaged, source, log, timeout)
    except DownloadFailed as error:
        reason = f"a power loss damaged {damaged[0]}, and it could not be downloaded again"
        raise DownloadFailed(f"{reason}: {error}", error.detail, not error.is_clear) from None


class Progress:
    """Says now and then, and at the end, how many paths and bytes have arrived.

    The bytes are those that the file system has lost meanwhile: `nix-store` of 2.3 has no
    --log-format, so that Nix's own progress can't be read.
    """

    def __init__(self, log: int, total: Optional[tuple[int, int]]) -> None:
        """`total` has the number of paths and of bytes; without it nothing is said."""
        self.log, self.total = log, total
        self.start, self.free = time.monotonic(), space()[0]

    def show(self, messages: Messages) -> None:
        """Log a line."""
        if self.total is None:
            return
        count, size = self.total
        arrived = format_size(min(max(0, self.free - space()[0]), size))
        duration = f"after {time.monotonic() - self.start:.1f} s"
        progress = f"{messages.copied} of {count} paths, {arrived} of {format_size(size)}"
        say(self.log, f"{progress} {duration}")
