"""How much of a download has come, by the lines that Nix writes into the log of a deployment.

Nix says once how much it will fetch, and names each path when it begins with it. The sizes of paths
that our caches do not have are taken for equal.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sqlalchemy import Connection

from cachix_protocol import is_store_path, loads
from cachix_workspace import logtext, recent
from cachix_workspace.cache import CacheRow
from cachix_workspace.files import Store
from cachix_workspace.settings import Settings
from cachix_workspace.stores import store_of

MOST_LINES = 5000  # that are read, from the log's start
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
# https://github.com/NixOS/nix/blob/2.8.0/src/libmain/shared.cc, printMissing
ESTIMATE = re.compile(r"th(?:is|ese)(?: [0-9]+)? paths? will be fetched \(([0-9.]+) ([KMG]iB) down")
BEGUN = re.compile(r"copying path '(/nix/store/[^'/]+)' from")


@dataclass(frozen=True)
class Progress:
    """Bytes of a download: those that have come, and all of them."""

    done: int
    total: int


def progress(lines: Iterable[str], size_of: Callable[[str], int | None]) -> Progress | None:
    """The progress that these lines of a log tell. None before Nix has said what it fetches.

    The path that was begun last is still on its way. `size_of` gives the size of a store path.
    """
    total, is_list = 0, False
    wanted: dict[str, None] = {}
    begun: dict[str, None] = {}
    for line in lines:
        if match := ESTIMATE.search(line):
            total, wanted, begun = int(float(match[1]) * UNITS[match[2]]), {}, {}
            is_list = True
        elif is_list and is_store_path(line.strip()):
            wanted[line.strip()] = None
        elif match := BEGUN.search(line):
            begun[match[1]], is_list = None, False
        else:
            is_list = False
    if not total:
        return None
    sizes = {path: size_of(path) for path in wanted}
    known = sum(size for size in sizes.values() if size is not None)
    unknown = sum(size is None for size in sizes.values())
    each = max(0, total - known) // unknown if unknown else 0
    done = sum(sizes[path] or each for path in list(begun)[:-1] if path in sizes)
    return Progress(min(done, total), total)


def of_deployment(
    connection: Connection, settings: Settings, rows: list[CacheRow], deployment_id: str
) -> Progress | None:
    """The progress of a deployment's download, as far as its log tells."""

    def size_of(store_path: str) -> int | None:
        name = f"{store_path[11:43]}.narinfo"
        sizes = (_size(store_of(settings, row.name), name) for row in rows)
        return next((size for size in sizes if size is not None), None)

    lines = logtext.read_lines(connection, deployment_id, 0, MOST_LINES)
    return progress((str(loads(line)["line"]) for line in lines), size_of)


def _size(store: Store, name: str) -> int | None:
    return _known_size(store, name) if store.entry(name) is not None else None


@functools.lru_cache(maxsize=20_000)
def _known_size(store: Store, name: str) -> int | None:
    info = recent.read(store, name)
    return None if info is None else info.file_size
