"""PostgreSQL for the tests: one cluster for a session, in a directory, on a unix socket.

With `--postgresql` each workspace of a test has a database of its own there, which is a copy of a
template with the tables.
"""

from __future__ import annotations

import atexit
import contextlib
import glob
import os
import pwd
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

PLACES = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/usr/local/bin", "/usr/bin")
TEMPLATE = "template_of_tests"
# On a small disk: a full one lets the log of writes fail at once, as no file of it is kept.
SMALL = ("max_wal_size=16MB", "min_wal_size=2MB", "wal_recycle=off")
# Nothing survives the session, so that nothing must be synced.
FAST = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "max_connections=400")


def programs() -> str | None:
    """The directory of the newest PostgreSQL's programs; None without one."""
    places = [place for pattern in PLACES for place in sorted(glob.glob(pattern), reverse=True)]
    return next((place for place in places if os.path.exists(f"{place}/initdb")), None)


class Cluster:
    """A PostgreSQL server. `create` makes a database; `restart` and `stop` are for faults.

    With `disk` it has a disk of its own, of so many MiB, which only root can make.
    """

    def __init__(self, *settings: str, disk: int = 0) -> None:
        found = programs()
        assert found is not None
        self.bin, self.disk = found, disk
        self.directory = Path(tempfile.mkdtemp(prefix="pg-"))
        self.settings = settings or FAST
        if disk:
            self.settings += SMALL
            argv = ["mount", "-t", "tmpfs", "-o", f"size={disk}m", "tmpfs", str(self.directory)]
            subprocess.run(argv, check=True)
        self.user: dict[str, Any] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(self.directory, nobody.pw_uid, nobody.pw_gid)
            self.user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        self.data = self.directory / "data"
        options = ["--auth=trust", "--username=tests", "--encoding=UTF8", "--no-sync"]
        options += ["--wal-segsize=1"] if disk else []
        self.run("initdb", f"--pgdata={self.data}", *options, "--locale=C.UTF-8")
        self.lock = threading.Lock()
        self.made: dict[Path, str] = {}
        self.count = 0
        self.start()
        atexit.register(self.remove)

    def run(self, program: str, *arguments: str) -> str:
        """Run a program of PostgreSQL as the owner of the cluster; what it prints."""
        process = subprocess.run(
            [f"{self.bin}/{program}", *arguments],
            **self.user,
            cwd=self.directory,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        assert process.returncode == 0, process.stdout
        return process.stdout

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        settings = ["listen_addresses=", f"unix_socket_directories={self.directory}"]
        words = " ".join(f"-c {setting}" for setting in (*settings, *self.settings))
        log = self.directory / "log"
        self.run("pg_ctl", f"--pgdata={self.data}", f"--log={log}", "-o", words, "-w", "start")

    def stop(self, mode: str = "fast") -> None:
        """Stop it: `immediate` is as a crash."""
        self.run("pg_ctl", f"--pgdata={self.data}", f"--mode={mode}", "-w", "stop")

    def restart(self, mode: str = "fast") -> None:
        """Stop and start it."""
        self.stop(mode)
        self.start()

    def panic(self) -> None:
        """On a full disk: let it need room for its log of writes, and end for lack of it."""
        query = "SELECT pg_switch_wal(); CREATE TABLE none (); SELECT pg_switch_wal()"
        with contextlib.suppress(AssertionError):
            self.sql("postgres", query)

    def revive(self) -> None:
        """Wait until it takes connections; start it if it has found no room to recover."""
        deadline = time.monotonic() + 60.0
        while True:
            try:
                self.sql("postgres", "SELECT 1")
                return
            except AssertionError:
                assert time.monotonic() < deadline
            with contextlib.suppress(AssertionError):
                self.start()
            time.sleep(0.2)

    def remove(self) -> None:
        """Stop it for good."""
        atexit.unregister(self.remove)
        with contextlib.suppress(AssertionError):
            self.stop("immediate")
        if self.disk:
            subprocess.run(["umount", "--lazy", str(self.directory)], check=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def url(self, database: str) -> str:
        """The URL of a database."""
        host = quote(str(self.directory), safe="")
        return f"postgresql+psycopg://tests@/{database}?host={host}"

    def sql(self, database: str, statement: str) -> str:
        """Run a statement as psql does."""
        options = [f"--host={self.directory}", "--username=tests", "--no-psqlrc", "--tuples-only"]
        return self.run("psql", *options, "--no-align", f"--dbname={database}", "-c", statement)

    def create(self, template: str = "template0") -> str:
        """Make a database; its URL."""
        with self.lock:
            self.count += 1
            name = f"tests_{self.count}"
            self.sql("postgres", f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.url(name)

    def make_template(self) -> None:
        """Make the template with the tables."""
        from cachix_workspace.database import Database, prepare

        self.sql("postgres", f"CREATE DATABASE {TEMPLATE} TEMPLATE template0")
        database = Database(self.url(TEMPLATE))
        with database.write() as connection:
            prepare(connection)
        database.close()

    def provide(self, data: Path) -> str:
        """The URL of the database of a data directory, which names it from then on."""
        from cachix_workspace import engine
        from cachix_workspace.settings import DATABASE

        data = data.absolute()
        if data.joinpath(DATABASE).exists():
            return ""
        if data not in self.made or not data.joinpath(engine.NOTE).exists():
            self.made[data] = self.create(TEMPLATE)
            data.mkdir(mode=0o700, parents=True, exist_ok=True)
            engine.note_url(data, self.made[data], None)
        return self.made[data]


active: Cluster | None = None  # with --postgresql


def provide(data: str | Path) -> None:
    """With --postgresql, give a data directory its database."""
    if active is not None:
        active.provide(Path(data))


def data_of(arguments: tuple[str, ...] | list[str]) -> str | None:
    """The directory in the arguments of a command line."""
    matches = (re.fullmatch("--data=(.+)", argument) for argument in arguments)
    return next((match[1] for match in matches if match), None)


@contextlib.contextmanager
def in_use() -> Iterator[Cluster]:
    """Let all workspaces of this process, and those that tests start, have PostgreSQL."""
    global active
    from cachix_workspace import engine

    original, cluster = engine.noted_url, Cluster()
    cluster.make_template()

    def noted_url(data: Path) -> str:
        return cluster.provide(data) or original(data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "noted_url", noted_url)
        active = cluster
        try:
            yield cluster
        finally:
            active = None
            cluster.remove()


def require() -> None:
    """Skip a test without PostgreSQL, except in a CI."""
    if programs() is None:
        hint = "PostgreSQL is missing: `apt-get install postgresql`"
        if os.environ.get("CI") == "true":
            raise AssertionError(hint)
        pytest.skip(hint)


def note(data: Path, url: str) -> None:
    """Let a data directory name a database, as `serve --database` does."""
    from cachix_workspace import engine

    engine.note_url(data, url, None)
