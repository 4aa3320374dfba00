"""A push: 1,000 new small paths, and 40 of 2,000, against `nix copy` and against bare uploads."""

from __future__ import annotations

import contextlib
import queue
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from _figures import directory, figure, say
from caches import Files, Key
from closures import chain
from hosts import Host, command
from live import Workspace

from cachix_line import Line, basic

PATHS, OWN = 1000, 40
ROUNDS = 3  # of the fast ones
THREADS = 24  # of the bare uploads


@contextlib.contextmanager
def link(files: Path, port: int) -> Iterator[tuple[int, int, int]]:
    """Yield the ports of a cache, of the slow link to it, and of the link to a port."""
    argv = [sys.executable, str(Path(__file__).with_name("_link.py")), str(files), str(port)]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        first, second, third = map(int, process.stdout.readline().split())
        yield first, second, third
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


@contextlib.contextmanager
def world(place: Path) -> Iterator[tuple[Host, Workspace, int, int]]:
    """Yield a host, a workspace, and the ports of the links to an upstream and to the workspace."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    workspace, upstream = Workspace(place / "workspace"), Files(place / "upstream", Key("up-1"))
    chain(upstream, 2 * PATHS - OWN - 1, name="base")
    with Host(place / "host") as host, link(upstream.directory, port) as (_, far, to_workspace):
        known = f"--also-known-as=http://127.0.0.1:{to_workspace}"
        workspace.serve(known, listen=f"127.0.0.1:{port}")
        try:
            yield host, workspace, far, to_workspace
        finally:
            workspace.kill()


def have(host: Host, files: Files, path: str) -> None:
    """Let the host's store have a closure."""
    options = ["--option", "substituters", f"file://{files.directory}"]
    options += ["--option", "trusted-public-keys", files.key.public, "--max-jobs", "16"]
    host.output("nix-store", "--realise", path, *options, timeout=300)


def timed(host: Host, argv: list[str], **variables: str) -> float:
    """Run a command; return how many seconds it took."""
    start = time.monotonic()
    result = host.run(argv, 300, variables)
    seconds = time.monotonic() - start
    assert result.returncode == 0, result.stderr[-2000:]
    return seconds


def ours(host: Host, url: str, workspace: Workspace, path: str, upstream: str) -> float:
    """Push a path to the newest cache by this program."""
    cache = workspace.cache_url.rpartition("/")[2]
    argv = [*command("cachix-deploy"), "push", path, f"--upstream={upstream}", f"--cache={cache}"]
    variables = {"CACHIX_HOST": url, "CACHIX_ACTIVATE_TOKEN": workspace.token("activate")}
    return timed(host, argv, CACHIX_SIGNING_KEY=workspace.files.key.secret, **variables)


def nix_copy(host: Host, url: str, workspace: Workspace, path: str) -> float:
    """Push a path to the newest cache by Nix."""
    (host.directory / "key").write_text(workspace.files.key.secret)
    netrc = f"machine 127.0.0.1 login x password {workspace.token('activate')}\n"
    (host.directory / "netrc").write_text(netrc)
    cache = workspace.cache_url.rpartition("/")[2]
    target = f"{url}/cache/{cache}?secret-key={host.directory / 'key'}"
    options = ["--option", "netrc-file", str(host.directory / "netrc")]
    return timed(host, ["nix", "copy", "--to", target, path, *options])


def bare(url: str, workspace: Workspace, paths: list[str]) -> float:
    """Upload files that lie ready to the newest cache, in THREADS threads, in two rounds."""
    start, files = time.monotonic(), workspace.files
    target = f"{url}/cache/{workspace.cache_url.rpartition('/')[2]}"

    def work(todo: queue.SimpleQueue[Path]) -> None:
        line = Line(target, basic(workspace.token("activate")))
        with contextlib.suppress(queue.Empty):
            while True:
                file = todo.get_nowait()
                name, content = str(file.relative_to(files.directory)), file.read_bytes()
                status = line.request("PUT", name, content, len(content)).status
                assert status == 201, status
        line.close()

    for part in ([files.archive(path) for path in paths], [files.narinfo(path) for path in paths]):
        todo: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for file in part:
            todo.put(file)
        threads = [threading.Thread(target=work, args=(todo,)) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return time.monotonic() - start


def new_cache(workspace: Workspace, numbers: list[int]) -> Files:
    """Make another cache, so that nothing is there."""
    numbers.append(len(numbers))
    return workspace.cache(f"cache{len(numbers)}")


def many(host: Host, workspace: Workspace, numbers: list[int], far: int, place: Path) -> None:
    """Compare pushes of PATHS new small paths, with and without a slow link."""
    built = Files(place / "built", Key("built-1"))
    path = chain(built, PATHS - 1)
    have(host, built, path)
    for url, note in ((workspace.url, "no delay"), (f"http://127.0.0.1:{far}", "20 ms")):
        times: dict[str, list[float]] = {"ours": [], "nix": [], "bare": []}
        for number in range(ROUNDS):
            new_cache(workspace, numbers)
            times["ours"].append(ours(host, url, workspace, path, "none"))
            new_cache(workspace, numbers)
            if number == 0 or url == workspace.url:  # over the link it takes more than a minute
                times["nix"].append(nix_copy(host, url, workspace, path))
            files = new_cache(workspace, numbers)
            chain(files, PATHS - 1)
            times["bare"].append(bare(url, workspace, sorted(files.closure(path))))
        middle = {name: statistics.median(values) for name, values in times.items()}
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in middle.items())
        say(f"push of {PATHS} new small paths, {note}: {parts}")
        figure("  ours against nix copy", middle["ours"] / middle["nix"], "", 1)
        figure("  ours against bare uploads", middle["ours"] / middle["bare"], "", 1.5)


def few(
    host: Host,
    workspace: Workspace,
    numbers: list[int],
    ports: tuple[int, int],
    place: Path,
) -> None:
    """Measure a push of OWN paths of a closure that an upstream has otherwise, over the link."""
    upstream = Files(place / "upstream", Key("up-1"))
    base = chain(upstream, 2 * PATHS - OWN - 1, name="base")
    have(host, upstream, base)
    both = Files(place / "upstream", Key("up-1"))  # the link serves what was there when it began
    own = [both.add(f"own-{i}", f"{i} on {base}\n") for i in range(OWN - 1)]
    top = both.add("own-all", "".join(f"{path}\n" for path in own))
    have(host, both, top)
    times = []
    for _ in range(ROUNDS):
        new_cache(workspace, numbers)
        url, far = (f"http://127.0.0.1:{port}" for port in ports)
        times.append(ours(host, url, workspace, top, far))
        held = list((workspace.data / "cache").glob(f"cache{len(numbers)}/*.narinfo"))
        assert len(held) == OWN, f"{len(held)} paths were pushed"
    say(f"push of {OWN} of {2 * PATHS} paths, the rest upstream, both at 20 ms")
    figure("  seconds", statistics.median(times), "s", 3)


def main() -> None:
    with directory() as place, world(place) as (host, workspace, upstream, to_workspace):
        numbers: list[int] = []
        many(host, workspace, numbers, to_workspace, place)
        few(host, workspace, numbers, (to_workspace, upstream), place)


if __name__ == "__main__":
    main()
