"""The store paths that a cache has of some, and those of its own that no agent takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from cachix_workspace import cache, recent
from cachix_workspace.cache import CacheRow
from cachix_workspace.settings import Settings
from cachix_workspace.stores import store_of


def lacking(settings: Settings, row: CacheRow, hashes: Iterable[str]) -> list[str]:
    """Those of some store paths, by their hashes, that a push has to upload."""

    store = store_of(settings, row.name)

    def is_there(path_hash: str) -> bool:
        info = recent.read(store, f"{path_hash}.narinfo")
        if info is None or not cache.is_whole(info, store, row):
            return False
        with contextlib.suppress(OSError):  # so that nothing collects it while the push goes on
            store.touch(info.url)
        return True

    return [one for one in hashes if not is_there(one)]


def unsigned(settings: Settings, row: CacheRow) -> list[str]:
    """The store paths that agents refuse: no key of the cache has signed them. In order.

    Earlier releases took them. Raises OSError.
    """
    paths, store = [], store_of(settings, row.name)
    for name in sorted(entry.name for entry in store.entries() if entry.name.endswith(".narinfo")):
        info = recent.read(store, name)
        if info is None or not info.is_signed_by(row.keys):
            paths.append(name if info is None else info.store_path)
    return paths
