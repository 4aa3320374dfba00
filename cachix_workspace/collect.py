"""Garbage collection of a cache: it keeps all that deployments, pins and late pushes need.

A path is needed if it is one of these, or in the closure of one, as far as narinfos of the cache
tell: references that live upstream end a closure. Files that were written within a day are kept, as
their push may go on.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import Connection, select

from cachix_protocol import is_store_path
from cachix_workspace import cache, recent, tables
from cachix_workspace.cache import CacheRow
from cachix_workspace.database import get_meta, put_meta
from cachix_workspace.files import Entry
from cachix_workspace.narinfo import Narinfo
from cachix_workspace.refusal import Refusal
from cachix_workspace.settings import Settings
from cachix_workspace.stores import store_of

DAY = 86_400.0  # seconds for which whatever is written stays at least
MOST_PINS = 1000


@dataclass(frozen=True)
class Plan:
    """The number of store paths that stay, those that go, and the files that go with them.

    A file that has changed since then stays.
    """

    kept: int
    removed: list[str]
    files: list[Entry]

    @property
    def size(self) -> int:
        """Bytes of all files that go."""
        return sum(file.size for file in self.files)


# --- roots ----------------------------------------------------------------------------------------


def roots(connection: Connection, count: int) -> set[str]:
    """The store paths that agents run, or need for one of their last `count` deployments."""
    agents, deployments = tables.agents, tables.deployments
    rows = connection.execute(select(agents.c.running, agents.c.deployed)).all()
    paths = {path for row in rows for path in row if path}
    columns = ("agent_id", "store_path", "rollback_script", "rollback_scripts", "before")
    query = select(*(deployments.c[name] for name in columns))
    query = query.order_by(deployments.c.agent_id, deployments.c.index.desc())
    seen: Counter[str] = Counter()
    for row in connection.execute(query):
        seen[row.agent_id] += 1
        if seen[row.agent_id] <= count:
            scripts = json.loads(row.rollback_scripts or "{}").values()
            paths.update(filter(None, (row.store_path, row.rollback_script, row.before, *scripts)))
    return paths


def pins(connection: Connection, row: CacheRow) -> list[str]:
    """The store paths that are pinned in a cache, in order."""
    paths: list[str] = json.loads(get_meta(connection, f"pins:{row.id}") or "[]")
    return paths


def pin(connection: Connection, settings: Settings, row: CacheRow, path: str) -> list[str]:
    """Keep a store path with its closure; all pins. Raises Refusal (400 or 404)."""
    if not is_store_path(path):
        raise Refusal(400, f"a pin is a store path, not {path[:200]!r}")
    if recent.find(settings, [row], path) is None:
        raise Refusal(404, f"the cache {row.name} does not have {path}: push it first")
    paths = sorted({*pins(connection, row), path})
    if len(paths) > MOST_PINS:
        raise Refusal(409, f"a cache has at most {MOST_PINS} pins: drop some by `cache unpin`")
    put_meta(connection, f"pins:{row.id}", json.dumps(paths))
    return paths


def unpin(connection: Connection, row: CacheRow, path: str) -> list[str]:
    """Let go of a store path; all pins. Raises Refusal (404)."""
    paths = pins(connection, row)
    if path not in paths:
        raise Refusal(404, f"{path[:200]} is not pinned in the cache {row.name}")
    paths.remove(path)
    put_meta(connection, f"pins:{row.id}", json.dumps(paths))
    return paths


# --- the plan -------------------------------------------------------------------------------------


def plan(settings: Settings, row: CacheRow, needed: Iterable[str], days: float) -> Plan:
    """Find out which files of a cache nothing needs. Raises OSError."""
    store, newest = store_of(settings, row.name), (time.time() - max(days * DAY, DAY)) * 1e9
    top = {entry.name: entry for entry in store.entries()}
    nars = {entry.name: entry for entry in store.entries("nar/")}
    names = [name for name in top if name.endswith(".narinfo")]
    infos = {name[:32]: cache.read(store, name) for name in names}
    starts = [path[11:43] for path in needed]
    starts += [key for key, info in infos.items() if _time(key, info, top, nars) >= newest]
    kept = closure(starts, infos)
    gone = [key for key in infos if key not in kept]
    used = {info.url for key in kept if (info := infos[key]) is not None}
    files = [top[name] for key in gone for name in (f"{key}.narinfo", f"{key}.ls") if name in top]
    files += [nar for name, nar in nars.items() if name not in used]
    paths = sorted(info.store_path if (info := infos[key]) else key for key in gone)
    return Plan(len(kept), paths, [file for file in files if file.modified < newest])


def closure(starts: Iterable[str], infos: dict[str, Narinfo | None]) -> set[str]:
    """The hashes of all that is reached from some, by references, and is in the cache."""
    todo = [key for key in starts if key in infos]
    seen = set(todo)
    while todo:
        info = infos[todo.pop()]
        new = {name[:32] for name in info.references} - seen if info else set()
        new &= infos.keys()
        seen |= new
        todo += new
    return seen


def _time(key: str, info: Narinfo | None, top: dict[str, Entry], nars: dict[str, Entry]) -> int:
    """When a path was pushed, or a push asked for it last: that touches the NAR."""
    pushed = top[f"{key}.narinfo"].modified
    nar = None if info is None else nars.get(info.url)
    return max(pushed, nar.modified if nar is not None else 0)


def carry_out(settings: Settings, row: CacheRow, plan: Plan) -> int:
    """Remove the files of a plan, narinfos first; the bytes that are free now. Raises OSError.

    A file that was written or asked for since is needed after all.
    """
    size, store = 0, store_of(settings, row.name)
    for file in sorted(plan.files, key=lambda file: not file.name.endswith(".narinfo")):
        present = store.entry(file.name)
        if present is not None and present.modified == file.modified:
            store.remove(file.name)
            size += file.size
    return size
