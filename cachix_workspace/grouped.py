"""Writes of several requests in one transaction: each commit is synced, which takes milliseconds.

A request that finds nobody waiting for the writer of SQLite waits for it, and then writes for all
that have come meanwhile. PostgreSQL has many writers, and groups commits itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from cachix_protocol import Error
from cachix_workspace.database import Database, Lock
from cachix_workspace.engine import BUSY_TIMEOUT

Result = TypeVar("Result")
PATIENCE = 3 * BUSY_TIMEOUT  # seconds: whoever writes for all waits no longer than BUSY_TIMEOUT


class _Work:
    """What a request writes, and what came of it."""

    def __init__(self, write: Callable[[Connection], Any]) -> None:
        self.write, self.is_over = write, threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None

    def attempt(self, connection: Connection) -> None:
        """Write; a failure of this alone undoes this alone. Raises SQLAlchemyError."""
        try:
            with connection.begin_nested():
                self.result = self.write(connection)
        except SQLAlchemyError:  # SQLite may have undone all of the transaction
            raise
        except Exception as error:
            self.error = error


class Grouped:
    """Those that wait to write."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[_Work] = []
        self._has_leader = False

    def run(self, database: Database, write: Callable[[Connection], Result]) -> Result:
        """What `write` returns or raises, once it is committed, perhaps with others.

        Raises Error or SQLAlchemyError if the database can't be written.
        """
        if not database.is_sqlite:
            with database.write(Lock.ROWS) as connection:
                return write(connection)
        work = _Work(write)
        with self._lock:
            self._waiting.append(work)
            leads, self._has_leader = not self._has_leader, True
        if leads:
            self._lead(database)
        elif not work.is_over.wait(PATIENCE):
            raise Error("the database is busy: try again")
        if work.error is not None:
            raise work.error
        result: Result = work.result
        return result

    def _take(self) -> list[_Work]:
        with self._lock:
            works, self._waiting, self._has_leader = self._waiting, [], False
        return works

    def _lead(self, database: Database) -> None:
        """Write for all that wait."""
        works: list[_Work] = []
        try:
            with database.write(Lock.ROWS) as connection:
                works = self._take()
                for work in works:
                    work.attempt(connection)
        except Exception as error:
            works = works or self._take()
            for work in works:
                work.error = error
        finally:
            for work in works:
                work.is_over.set()
