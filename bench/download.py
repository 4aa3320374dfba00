"""Downloads over a slow link: the agent against plain Nix, and against a bare download with import.

Other Nixes take part where CACHIX_DEPLOY_NIX=DIR:DIR names directories with bin/nix-store.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from _figures import directory, figure, say
from caches import Files
from closures import chain
from hosts import PROJECT, Host

ROUNDS = 3  # in turns; the slow plain download runs once
SMALL = 1000  # paths
LARGE, LARGE_SIZE = 40, 5_000_000  # paths, bytes
OLD, NEW = 1980, 20  # paths of a system of which 20 are new
MOST = 1.3  # times as long as the bare download
DAILY = 0.2  # seconds more than `nix copy` of the new paths
PLAIN_SECONDS = 60
BARE = str(Path(__file__).with_name("_bare.py"))
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
def link(files: Path, milliseconds: int = 20) -> Iterator[tuple[int, int]]:
    """Yield the ports of a cache, and of the link to it with a round trip of so many ms."""
    argv = [sys.executable, str(Path(__file__).with_name("_link.py")), str(files), "0"]
    argv.append(str(milliseconds / 2))
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        near, far, _ = map(int, process.stdout.readline().split())
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


@dataclass(frozen=True)
class Nix:
    """A release of Nix, in a directory of its own or as it is installed, and commands for it."""

    path: str
    key: str

    def run(self, host: Host, argv: list[str], timeout: float = 180) -> float:
        """Run a command on a host; return how many seconds it took."""
        env = {"PYTHONPATH": str(PROJECT), "PATH": self.path}
        start = time.monotonic()
        result = host.run(argv, timeout, env)
        seconds = time.monotonic() - start
        assert result.returncode == 0, result.stderr[-2000:]
        return seconds

    def version(self, host: Host) -> str:
        """Return its version."""
        result = host.run(["nix-store", "--version"], env={"PATH": self.path})
        return result.stdout.split()[-1]

    def ours(self, url: str, path: str) -> list[str]:
        return [sys.executable, "-c", OURS, url, self.key, path]

    def bare(self, url: str, path: str) -> list[str]:
        return [sys.executable, "-I", "-S", BARE, url, path]

    def plain(self, url: str, path: str) -> list[str]:
        options = ["--option", "substituters", url, "--option", "trusted-public-keys", self.key]
        return ["nix-store", "--realise", path, *options]

    def copy(self, url: str, *paths: str) -> list[str]:
        options = ["--option", "trusted-public-keys", self.key]
        return ["nix", "copy", "--no-recursive", "--from", url, *paths, *options]

    def fresh(self, place: Path, argv: list[str], count: int, timeout: float = 180) -> float:
        """Run a command on a new host with an empty store; return how many seconds it took."""
        with Host(place) as host:
            self.run(host, ["nix-store", "--init"])
            seconds = self.run(host, argv, timeout)
            store = host.path("/nix/store")
            paths = [path for path in store.iterdir() if len(path.name) > 32]
            assert len(paths) >= count, f"only {len(paths)} paths have arrived"
        return seconds


def whole(nix: Nix, place: Path, url: str, path: str, count: int, plain: bool) -> None:
    """Print the figures of a closure that the store has nothing of."""
    bare: list[float] = []
    ours: list[float] = []
    for number in range(ROUNDS):
        bare.append(nix.fresh(place / f"bare-{number}", nix.bare(url, path), count))
        ours.append(nix.fresh(place / f"ours-{number}", nix.ours(url, path), count))
    words = f"    bare {statistics.median(bare):.2f} s, ours {statistics.median(ours):.2f} s"
    if plain:
        try:
            raw = nix.fresh(place / "plain", nix.plain(url, path), count, PLAIN_SECONDS)
            words += f", plain `nix-store -r` {raw:.2f} s"
        except subprocess.TimeoutExpired:
            words += f", plain `nix-store -r` more than {PLAIN_SECONDS} s"
    say(words)
    ratio = statistics.median(o / b for o, b in zip(ours, bare))
    figure("    ours by bare", ratio, "", MOST)


def daily(nix: Nix, place: Path, ports: tuple[int, int], systems: list[list[str]]) -> None:
    """Print the figures of systems of which most paths are there."""
    near, far = (f"http://127.0.0.1:{port}" for port in ports)
    base, *rest = systems
    copied: list[float] = []
    ours: list[float] = []
    with Host(place) as host:
        nix.run(host, nix.ours(near, base[-1]))
        for one, other in zip(rest[::2], rest[1::2]):
            copied.append(nix.run(host, nix.copy(far, *one)))
            ours.append(nix.run(host, nix.ours(far, other[-1])))
    raw = statistics.median(copied)
    say(f"    `nix copy` of the new paths {raw:.2f} s, ours {statistics.median(ours):.2f} s")
    more = statistics.median(o - c for o, c in zip(ours, copied))
    figure("    ours minus `nix copy`", 1000 * more, "ms", 1000 * DAILY)


def systems(files: Files) -> list[list[str]]:
    """Add systems that have OLD paths in common; return the NEW ones of each, itself last."""
    old = [files.add(f"old-{number}", f"{number}\n") for number in range(OLD)]
    made = []
    for version in range(1 + 2 * ROUNDS):
        parts = [files.add(f"new-{version}-{n}", f"{version}.{n}\n") for n in range(NEW - 1)]
        text = "".join(f"{path}\n" for path in [*old, *parts])
        made.append([*parts, files.add(f"system-{version}", text)])
    return made


def nixes(key: str) -> list[Nix]:
    """Return the Nix that is installed, and those in CACHIX_DEPLOY_NIX."""
    others = filter(None, os.environ.get("CACHIX_DEPLOY_NIX", "").split(":"))
    path = os.environ["PATH"]
    return [Nix(path, key), *(Nix(f"{other}/bin:{path}", key) for other in others)]


def main() -> None:
    with directory() as place:
        files = Files(place / "cache")
        small, large = chain(files, SMALL - 1), chain(files, LARGE - 1, LARGE_SIZE, "large")
        daily_systems = systems(files)
        for number, nix in enumerate(nixes(files.key.public)):
            own = place / str(number)
            with Host(own / "version") as host:
                say(f"downloads, Nix {nix.version(host)}")
            for trip in (20, 80):
                with link(files.directory, trip) as ports:
                    url = f"http://127.0.0.1:{ports[1]}"
                    say(f"  {SMALL} small paths, round trip {round_trip(ports[1]):.1f} ms")
                    whole(nix, own / f"small-{trip}", url, small, SMALL, True)
                    if trip == 80:
                        say(f"  {LARGE} paths of {LARGE_SIZE / 1e6:.0f} MB, the same round trip")
                        whole(nix, own / "large", url, large, LARGE, False)
                    else:
                        say(f"  {OLD + NEW} paths of which {NEW} are new, the same round trip")
                        daily(nix, own / "daily", ports, daily_systems)


if __name__ == "__main__":
    main()
