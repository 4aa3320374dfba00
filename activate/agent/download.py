"""Closures from the binary cache into the store: the estimate, the download, and its failures."""

from __future__ import annotations

import os
import re
import threading
import time
from typing import Optional

from activate import logfile, nix
from activate.process import Error, run, say
from activate.text import STORE_PATH, format_size, is_store_path, last_lines

DEADLINE = 6 * 3600.0  # seconds for a closure; Nix itself ends a stalled transfer much earlier
LOOK_DEADLINE = 1800.0  # seconds for a question to Nix and its substituters
PROGRESS_SECONDS = 5.0
UNITS = {"bytes": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
ESTIMATE = re.compile(r"\(([\d.]+) (\w+) download, ([\d.]+) (\w+) unpacked\)")
# Patterns of Nix's messages for each class of failure. The order counts: a download that was
# refused also says `unable to download`.
CLASSES = {
    "signature": "not signed by any of the keys|does not have a valid signature"
    "|lacks a .*signature",
    "corrupt": "hash mismatch|bad_alloc|string is too long|bad archive|non-zero padding"
    "|is incomplete",
    "credentials": "HTTP error 40[13]|does not appear to be a binary cache",
    "network": "unable to download|Couldn't connect|Could not connect|Timeout was reached"
    "|Operation too slow",
    "missing": "don't know how to build these paths|is not valid|no substituter that can build it",
}


class DownloadFailed(Error):
    """A closure could not be downloaded. `detail` has the last lines of Nix's output."""

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.detail = last_lines(output)


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


def classify(text: str) -> str:
    """The class of a failed download, by Nix's words; empty if it is none of them."""
    return next((name for name, pattern in CLASSES.items() if re.search(pattern, text)), "")


def explain(text: str, source: nix.Source, path: str) -> str:
    """A message for a failed download. `path` is named if Nix names no other one."""
    name = classify(text)
    match = re.search(CLASSES.get(name, "$"), text)
    start = text.rfind("\n", 0, match.start() if match else 0) + 1
    named = STORE_PATH.search(text, start)
    path = named[0] if named else path
    line = text[start:].partition("\n")[0].strip()[:300]
    # Nix takes 401 and 403 for missing
    unread = "" if source.netrc is None else ", or let this agent's token read it"
    cache = source.substituter or "any substituter of this machine"
    keys = " ".join(source.keys) or "that this machine trusts"
    return {
        "signature": f"the signature of {path} is by none of the keys {keys}",
        "corrupt": f"{cache} serves a damaged {path}, push it again: {line}",
        "credentials": f"{cache} refused this agent's credentials, or is no binary cache: {line}",
        "network": f"the download from {cache} broke off: {line}",
        "missing": f"{path} is not in {cache}: push it there first{unread}",
    }.get(name, "the download failed")


def free_space() -> int:
    """The bytes that this user may still write to the store's file system."""
    stat = os.statvfs(nix.STORE if os.path.isdir(nix.STORE) else "/")
    return stat.f_bavail * stat.f_frsize


def estimate(
    paths: list[str], source: nix.Source, log: int, timeout: float
) -> Optional[tuple[int, int]]:
    """How many paths and bytes a download will add to the store; None if Nix does not say.

    Raises DownloadFailed, before anything is downloaded, if a path is missing or does not fit.
    """
    output = nix.realise_dry_run(paths, source, min(LOOK_DEADLINE, timeout))
    if classify(output) == "missing":
        say(log, f"$ nix-store --realise --dry-run {' '.join(paths)}\n{output.rstrip()}")
        raise DownloadFailed(explain(output, source, paths[0]), output)
    sizes = parse_estimate(output)
    if sizes is None:
        return None
    count = len([line for line in output.splitlines() if is_store_path(line.strip())])
    download, unpacked = map(format_size, sizes)
    say(log, f"to download: {count} paths, {download}, {unpacked} unpacked")
    check_disk_space(sizes[1])
    return count, sizes[1]


def check_disk_space(size: int) -> None:
    """Raise DownloadFailed if `size` bytes do not fit into the store."""
    free = free_space()
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

    `timeout` is in seconds, for each command. Raises DownloadFailed, or CommandFailed if Nix can't
    be run.
    """
    look = min(LOOK_DEADLINE, timeout)
    if nix.may_forbid_substitution() and nix.realise_present([*paths, *previous], link, look):
        say(log, "in the store already: " + " ".join(paths))
        return True
    total = estimate(paths, source, log, timeout)
    start, done = os.fstat(log).st_size, threading.Event()
    arguments = (log, start, total, done)
    watcher = threading.Thread(target=show_progress, args=arguments, name="progress", daemon=True)
    watcher.start()
    try:
        status = nix.realise(paths, link, source, lambda argv: run(argv, log, timeout))
    finally:
        done.set()
        watcher.join(5.0)
    if status:
        output = logfile.read_since(log, start)
        raise DownloadFailed(explain(output, source, paths[0]), output)
    return False


def repair(paths: list[str], source: nix.Source, log: int, timeout: float) -> None:
    """Download paths again that Nix takes for valid, but that lost their contents in a power loss.

    Raises DownloadFailed, or CommandFailed if Nix can't be run.
    """
    damaged = nix.damaged_paths(paths, timeout)
    start = os.fstat(log).st_size
    if damaged and nix.repair(damaged, source, lambda argv: run(argv, log, timeout)):
        reason = f"a power loss damaged {damaged[0]}, and it could not be downloaded again"
        raise DownloadFailed(reason, logfile.read_since(log, start))


def show_progress(
    log: int, start: int, total: Optional[tuple[int, int]], done: threading.Event
) -> None:
    """Log now and then, and at the end, how many paths and bytes have arrived.

    The bytes are those that the file system has lost meanwhile: `nix-store` of 2.3 has no
    --log-format, so that Nix's own progress can't be read.
    """
    if total is None:
        return
    began, free, over = time.monotonic(), free_space(), False
    while not over:
        over = done.wait(PROGRESS_SECONDS)
        count = logfile.read_since(log, start, 1 << 22).count("\ncopying path '")
        size = format_size(min(max(0, free - free_space()), total[1]))
        duration = f"after {time.monotonic() - began:.1f} s"
        say(log, f"{count} of {total[0]} paths, {size} of {format_size(total[1])} {duration}")
