"""`nix copy` of 1,000 small paths to a workspace, to a bare cache that keeps nothing, to files.

The bare cache shows what Nix itself takes, on the same machine at the same time, and a loop that
only writes as many files, how long the disk takes until each has its bytes, then its name.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import time
from pathlib import Path

from _figures import directory, figure, say
from caches import Files, Key
from closures import chain
from fleet import Usage, child
from hosts import Host
from live import Workspace
from push import PATHS, have, nix_copy, timed

ROUNDS = 5
TARGET = 2.0  # seconds


def worker_of(workspace: Workspace) -> int:
    """The server's worker."""
    pid = workspace.program.pid
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def spent() -> float:
    """The seconds of CPU of all commands that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def forget(host: Host) -> None:
    """Let Nix forget what it knows of caches."""
    for file in host.directory.rglob("binary-cache-v*.sqlite*"):
        file.unlink()


def synced(place: Path) -> float:
    """The seconds for as many files as a push has, each on the disk before the next one.

    Nix waits for the answer to each upload. No name may be there without the bytes.
    """
    place.mkdir()
    names = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    start = time.monotonic()
    for number in range(2 * PATHS):  # a NAR and a narinfo of each path
        with open(place / "new", "wb") as file:
            file.write(bytes(400))
            file.flush()
            os.fsync(file.fileno())
        os.rename(place / "new", place / str(number))
        os.fsync(names)
    seconds = time.monotonic() - start
    os.close(names)
    return seconds


def measure(host: Host, workspace: Workspace, port: int, path: str, place: Path) -> None:
    """Measure in turns, and print the figures."""
    times: dict[str, list[float]] = {"ours": [], "bare": [], "file": [], "disk": []}
    server, nix = [], []
    for number in range(ROUNDS):
        workspace.cache(f"cache{number}")
        worker = worker_of(workspace)
        before, own = Usage.of(worker).cpu, spent()
        times["ours"].append(nix_copy(host, workspace.url, workspace, path))
        server.append(Usage.of(worker).cpu - before)
        nix.append(spent() - own)
        forget(host)
        times["bare"].append(nix_copy(host, f"http://127.0.0.1:{port}", workspace, path))
        forget(host)
        target = f"file://{place}/target{number}?secret-key={host.directory / 'key'}"
        times["file"].append(timed(host, ["nix", "copy", "--to", target, path]))
        times["disk"].append(synced(place / f"synced{number}"))
    middle = {name: statistics.median(values) for name, values in times.items()}
    figure(f"nix copy of {PATHS} small paths to a workspace", middle["ours"], "s", TARGET)
    say(f"  to a bare cache {middle['bare']:.2f} s, to files {middle['file']:.2f} s")
    least = middle["bare"] + middle["disk"]
    say(
        f"  the disk takes {middle['disk']:.2f} s for {2 * PATHS} files, one after the other:"
        f" a server that keeps what it acknowledges takes at least {least:.2f} s here"
    )
    if middle["ours"] > TARGET:
        own, reason = middle["ours"] - least, "Nix and the disk alone take longer than the target"
        if least <= TARGET:
            reason = "the server's own work takes too long"
        say(f"  missed because {reason}; beyond Nix and the disk it takes {own:.2f} s")
    cpu = f"{statistics.median(server):.2f} s of the server, {statistics.median(nix):.2f} s of Nix"
    say(f"  CPU {cpu}; load {os.getloadavg()[0]:.1f}")


def main() -> None:
    with directory() as place, Host(place / "host") as host, child("_sink.py") as sink:
        port, workspace = int(sink.read()), Workspace(place / "workspace")
        workspace.serve()
        try:
            built = Files(place / "built", Key("built-1"))
            path = chain(built, PATHS - 1)
            have(host, built, path)
            began = time.monotonic()
            measure(host, workspace, port, path, place)
            counts = ", ".join(
                f"{count} {kind}" for kind, count in json.loads(sink.ask("")).items()
            )
            say(f"  the bare cache has answered {counts} in {time.monotonic() - began:.0f} s")
        finally:
            workspace.kill()


if __name__ == "__main__":
    main()
