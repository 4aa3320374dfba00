"""Recent pushes to a cache: top-level paths, of which no other recent path is a part."""

from __future__ import annotations

import heapq
import os
import re
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from cachix_workspace import cache
from cachix_workspace.cache import CacheRow
from cachix_workspace.files import Store
from cachix_workspace.narinfo import Narinfo
from cachix_workspace.settings import Settings
from cachix_workspace.stores import store_of

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
    """The recent paths of a cache, the time of the look, and the time of its directory then."""

    moment: float
    changed: int
    paths: list[Recent]


_lock = threading.Lock()
_looks: dict[str, Look] = {}


def kind_of(store_path: str) -> str:
    """The kind of a store path by its name: nixos, darwin, home-manager or profile."""
    name = store_path[44:]
    return next((kind for pattern, kind in KINDS if pattern.match(name)), "profile")


def recent(settings: Settings, row: CacheRow) -> list[Recent]:
    """The newest top-level paths of a cache. A look counts until something is pushed."""
    store = store_of(settings, row.name)
    now, key = time.monotonic(), f"{store} {row.all_keys}"
    try:
        changed = store.changed()
    except OSError:
        return []
    with _lock:
        last = _looks.get(key)
    if last is not None and (last.changed == changed or now - last.moment < KEPT):
        return last.paths
    look = _look(row, store)
    with _lock:
        _looks[key] = Look(now, changed, look)
    return look


def _look(row: CacheRow, store: Store) -> list[Recent]:
    infos = [(pushed, info) for pushed, name in _newest(store) if (info := read(store, name))]
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


def _newest(store: Store) -> Iterable[tuple[float, str]]:
    """The names of the newest narinfos, and when they were written, in seconds since 1970."""
    try:
        infos = (entry for entry in store.entries() if entry.name.endswith(".narinfo"))
        newest = heapq.nlargest(MOST_LOOKED_AT, infos, key=lambda entry: entry.modified)
    except OSError:
        return []
    return [(entry.modified / 1e9, entry.name) for entry in newest]


def read(store: Store, name: str) -> Narinfo | None:
    """A narinfo; None if there is none that can be read now."""
    try:
        return cache.read(store, name)
    except OSError:
        return None


def _system_of(store_path: str) -> str | None:
    match = SYSTEMS.search(store_path)
    return None if match is None else match[0]


def find(settings: Settings, rows: Iterable[CacheRow], store_path: str) -> Narinfo | None:
    """The entry of a path in the first of these caches that has it."""
    name = f"{store_path[11:43]}.narinfo"
    for row in rows:
        info = read(store_of(settings, row.name), name)
        if info is not None and info.store_path == store_path:
            return info
    return None
