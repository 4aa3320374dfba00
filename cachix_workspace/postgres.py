"""The programs of PostgreSQL, which copy databases: pg_dump and pg_restore."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
from pathlib import Path

from sqlalchemy import make_url

from cachix_protocol import Error

DUMP_SECONDS = 6 * 3600.0
# Debian has the programs of each release in a directory of its own.
PLACES = ("/usr/lib/postgresql/*/bin", "/run/current-system/sw/bin")
VARIABLES = {
    **{"host": "PGHOST", "port": "PGPORT", "username": "PGUSER", "password": "PGPASSWORD"},
    **{"database": "PGDATABASE"},
}


def dump(url: str, target: Path) -> None:
    """Copy a database as it is at one moment into a file. Raises Error."""
    _run("pg_dump", ["--format=custom", "--no-owner", "--no-acl", f"--file={target}"], url)


def restore(source: Path, url: str) -> None:
    """Fill an empty database from such a file: all of it, or nothing. Raises Error."""
    options = ["--single-transaction", "--exit-on-error", "--no-owner", "--no-acl"]
    name = make_url(url).database or ""
    _run("pg_restore", [*options, f"--dbname={name}", str(source)], url)


def _run(program: str, arguments: list[str], url: str) -> None:
    """Run a program of PostgreSQL on a database. Raises Error with what it complains of."""
    path = _find(program)
    try:
        process = subprocess.run(
            [path, *arguments],
            env={**os.environ, **environment(url)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=DUMP_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Error(f"{program} has not ended after {DUMP_SECONDS / 3600:.0f} hours") from None
    if process.returncode:
        lines = process.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason"]
        raise Error(f"{program} failed: {lines[0].partition('error: ')[2] or lines[0]}")


def _find(program: str) -> str:
    """The path of a program of PostgreSQL, the newest one. Raises Error."""
    path = shutil.which(program)
    if path is None:
        places = sorted(place for pattern in PLACES for place in glob.glob(pattern))
        path = next(filter(None, (shutil.which(program, path=at) for at in places[::-1])), None)
    if path is None:
        hint = "install the programs of PostgreSQL, of the server's release or newer"
        raise Error(f"{program} is missing: {hint}")
    return path


def environment(url: str) -> dict[str, str]:
    """The variables by which these programs find a database: no command line has a password."""
    parts = make_url(url)
    values = {name: getattr(parts, name) for name in VARIABLES}
    query = {name: value for name, value in parts.query.items() if isinstance(value, str)}
    values["host"] = values["host"] or query.get("host")
    values["port"] = values["port"] or query.get("port")
    found = {VARIABLES[name]: str(value) for name, value in values.items() if value}
    for name in ("sslmode", "sslrootcert", "sslcert", "sslkey", "passfile", "service"):
        if name in query:
            found[f"PG{name.upper()}"] = query[name]
    return {"PGCONNECT_TIMEOUT": "10", **found}
