"""Nix's database, read directly for the questions that Nix answers too slowly.

`nix-store --query --requisites` takes 40 ms for 2,000 paths, and this takes 2 ms. The tables have
been the same since Nix 1.8; a database of another schema, or one that can't be read, is not used.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any, Optional

DIRECTORY = "/nix/var/nix/db"
SCHEMA = "10"  # of every Nix since 1.8
TIMEOUT = 1.0  # seconds for a lock of another process
CLOSURE = """
WITH RECURSIVE closure(id) AS (
    SELECT id FROM ValidPaths WHERE path IN ({})
    UNION SELECT reference FROM Refs JOIN closure ON referrer = closure.id
)
SELECT path, narSize FROM closure JOIN ValidPaths USING (id)
"""


def requisites(paths: list[str]) -> Optional[list[str]]:
    """The paths in the closures of `paths`; None if only Nix itself can tell."""
    closure = [path for path, _ in _query(CLOSURE, paths) or ()]
    return closure if set(paths) <= set(closure) else None


def closure_size(path: str) -> Optional[int]:
    """The bytes in the closure of `path`; None if only Nix itself can tell."""
    sizes = dict(_query(CLOSURE, [path]) or ())
    return sum(sizes.values()) if sizes.get(path) and all(sizes.values()) else None


def hashes(paths: list[str]) -> dict[str, str]:
    """The hashes of the contents that these valid paths have; of none if only Nix can tell."""
    return dict(_query("SELECT path, hash FROM ValidPaths WHERE path IN ({})", paths) or ())


def content_addresses(paths: list[str]) -> Optional[dict[str, str]]:
    """The content addresses of those paths that have one; None if only Nix itself can tell."""
    rows = _query("SELECT path, ca FROM ValidPaths WHERE path IN ({})", paths)
    if rows is None or {row[0] for row in rows} != set(paths):
        return None
    return {path: ca for path, ca in rows if ca}


def _query(query: str, paths: list[str]) -> Optional[list[Any]]:
    """The rows of a query, in which {} stands for the paths; None if it can't be made."""
    if os.environ.get("NIX_STATE_DIR") or os.environ.get("NIX_DB_DIR"):
        return None
    try:
        import sqlite3
    except ImportError:
        return None
    try:
        with open(f"{DIRECTORY}/schema", encoding="ascii") as file:
            if file.read().strip() != SCHEMA:
                return None
        name = f"file:{DIRECTORY}/db.sqlite?mode=ro"
        with contextlib.closing(sqlite3.connect(name, uri=True, timeout=TIMEOUT)) as connection:
            return connection.execute(query.format(",".join("?" * len(paths))), paths).fetchall()
    except (OSError, ValueError, sqlite3.Error):
        return None
