"""Closures from the binary cache into the store: what it will take, the download, and why it failed."""

from __future__ import annotations

import os
import re
import threading
import time
from typing import Optional

from activate import logfile, nix
from activate.process import Error, run, say
from activate.text import format_size, last_lines

DEADLINE = (
    6 * 3600.0
)  # seconds for one closure; a stalled transfer ends much earlier by Nix's own time limit
LOOK_DEADLINE = 1800.0  # seconds for what Nix only looks at
PROGRESS_SECONDS = 5.0
UNITS = {"bytes": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
ESTIMATE = re.compile(r"\(([\d.]+) (\w+) download, ([\d.]+) (\w+) unpacked\)")
PATH = re.compile(r"/nix/store/[0-9a-z]{32}-[0-9a-zA-Z+._?=-]+")
# Order counts: a refused download also says `unable to download`.
CLASSES = (
    (
        "signature",
        r"not signed by any of the keys|does not have a valid signature|lacks a .*signature",
    ),
    (
        "corrupt",
        r"hash mismatch|bad_alloc|string is too long|bad archive|non-zero padding|is incomplete",
    ),
    ("credentials", r"HTTP error 40[13]|does not appear to be a binary cache"),
    (
        "network",
        r"unable to download|Couldn't connect|Could not connect|Timeout was reached|Operation too slow",
    ),
    (
        "missing",
        r"don't know how to build these paths|is not valid|no substituter that can build it",
    ),
)


class DownloadFailed(Error):
    """A closure could not be had. `detail` has the last lines of what Nix said."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail


def parse_estimate(text: str) -> Optional[tuple[int, int]]:
    """Bytes to download and bytes unpacked, as Nix's dry run tells them; None where nothing would be fetched."""
    found = ESTIMATE.search(text)
    if found is None:
        return None
    return int(float(found[1]) * UNITS.get(found[2], 1)), int(
        float(found[3]) * UNITS.get(found[4], 1)
    )


def classify(text: str) -> str:
    """The class of a failed download by Nix's words; empty for one that is none of them."""
    return next((name for name, pattern in CLASSES if re.search(pattern, text)), "")


def explain(text: str, source: nix.Source, wanted: str) -> str:
    """Why a download failed, in a sentence that says what to do."""
    name = classify(text)
    at = re.search(dict(CLASSES).get(name, "$"), text)
    start = text.rfind("\n", 0, at.start() if at else 0) + 1
    found = PATH.search(text, start)
    path = found[0] if found else wanted
    said = text[start:].partition("\n")[0].strip()[:300]
    unread = (
        "" if source.netrc is None else ", or let this agent's token read it"
    )  # Nix takes 401 and 403 for missing
    cache = source.substituter or "any substituter of this machine"
    keys = " ".join(source.keys) or "that this machine trusts"
    return {
        "signature": f"the signature of {path} is by none of the keys {keys}",
        "corrupt": f"what {cache} serves for {path} is damaged, push it again: {said}",
        "credentials": f"{cache} refused the credentials of this agent, or is no binary cache: {said}",
        "network": f"the download from {cache} broke off: {said}",
        "missing": f"{path} is not in {cache}: push it there first{unread}",
    }.get(name, "the download failed")


def free_space() -> int:
    """Bytes that the store's file system has left for this user."""
    stat = os.statvfs(nix.STORE if os.path.isdir(nix.STORE) else "/")
    return stat.f_bavail * stat.f_frsize


def check_disk_space(
    paths: list[str], source: nix.Source, log: int, timeout: float
) -> Optional[tuple[int, int]]:
    """Refuse, before anything is downloaded, what is missing or does not fit; how many paths and bytes there will be.

    Raises DownloadFailed.
    """
    said = nix.realise_dry_run(paths, source, min(LOOK_DEADLINE, timeout))
    if classify(said) == "missing":
        say(log, f"$ nix-store --realise --dry-run {' '.join(paths)}\n{said.rstrip()}")
        raise DownloadFailed(explain(said, source, paths[0]), last_lines(said))
    estimate = parse_estimate(said)
    if estimate is None:
        return None
    fetched = len([line for line in said.splitlines() if PATH.fullmatch(line.strip())])
    say(
        log,
        f"to download: {fetched} paths, {format_size(estimate[0])}, {format_size(estimate[1])} unpacked",
    )
    free = free_space()
    if estimate[1] > free:
        raise DownloadFailed(
            f"the closure does not fit: it needs {format_size(estimate[1])} ({estimate[1]} bytes), the file system of "
            f"{nix.STORE} has {format_size(free)} ({free} bytes) free: collect garbage or enlarge it"
        )
    return fetched, estimate[1]


def download(
    paths: list[str],
    previous: list[str],
    link: str,
    source: nix.Source,
    log: int,
    timeout: float = DEADLINE,
) -> bool:
    """Have `paths` and their closures in the store, with a GC root each; whether `previous` got theirs too.

    `timeout` is in seconds, for each command. Raises DownloadFailed, or CommandFailed where Nix can't be run.
    """
    if nix.may_forbid_substitution() and nix.realise_present(
        [*paths, *previous], link, min(LOOK_DEADLINE, timeout)
    ):
        say(log, "in the store already: " + " ".join(paths))
        return True
    total = check_disk_space(paths, source, log, timeout)
    start, done = os.fstat(log).st_size, threading.Event()
    watcher = threading.Thread(
        target=show_progress, args=(log, start, total, done), name="progress", daemon=True
    )
    watcher.start()
    try:
        status = nix.realise(paths, link, source, lambda argv: run(argv, log, timeout))
    finally:
        done.set()
        watcher.join(5.0)
    if status:
        text = logfile.tail(log, start)
        raise DownloadFailed(explain(text, source, paths[0]), last_lines(text))
    return False


def repair(paths: list[str], source: nix.Source, log: int, timeout: float) -> None:
    """Download again what lost its contents when power was lost soon after Nix had it: Nix still holds it for valid.

    Raises DownloadFailed.
    """
    damaged = nix.damaged_paths(paths, timeout)
    if damaged:
        start = os.fstat(log).st_size
        if nix.repair(damaged, source, lambda argv: run(argv, log, timeout)):
            text = logfile.tail(log, start)
            raise DownloadFailed(
                f"what a power loss has damaged could not be downloaded again: {damaged[0]}",
                last_lines(text),
            )


def show_progress(
    log: int, start: int, total: Optional[tuple[int, int]], done: threading.Event
) -> None:
    """Say now and then, and at the end, how many paths and bytes have come: bytes by what is left of the file system.

    Nix' own progress can't be read: `nix-store` of 2.3 has no --log-format.
    """
    began, free, ended = time.monotonic(), free_space(), False
    while total is not None and not ended:
        ended = done.wait(PROGRESS_SECONDS)
        count = logfile.tail(log, start, 1 << 22).count("\ncopying path '")
        written = min(max(0, free - free_space()), total[1])
        took = f"after {time.monotonic() - began:.1f} s"
        say(
            log,
            f"{count} of {total[0]} paths, {format_size(written)} of {format_size(total[1])} {took}",
        )
