"""The difference of two systems: packages, as far as the narinfos of our caches tell."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from cachix_workspace import recent
from cachix_workspace.cache import CacheRow
from cachix_workspace.settings import Settings
from cachix_workspace.stores import store_of

MOST_PATHS = 6000  # of one closure
MOST_SECONDS = 1.5
MOST_SHOWN = 200
VERSION = re.compile(r"(.+?)-(\d[^/]*)")
PARTS = re.compile(r"-(bin|dev|lib|man|doc|out|info|debug|data)$")


@dataclass(frozen=True)
class Change:
    """A package of which other versions are there now. None before: added; none after: removed."""

    name: str
    before: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def kind(self) -> str:
        """added, removed or changed."""
        return "added" if not self.before else "removed" if not self.after else "changed"


@dataclass(frozen=True)
class Difference:
    """The changes between two closures. Of `missing` paths, in no cache, nothing is known."""

    changes: list[Change]
    left_out: int
    missing: int


def between(
    settings: Settings, rows: Collection[CacheRow], before: str | None, after: str
) -> Difference | None:
    """The changes from a store path to another; None if our caches tell nothing of one of them."""
    if before is None or before == after:
        return None
    end = time.monotonic() + MOST_SECONDS
    old, missing_old = _closure(settings, rows, before, end)
    new, missing_new = _closure(settings, rows, after, end)
    if not old or not new:
        return None
    then, now = _packages(old - new), _packages(new - old)
    names = sorted(set(then) | set(now), key=str.lower)
    changes = [Change(name, _sorted(then[name]), _sorted(now[name])) for name in names]
    changes = [each for each in changes if each.before != each.after]
    return Difference(
        changes[:MOST_SHOWN], max(0, len(changes) - MOST_SHOWN), len(missing_old | missing_new)
    )


def _closure(
    settings: Settings, rows: Collection[CacheRow], top: str, end: float
) -> tuple[set[str], set[str]]:
    """The names (hash and all) of a closure's paths that are in a cache, and of those that are not.

    None are in a cache if the first one is not.
    """
    todo, seen, missing = [top[11:]], {top[11:]}, set[str]()
    while todo and len(seen) < MOST_PATHS and time.monotonic() < end:
        name = todo.pop()
        closure = None
        for row in rows:
            store = store_of(settings, row.name)
            closure = closure or recent.read(store, f"{name[:32]}.narinfo")
        if closure is None:
            missing.add(name)
            continue
        new = [one for one in closure.references if one not in seen]
        seen.update(new)
        todo += new
    return (set() if top[11:] in missing else seen), missing


def _packages(names: Collection[str]) -> dict[str, set[str]]:
    """The versions in names of store paths, by package."""
    versions: dict[str, set[str]] = defaultdict(set)
    for name in names:
        match = VERSION.fullmatch(name[33:])
        package, version = (match[1], match[2]) if match else (name[33:], "")
        versions[package].add(PARTS.sub("", version))
    return versions


def _sorted(versions: Collection[str]) -> tuple[str, ...]:
    return tuple(sorted(version or "(no version)" for version in versions))
