"""Backups: a directory with the database and the caches, made beside a running server."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sqlalchemy import Connection, inspect, select, update
from sqlalchemy.exc import SQLAlchemyError

from cachix_protocol import CANCELLED, FAILED, IN_PROGRESS, PENDING, Error, __version__, utc_now
from cachix_workspace import audit, nodes, postgres
from cachix_workspace.database import (
    CACHE_STORE,
    Database,
    delete_meta,
    get_meta,
    open_database,
    put_meta,
    reason_of,
)
from cachix_workspace.deployments import ended, unreported
from cachix_workspace.directory import alone
from cachix_workspace.engine import place_of, url_of
from cachix_workspace.files import TEMPORARY
from cachix_workspace.settings import DATABASE, Settings
from cachix_workspace.tables import agents, deployments

DUMP = "workspace.dump"  # of PostgreSQL
FACTS = "backup.json"  # written last: without it a backup is not complete
CACHE = "cache"
RESTORING = ".restoring"  # in the data directory, until everything is there
SHOWN = datetime.timedelta(days=14)  # for which pages say that something is missing
RESTORED = "restored"  # the key in the meta table


@dataclass(frozen=True)
class Facts:
    """The facts about a backup; `ended` is how many deployments a restore had to end."""

    time: str
    program: str
    files: int
    size: int  # bytes of the files in caches
    ended: int = 0

    @property
    def sentence(self) -> str:
        """The facts for people."""
        return f"the database, and {self.files} files of caches ({self.size / (1 << 20):.1f} MiB)"


def back_up(settings: Settings, target: Path) -> Facts:
    """Copy a workspace into a new directory; the facts about the copy. Raises Error.

    The caches come last: they have at least what the database knows of.
    """
    time, url = utc_now(), url_of(settings)
    try:
        _make_empty(target)
        try:
            if url.startswith("sqlite"):
                _copy_database(settings.data / DATABASE, target / DATABASE)
            else:
                postgres.dump(url, target / DUMP)
            files, size = _copy_caches(settings.caches, target / CACHE)
            facts = Facts(time, __version__, files, size)
            _write_synced(target / FACTS, json.dumps(asdict(facts), indent=2) + "\n")
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
    except (OSError, sqlite3.Error) as error:
        raise Error(f"no backup was made: {_reason(error, target)}") from None
    return facts


def restore(source: Path, settings: Settings, by: str) -> Facts:
    """Make a workspace of a backup, in a data directory that has none; its facts. Raises Error.

    No agent executes anything twice: deployments that it may have had since are ended.
    """
    facts, data = read_facts(source), settings.data
    is_file = url_of(settings).startswith("sqlite")
    if not source.joinpath(DATABASE if is_file else DUMP).exists():
        kinds = ("PostgreSQL", "SQLite") if is_file else ("SQLite", "PostgreSQL")
        hint = "name the database by --database" if is_file else "then migrate-database moves it"
        raise Error(f"{source} has a database of {kinds[0]}: restore it to {kinds[0]}; {hint}")
    with alone(data):
        if data.joinpath(DATABASE).exists():
            raise Error(f"there is a workspace in {data}: move that directory away first")
        place = data / RESTORING
        try:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(mode=0o700)
            if is_file:
                shutil.copyfile(source / DATABASE, place / DATABASE)
                _check(place / DATABASE)
            else:
                _fill(source / DUMP, settings)
            count = _adapt(Settings(place) if is_file else settings, facts, by)
            _copy_caches(source / CACHE, place / CACHE)
            os.sync()
            if place.joinpath(CACHE).exists():
                os.rename(place / CACHE, data / CACHE)
            if is_file:
                os.rename(place / DATABASE, data / DATABASE)
            shutil.rmtree(place, ignore_errors=True)
        except (OSError, sqlite3.Error, SQLAlchemyError) as error:
            raise Error(f"{source} was not restored: {_reason(error, source)}") from None
    return replace(facts, ended=count)


def _fill(dump: Path, settings: Settings) -> None:
    """Fill a database of PostgreSQL. Raises Error if it has a workspace, or SQLAlchemyError."""
    url = url_of(settings)
    database = Database(url)
    try:
        with database.read() as connection:
            has_one = inspect(connection).has_table("meta")
    finally:
        database.close()
    if has_one:
        raise Error(f"{place_of(settings)} has a workspace: name an empty database")
    postgres.restore(dump, url)


def read_facts(source: Path) -> Facts:
    """The facts about a backup. Raises Error if there is none, or a part of one."""
    try:
        record = json.loads(source.joinpath(FACTS).read_text(encoding="utf-8"))
        return Facts(**{name: record[name] for name in ("time", "program", "files", "size")})
    except OSError as error:
        hint = "name a directory that `cachix-workspace backup` has written to its end"
        raise Error(f"{source} has no complete backup ({error.strerror}): {hint}") from None
    except (ValueError, KeyError, TypeError):
        raise Error(f"{source / FACTS} is damaged: use another backup") from None


def _reason(error: Exception, place: Path) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or place}: {error.strerror or error}"
    return reason_of(error)


def _make_empty(target: Path) -> None:
    """Make a directory. Raises OSError, or Error if it has files."""
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(target.iterdir()):
        raise Error(f"{target} has files: name a new directory for the backup")


def _copy_database(source: Path, target: Path) -> None:
    """Copy a database as it is at one moment. Others read and write it meanwhile."""
    with contextlib.closing(sqlite3.connect(source, timeout=60.0)) as connection:
        connection.execute("VACUUM INTO ?", (str(target),))
    with open(target, "rb") as file:
        os.fsync(file.fileno())


def _write_synced(path: Path, text: str) -> None:
    os.sync()  # of the files that were copied, and of their directories
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def restored(connection: Connection) -> dict[str, str] | None:
    """When the workspace was restored (`on`), and from the backup of which `time`; for days."""
    note = json.loads(get_meta(connection, RESTORED) or "{}")
    moment = datetime.datetime.now(datetime.timezone.utc) - SHOWN
    return note if note.get("on", "") > moment.strftime("%Y-%m-%dT%H:%M:%S") else None


# --- caches ---------------------------------------------------------------------------------------


def _copy_caches(source: Path, target: Path) -> tuple[int, int]:
    """Copy all caches; how many files they have, and of how many bytes."""
    count = size = 0
    for file in _in_order(source):
        other = target / file.relative_to(source)
        other.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # it was removed meanwhile
            _link_or_copy(file, other)
            count, size = count + 1, size + other.stat().st_size
    return count, size


def _in_order(source: Path) -> Iterator[Path]:
    """All files of caches; the narinfos first, as what each one names was there before it."""
    for is_narinfo in (True, False):
        for root, _, names in os.walk(source):
            for name in sorted(names):
                if name.endswith(".narinfo") == is_narinfo and not name.startswith(TEMPORARY):
                    yield Path(root, name)


def _link_or_copy(file: Path, target: Path) -> None:
    """Make a hard link: a file of a cache is replaced, and never changed."""
    try:
        os.link(file, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(file, target)


# --- what a restored database must not do ---------------------------------------------------------


def _check(path: Path) -> None:
    """Raises Error if the copy of a database is damaged, or sqlite3.Error."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        answer = connection.execute("PRAGMA quick_check").fetchone()[0]
    if answer != "ok":
        raise Error(f"the database of the backup is damaged: {answer}; use another backup")


def _adapt(settings: Settings, facts: Facts, by: str) -> int:
    """Prepare a database for a world that went on without it; how many deployments were ended."""
    database = open_database(settings)
    try:
        with database.write() as connection:
            count = _end_uncertain(connection, facts)
            nodes.forget_all(connection)
            note = json.dumps({"time": facts.time, "on": utc_now()})
            put_meta(connection, RESTORED, note)
            if not (get_meta(connection, CACHE_STORE) or "").startswith("s3://"):
                delete_meta(connection, CACHE_STORE)  # the caches are in the data directory now
            audit.record(connection, by, "restore", f"from the backup of {facts.time}")
    finally:
        database.close()
    return count


def _end_uncertain(connection: Connection, facts: Facts) -> int:
    """End deployments that may have been executed since; how many.

    An agent of ours never executes again what it has begun, and reports how it ended.
    """
    reason = f"the workspace was restored from a backup of {facts.time[:19]}Z: deploy it again"
    waiting = deployments.c.status == PENDING
    others = select(agents.c.id).where(agents.c.client.is_(None))
    running = (deployments.c.status == IN_PROGRESS) & deployments.c.agent_id.in_(others)
    count = 0
    for matching, status in ((waiting, CANCELLED), (running, FAILED)):
        values = ended(status, reason) if status == CANCELLED else unreported(reason)
        count += connection.execute(update(deployments).where(matching).values(**values)).rowcount
    return count
