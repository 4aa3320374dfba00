"""Writes of several requests in one transaction: what fails undoes itself, and nothing else."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import OperationalError

from cachix_workspace.database import Database, get_meta, open_database, put_meta
from cachix_workspace.grouped import Grouped
from cachix_workspace.settings import Settings


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return open_database(Settings(tmp_path), create=True)


def write_all(database: Database, count: int, broken: str = "") -> tuple[list[str], int]:
    """Have so many write at once; the failures, and how many commits there were."""
    grouped, failures, commits = Grouped(), [], []
    event.listen(database.engine, "commit", commits.append)
    begun = threading.Barrier(count + 1)

    def run(number: int) -> None:
        def write(connection: Connection) -> int:
            put_meta(connection, f"key-{number}", "x")
            if number % 3 == 0:
                raise ValueError(f"{number} on purpose")
            if broken and number == 4:
                connection.execute(text(broken))
            return number

        begun.wait()
        try:
            assert grouped.run(database, write) == number
        except (ValueError, OperationalError) as error:
            failures.append(str(error))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    with database.write():  # all wait for this one
        begun.wait()
        while len(grouped._waiting) < count:
            pass
    for thread in threads:
        thread.join()
    return failures, len(commits)


def keys(database: Database, count: int) -> list[int]:
    with database.read() as connection:
        return [number for number in range(count) if get_meta(connection, f"key-{number}")]


def test_those_that_wait_share_a_commit_and_no_failure(database: Database) -> None:
    failures, commits = write_all(database, 12)
    assert sorted(failures) == sorted(f"{number} on purpose" for number in range(0, 12, 3))
    assert keys(database, 12) == [number for number in range(12) if number % 3]
    assert commits <= 2, "each had a transaction of its own"


def test_a_database_that_fails_fails_all_that_waited_together(database: Database) -> None:
    """SQLite may have undone what was written before: nobody is told that it is there."""
    failures, _ = write_all(database, 6, broken="SELECT * FROM nowhere")
    assert len(failures) == 6 and keys(database, 6) == []
    assert Grouped().run(database, lambda connection: put_meta(connection, "key-0", "x")) is None
    assert keys(database, 6) == [0]
