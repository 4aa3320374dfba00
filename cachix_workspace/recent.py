"""What was pushed to a cache of late: top-level paths, of which no other recent path is a part."""

from __future__ import annotations

import heapq
import os
import re
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cachix_workspace import cache
from cachix_workspace.cache import CacheRow
from cachix_workspace.narinfo import MOST_BYTES, Narinfo
from cachix_workspace.refusal import Refusal
from cachix_workspace.settings import Settings

MOST_LOOKED_AT = 400  # narinfos, the newest
MOST_SHOWN = 40
KEPT = 1.0  # seconds for which a look counts, whatever is pushed meanwhile
SYSTEMS = re.compile(r"\b(x86_64|aarch64|i686|armv7l|riscv64)-(linux|darwin)\b")
KINDS = (
    (re.compile(r"nixos-system-"), "nixos"),
    (re.compile(r"darwin-system-"), "darwin"),
    (re.compile(r"home-manager-generation"), "home-manager"),
)


@dataclass(frozen=True)
class Recent:
    """A path that was pushed of late. `pushed` is in seconds since 1970, `size` in bytes."""

    store_path: str
    pushed: float
    size: int
    kind: str
    system: str | None  # as far as its name tells
    is_signed: bool


@dataclass(frozen=True)
class Look:
    """What a look at a cache has found, when, and how old the directory was then."""

    moment: float
    changed: int
    found: list[Recent]


_lock = threading.Lock()
_looks: dict[str, Look] = {}


def kind_of(store_path: str) -> str:
    """What a store path is, as far as its name tells: nixos, darwin, home-manager or profile."""
    name = store_path[44:]
    return next((kind for pattern, kind in KINDS if pattern.match(name)), "profile")


def recent(settings: Settings, row: CacheRow) -> list[Recent]:
    """The newest top-level paths of a cache. A look counts until something is pushed."""
    directory = cache.path_of(settings, row.name, "x").parent
    now, key = time.monotonic(), f"{directory} {row.all_keys}"
    try:
        changed = directory.stat().st_mtime_ns
    except OSError:
        return []
    with _lock:
        last = _looks.get(key)
    if last is not None and (last.changed == changed or now - last.moment < KEPT):
        return last.found
    found = _look(row, directory)
    with _lock:
        _looks[key] = Look(now, changed, found)
    return found


def _look(row: CacheRow, directory: Path) -> list[Recent]:
    infos = [(pushed, info) for pushed, path in _newest(directory) if (info := read(path))]
    parts = {
        reference
        for _, info in infos
        for reference in info.references
        if reference != os.path.basename(info.store_path)
    }
    keys = row.keys
    return [
        Recent(
            info.store_path,
            pushed,
            info.size,
            kind_of(info.store_path),
            _system_of(info.store_path),
            info.is_signed_by(keys),
        )
        for pushed, info in infos
        if os.path.basename(info.store_path) not in parts
    ][:MOST_SHOWN]


def _newest(directory: Path) -> Iterable[tuple[float, Path]]:
    """The newest narinfos of a directory, by when they were written."""
    try:
        with os.scandir(directory) as entries:
            times = (
                (entry.stat(follow_symlinks=False).st_mtime, entry.path)
                for entry in entries
                if entry.name.endswith(".narinfo")
            )
            newest = heapq.nlargest(MOST_LOOKED_AT, times)
    except OSError:
        return []
    return [(moment, Path(path)) for moment, path in newest]


def read(path: Path) -> Narinfo | None:
    """The narinfo in a file; None if there is none that can be read."""
    try:
        with path.open("rb") as file:
            return Narinfo.parse(path.name, file.read(MOST_BYTES))
    except (OSError, Refusal):
        return None


def _system_of(store_path: str) -> str | None:
    match = SYSTEMS.search(store_path)
    return None if match is None else match[0]


def find(settings: Settings, rows: Iterable[CacheRow], store_path: str) -> Narinfo | None:
    """What the first of these caches that has a path says of it."""
    name = f"{store_path[11:43]}.narinfo"
    for row in rows:
        info = read(cache.path_of(settings, row.name, name))
        if info is not None and info.store_path == store_path:
            return info
    return None
