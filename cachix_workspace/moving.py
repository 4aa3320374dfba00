"""A workspace's move from SQLite to PostgreSQL, while no server serves it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import Connection, Integer, Table, func, insert, inspect, select, text
from sqlalchemy.exc import SQLAlchemyError

from cachix_protocol import Error, utc_now
from cachix_workspace import audit, engine
from cachix_workspace.database import Database, open_database, reason_of
from cachix_workspace.directory import alone
from cachix_workspace.settings import DATABASE, Settings
from cachix_workspace.tables import metadata

BATCH = 500  # rows that are copied at a time
MOVED = f"{DATABASE}.moved"  # the name that the file has afterwards


def move(data: Path, url: str, file: str | None, by: str) -> int:
    """Copy all tables into an empty database, which the data directory names from then on.

    How many rows there are. Raises Error; then the workspace is where it was.
    """
    with alone(data):
        if not data.joinpath(DATABASE).exists():
            raise Error(f"{data} has no database of SQLite, which could move")
        source, target = open_database(Settings(data, database=_own(data))), Database(url)
        try:
            with source.read() as old, target.write() as new:
                count = _copy_all(old, new)
                audit.record(new, by, "database move", f"{count} rows, on {utc_now()[:19]}Z")
            with source.engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        except (SQLAlchemyError, OSError) as error:
            raise Error(f"the workspace stays in {data}: {reason_of(error)}") from None
        finally:
            source.close()
            target.close()
        engine.note_url(data, url, file)
        os.rename(data / DATABASE, data / MOVED)
    return count


def _own(data: Path) -> str:
    """The URL of the file, even if a move that was broken off has left a note."""
    return f"sqlite:///{data / DATABASE}"


def _copy_all(old: Connection, new: Connection) -> int:
    if inspect(new).get_table_names():
        raise Error("the database to move to has tables: name an empty one")
    metadata.create_all(new)
    total = 0
    for table in metadata.sorted_tables:
        for rows in _batches(old, table):
            new.execute(insert(table), rows)
        count, copied = (
            connection.execute(select(func.count()).select_from(table)).scalar_one()
            for connection in (old, new)
        )
        if count != copied:
            raise Error(f"of {count} rows in {table.name} only {copied} were copied: try it again")
        _set_sequence(new, table)
        total += count
    return total


def _batches(old: Connection, table: Table) -> Iterator[list[dict[str, object]]]:
    rows = old.execution_options(yield_per=BATCH).execute(select(table))
    for part in rows.partitions(BATCH):
        yield [dict(row._mapping) for row in part]


def _set_sequence(new: Connection, table: Table) -> None:
    """Let numbers go on after the highest one."""
    (key, *others) = table.primary_key.columns
    if not others and isinstance(key.type, Integer):
        names = {"table": table.name, "column": key.name}
        highest = new.execute(select(func.max(key))).scalar_one()
        if highest is not None:
            statement = "SELECT setval(pg_get_serial_sequence(:table, :column), :highest)"
            new.execute(text(statement), {**names, "highest": highest})
