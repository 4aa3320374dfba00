"""The commands `push` and `activate --push`: they bring closures to the workspace's cache."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any, Optional

from activate import nix, startup
from activate.text import clean, format_size, is_store_path
from cachix_cache import Offer, offer
from cachix_connection import Answer, Peer, http
from cachix_console import Screen, read_token, tell
from cachix_diagnosis import sentence
from cachix_follow import decode_answer, no_workspace
from cachix_line import repeated
from cachix_narinfo import KEY_VARIABLE, CacheKey, PathInfo, closure, invalid
from cachix_options import HOSTED, PushOptions, host_of, push_options
from cachix_protocol import (
    Cache,
    Error,
    Spec,
    Undecodable,
    UsageError,
    checked_field,
    dumps,
    listed,
)
from cachix_spec import decode_spec
from cachix_upload import Done, Upload
from cachix_upstream import Upstream

PATIENCE = 60.0  # seconds for an answer about thousands of paths
MOST_SPEC = 64 << 20  # bytes of a deploy.json


def push_command(options: dict[str, Any]) -> int:
    """Push the paths of a command line; the exit status. Raises Error."""
    startup.protect(writes=False)
    peer = Peer.create(
        host_of(options), read_token("CACHIX_ACTIVATE_TOKEN", options["--token-file"])
    )
    Screen().print(push(peer, store_paths(options["PATH"]), push_options(options)))
    return 0


def push_spec(peer: Peer, spec: Spec, options: PushOptions) -> str:
    """Push all that a deploy.json names; a line about it. Raises Error."""
    return push(peer, paths_of(spec), options)


def push(peer: Peer, paths: list[str], options: PushOptions) -> str:
    """Push the closures of store paths; a line that says what was done. Raises Error.

    These paths themselves are pushed although an upstream has them: agents take a system only with
    the signature of their own cache. An upstream that can't be asked counts as having nothing.
    """
    start = time.monotonic()
    cache = find_cache(peer, options.cache)
    key = read_key(options).named(cache.keys, cache.url)
    present, infos = local_closure(peer, paths, options.cache)
    lacking = set(missing(peer, [info.hash for info in infos], options.cache))
    todo = [info for info in infos if info.hash in lacking]
    upstreams = ask_upstreams(
        [info.path for info in todo if info.path not in paths], options.upstreams
    )
    elsewhere = {path for upstream in upstreams for path in upstream.present}
    todo = [info for info in todo if info.path not in elsewhere]
    progress = Progress(todo)
    try:
        done = Upload(cache.url, peer.token, key, todo).run(progress.show)
    finally:
        progress.end()
    there = present + len(infos) - len(lacking)
    return summary(done, time.monotonic() - start, there, upstreams)


# --- paths ----------------------------------------------------------------------------------------


def paths_of(spec: Spec) -> list[str]:
    """The store paths that a deploy.json names."""
    return list(dict.fromkeys([*spec.agents.values(), *spec.rollback_scripts.values()]))


def store_paths(arguments: Iterable[str]) -> list[str]:
    """The store paths that arguments name: by a path, a link, or a deploy.json. Raises Error."""
    paths: list[str] = []
    for argument in arguments:
        path = nix.target(argument) or nix.store_path_of(argument)
        spec = read_spec(argument)
        if spec is not None:
            paths += paths_of(spec)
        elif is_store_path(path):
            paths.append(path)
        elif os.path.lexists(argument):
            raise UsageError(f"{argument} is neither in a store path nor a deploy.json")
        else:
            raise UsageError(f"there is no {argument}: name a store path, a link or a deploy.json")
    return list(dict.fromkeys(paths))


def read_spec(path: str) -> Optional[Spec]:
    """The deploy.json in a file; None if it is something else. Raises Error if it is damaged."""
    with contextlib.suppress(OSError):
        status, place = os.stat(path), os.path.realpath(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_SPEC:
            return None
        with open(path, "rb") as file:
            raw = file.read()
        names_agents = raw.lstrip()[:1] == b"{" and b'"agents"' in raw
        if names_agents if place.startswith(nix.STORE) else place.endswith(".json"):
            return decode_spec(raw, path)
    return None


def local_closure(peer: Peer, paths: list[str], cache: Optional[str]) -> tuple[int, list[PathInfo]]:
    """The closures of paths. Those that are not in this machine's store must be in the cache.

    Returns their number, and the paths of the closures of the others. Raises Error.
    """
    absent = invalid(paths)
    gone = set(missing(peer, [path[11:43] for path in absent], cache)) if absent else set()
    unknown = [path for path in absent if path[11:43] in gone]
    if unknown:
        raise Error(f"neither this machine nor the cache has {listed(unknown)}: build it first")
    here = [path for path in paths if path not in absent]
    return len(absent), closure(here) if here else []


# --- the workspace --------------------------------------------------------------------------------


def find_cache(peer: Peer, name: Optional[str]) -> Offer:
    """The workspace's cache. Raises Error."""
    if peer.host == HOSTED:
        hint = "push with `cachix push NAME PATH`, and deploy without --push"
        raise UsageError(f"{HOSTED} has caches of its own, with another protocol: {hint}")
    answer = ask(peer, "GET", f"/api/v1/deploy/cache{query(name)}")
    try:
        if answer.status == 404 and "no cache" not in sentence(answer.body):
            raise Error(f"{peer.host} names no cache (HTTP 404): is it an older workspace?")
        cache = offer(peer.host, Cache.from_json(decode_answer(peer, answer)))
    except Undecodable as problem:
        raise no_workspace(peer, problem) from None
    if not cache.is_near:
        place = "another host than the workspace, or less encrypted"
        raise Error(f"the cache is at {cache.url}: {place}, so that no token is sent there")
    return cache


def missing(peer: Peer, hashes: list[str], name: Optional[str]) -> list[str]:
    """Those of store paths' hashes that the workspace's cache lacks. Raises Error."""
    answer = ask(peer, "POST", f"/api/v1/deploy/cache/missing{query(name)}", dumps(hashes))
    try:
        lacking: list[str] = checked_field(decode_answer(peer, answer), "missing", list)
        if not set(lacking) <= set(hashes):
            raise Undecodable("it misses paths that it was not asked for")
    except (Undecodable, TypeError) as problem:
        raise no_workspace(peer, Undecodable(str(problem))) from None
    return lacking


def ask(peer: Peer, method: str, path: str, body: str = "") -> Answer:
    """The workspace's answer to a request. Raises Unreachable."""
    headers = {"Content-Type": "application/json;charset=utf-8"}

    def call() -> Answer:
        return http(peer, method, path, PATIENCE, data=body.encode(), headers=headers)

    return repeated(call, threading.Event())


def query(name: Optional[str]) -> str:
    """The query that names a cache."""
    from urllib.parse import quote

    return f"?name={quote(name, safe='')}" if name else ""


def read_key(options: PushOptions) -> CacheKey:
    """The cache's secret key. Raises UsageError."""
    if options.key_file is not None:
        return CacheKey.read(options.key_file)
    text = os.environ.get(KEY_VARIABLE, "")
    if not text.strip():
        raise UsageError(f"no key to sign with: set {KEY_VARIABLE}, or give --cache-key=FILE")
    return CacheKey.parse(text, KEY_VARIABLE)


def ask_upstreams(paths: list[str], urls: tuple[str, ...]) -> list[Upstream]:
    """Upstreams, each asked for the paths that none before it has."""
    asked = []
    for url in urls:
        upstream = Upstream(url)
        present = upstream.ask(paths) if paths else set()
        paths = [path for path in paths if path not in present]
        if upstream.problem:
            more = f"{len(paths):,} paths are pushed that it may have"
            tell(f"warning: the upstream cache can't be asked, {more}: {upstream.problem}")
        asked.append(upstream)
    return asked


# --- messages -------------------------------------------------------------------------------------


def counted(number: int) -> str:
    """A number of paths."""
    return f"{number:,} path{'' if number == 1 else 's'}"


def summary(done: Done, seconds: float, there: int, upstreams: list[Upstream]) -> str:
    """One line about a push that has ended."""
    size = format_size(done.size) if done.size else "0 bytes"
    time = f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    parts = [f"pushed {counted(done.paths)} ({size}) in {time}"]
    counts = [(there, "the cache already")]
    counts += [(len(upstream.present), upstream.name) for upstream in upstreams]
    for number, place in counts:
        if number:
            parts.append(f"{number:,} {'is' if number == 1 else 'are'} in {place}")
    return ", ".join(parts)


class Progress:
    """How far a push is, on stderr: in place on a terminal, elsewhere a line each 10 s."""

    def __init__(self, infos: list[PathInfo]) -> None:
        self.count, self.due = len(infos), time.monotonic() + 10
        stream: Any = getattr(sys.stderr, "buffer", None)
        self.terminal: Any = stream if stream is not None and stream.isatty() else None
        self.is_shown = False

    def show(self, done: Done) -> None:
        """Say how much is done, if that is due."""
        text = f"pushing: {done.paths:,} of {counted(self.count)}, {format_size(done.size)}"
        if self.terminal is not None:
            self._write(f"\r\x1b[K{clean(text)}")
            self.is_shown = True
        elif time.monotonic() >= self.due:
            self.due += 10
            tell(text)

    def end(self) -> None:
        """Remove what is shown in place."""
        if self.is_shown:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.terminal.write(text.encode())
            self.terminal.flush()
