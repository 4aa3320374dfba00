"""Reads of a cache: narinfos a second, and a NAR's bytes a second, beside a bare server's.

The clients have a process of their own. The bare server is gunicorn's threaded worker, with an
application that answers the same bytes and does nothing else.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from _figures import directory, figure, say
from workspace_support import running

from cachix_protocol import base32

CONNECTIONS, SECONDS, ROUNDS = 8, 3.0, 3
PATHS, MANY = 2000, 20_000  # narinfos that are read again within two seconds, and later
TARGET = 3000.0  # narinfos a second
NAR_BYTES = 512 << 20
BLOCK = 1 << 20
NAR = f"nar/{'b' * 52}.nar"
INFO = "StorePath: /nix/store/x\n" + "x" * 600 + "\n"
BARE = f"""
import os
def application(environ, start_response):
    if environ["PATH_INFO"].endswith(".nar"):
        file = open({{nar!r}}, "rb")
        start_response("200 OK", [("Content-Length", str(os.fstat(file.fileno()).st_size))])
        return iter(lambda: file.read({BLOCK}), b"")
    start_response("200 OK", [("Content-Length", "{len(INFO)}")])
    return [{INFO.encode()!r}]
"""


def names(count: int) -> list[str]:
    """The names of the narinfos."""
    return [f"{base32(number.to_bytes(20, 'big'))}.narinfo" for number in range(count)]


def read_infos(url: str, headers: str, paths: int) -> float:
    """Read so many narinfos on some connections in turns; how many a second."""
    place = urllib.parse.urlsplit(url)
    address = (str(place.hostname), int(place.port or 80))
    heads = [
        f"GET {place.path}/{name} HTTP/1.1\r\nHost: {place.netloc}\r\n{headers}\r\n".encode()
        for name in names(paths)
    ]
    socks = [socket.create_connection(address, 10) for _ in range(CONNECTIONS)]
    count, end = 0, time.monotonic() + SECONDS
    begin = time.monotonic()
    while time.monotonic() < end:
        for sock in socks:
            sock.sendall(heads[count % paths])
            count += 1
        for sock in socks:
            answer = b""
            while not answer.endswith(b"x\n"):
                part = sock.recv(BLOCK)
                if not part:
                    raise AssertionError(f"no narinfo came: {answer[:200]!r}")
                answer += part
    return count / (time.monotonic() - begin)


def read_nar(url: str, _headers: str, _paths: int) -> float:
    """Read a NAR; how many MB a second."""
    place = urllib.parse.urlsplit(url)
    with socket.create_connection((str(place.hostname), int(place.port or 80)), 10) as sock:
        head = f"GET {place.path}/{NAR} HTTP/1.0\r\nHost: {place.netloc}\r\n\r\n"
        sock.sendall(head.encode())
        begin, count, buffer = time.monotonic(), 0, bytearray(BLOCK)
        while part := sock.recv_into(buffer):
            count += part
    assert count >= NAR_BYTES, count
    return count / (time.monotonic() - begin) / 1e6


@contextlib.contextmanager
def bare(place: Path, nar: Path) -> Iterator[str]:
    """The bare server's URL."""
    (place / "bare.py").write_text(BARE.format(nar=str(nar)))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    options = ["--worker-class=gthread", f"--threads={CONNECTIONS}", "--keep-alive=75"]
    argv = [sys.executable, "-m", "gunicorn", f"--bind=127.0.0.1:{port}", *options]
    process = subprocess.Popen([*argv, "bare:application", "--log-file=log"], cwd=place)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def best(work: str, url: str, headers: str = "", paths: int = PATHS) -> float:
    """The best of some rounds, each in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return max(pool.apply(globals()[work], (url, headers, paths)) for _ in range(ROUNDS))


def main() -> None:
    with directory() as place, running() as server:
        (nar := Path(place, "nar")).write_bytes(bytes(NAR_BYTES))
        for name, options in (("open", []), ("closed", ["--private"])):
            server.command("cache", "create", name, *options)
            files = server.data / "cache" / name
            (files / "nar").mkdir(parents=True, exist_ok=True)
            for file_name in names(MANY if name == "open" else PATHS):
                (files / file_name).write_text(INFO)
        (server.data / "cache" / "open" / NAR).write_bytes(bytes(NAR_BYTES))
        secret = server.command("token", "create", "activate").strip()
        with bare(place, nar) as url:
            report(server.url, url, f"Authorization: Bearer {secret}\r\n")


def report(ours: str, bare_url: str, header: str) -> None:
    """Print the figures."""
    raw = best("read_infos", bare_url)
    for name, headers in (("open", ""), ("closed", header)):
        rate = best("read_infos", f"{ours}/cache/{name}", headers)
        figure(f"narinfos of the {name} cache", rate, "a second", TARGET, at_least=True)
        say(f"the bare server answers {raw:.0f} a second: ratio {rate / raw:.2f}")
    rate = best("read_infos", f"{ours}/cache/open", "", MANY)
    figure("narinfos that are read from files", rate, "a second", TARGET, at_least=True)
    raw = best("read_nar", bare_url)
    rate = best("read_nar", f"{ours}/cache/open")
    say(f"a NAR of {NAR_BYTES >> 20} MiB: {rate:.0f} MB/s, the bare server {raw:.0f} MB/s")
    say(f"ratio {rate / raw:.2f}")


if __name__ == "__main__":
    main()
