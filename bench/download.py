"""1,000 small paths over a link with a round trip of 20 ms: the agent against `nix-store -r`."""

from __future__ import annotations

import contextlib
import http.client
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from _figures import directory, figure, say
from caches import Files
from closures import chain
from hosts import PROJECT, Host

PATHS = 1000
ROUNDS = 3  # of the agent's download; the slow plain one runs once
# All that the agent's worker thread does: check the store, estimate, download with a GC root.
OURS = """
import os, sys
from activate import nix
from activate.agent import download
log = os.open(os.environ["HOME"] + "/log", os.O_RDWR | os.O_APPEND | os.O_CREAT)
source = nix.Source(sys.argv[1], (sys.argv[2],))
download.download([sys.argv[3]], [], "/nix/var/new", source, log)
"""


@contextlib.contextmanager
def link(files: Path) -> Iterator[tuple[int, int]]:
    """Yield the ports of a cache and of the slow link to it."""
    argv = [sys.executable, str(Path(__file__).with_name("_link.py")), str(files)]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        near, far = map(int, process.stdout.readline().split())
        yield near, far
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


def round_trip(port: int) -> float:
    """Return the median milliseconds of a small request on an open connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    times = []
    for _ in range(15):
        start = time.monotonic()
        connection.request("GET", "/nix-cache-info")
        connection.getresponse().read()
        times.append(1000 * (time.monotonic() - start))
    connection.close()
    return statistics.median(times)


def fresh(place: Path, argv: list[str]) -> float:
    """Run a command on a new host with an empty store; return how many seconds it took."""
    with Host(place) as host:
        host.output("nix-store", "--init")
        start = time.monotonic()
        result = host.run(argv, 120, {"PYTHONPATH": str(PROJECT)})
        seconds = time.monotonic() - start
        assert result.returncode == 0, result.stderr[-2000:]
        paths = [path for path in host.path("/nix/store").iterdir() if path.name[0] != "."]
        assert len(paths) >= PATHS, f"only {len(paths)} paths have arrived"
    return seconds


def main() -> None:
    with directory() as place:
        files = Files(place / "cache")
        path = chain(files, PATHS - 1)
        key = files.key.public
        with link(files.directory) as (near, far):
            url = f"http://127.0.0.1:{far}"
            ours = [sys.executable, "-c", OURS, url, key, path]
            plain = ["nix-store", "--realise", path, "--option", "substituters", url]
            plain += ["--option", "trusted-public-keys", key]
            linked, direct = round_trip(far), round_trip(near)
            trips = f"round trip {linked:.1f} ms ({direct:.1f} without the link)"
            say(f"download of {PATHS} small paths, {trips}")
            times = [fresh(place / f"ours-{number}", ours) for number in range(ROUNDS)]
            raw = fresh(place / "plain", plain)
        seconds = statistics.median(times)
        say(f"  plain `nix-store -r`: {raw:.1f} s; ours: {seconds:.1f} s, median of {ROUNDS}")
        figure("  ours is faster by a factor", raw / seconds, "", 5, at_least=True)


if __name__ == "__main__":
    main()
