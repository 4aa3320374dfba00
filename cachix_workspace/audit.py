"""The audit: entries written in the transaction of each change, and never changed."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, insert, or_, select

from cachix_protocol import utc_now
from cachix_workspace.tables import audit

MAX_DETAIL = 2000  # characters
PAUSE = 60.0  # seconds between two entries on refusals of one address
MOST_WRONG = 300
MOST_ADDRESSES = 1000  # that are remembered, and that may be noted within PAUSE


@dataclass(frozen=True)
class Entry:
    """An entry as the database has it. The actor is a token, or whoever ran a command."""

    id: int
    time: str
    actor: str
    address: str
    action: str
    detail: str


def record(
    connection: Connection, actor: str, action: str, detail: str = "", address: str = ""
) -> None:
    """Note that `actor` did something, from the network address if it came from there."""
    record_all(connection, actor, action, [detail], address)


def record_all(
    connection: Connection, actor: str, action: str, details: Sequence[str], address: str = ""
) -> None:
    """Note that `actor` did something to each of many, in one statement."""
    record_many(connection, action, [(actor, detail, address) for detail in details])


def record_many(
    connection: Connection, action: str, entries: Sequence[tuple[str, str, str]]
) -> None:
    """Note who did something, to what, and from which address, in one statement."""
    now = utc_now()
    rows = [
        {
            "time": now,
            "actor": actor,
            "action": action,
            "address": address,
            "detail": detail[:MAX_DETAIL],
        }
        for actor, detail, address in entries
    ]
    connection.execute(insert(audit), rows)


def list_some(connection: Connection, limit: int) -> list[Entry]:
    """The newest entries, the oldest of them first."""
    rows = connection.execute(select(audit).order_by(audit.c.id.desc()).limit(limit)).all()
    return [Entry(**row._mapping) for row in reversed(rows)]


def list_page(connection: Connection, text: str, limit: int, offset: int) -> list[Entry]:
    """The newest entries that have this text anywhere, the newest first."""
    query = select(audit).order_by(audit.c.id.desc())
    if text:
        columns = (audit.c.actor, audit.c.address, audit.c.action, audit.c.detail)
        query = query.where(or_(*(column.icontains(text, autoescape=True) for column in columns)))
    rows = connection.execute(query.limit(limit).offset(offset))
    return [Entry(**row._mapping) for row in rows]


class Refusals:
    """Decide which refused tokens are worth an entry: one for an address in PAUSE seconds.

    Otherwise whoever tries tokens would fill the disk.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._noted: dict[str, float] = {}
        self._wrong: Counter[str] = Counter()  # unknown tokens by address, since `_since`
        self._since = time.monotonic()

    def is_too_many(self, address: str) -> bool:
        """Count an unknown token of this address; whether there were MOST_WRONG in PAUSE seconds.

        Nobody guesses a token, but each try costs a look-up.
        """
        with self._lock:
            if time.monotonic() > self._since + PAUSE:
                self._since = time.monotonic()
                self._wrong.clear()
            if len(self._wrong) < MOST_ADDRESSES or address in self._wrong:
                self._wrong[address] += 1
            return self._wrong[address] > MOST_WRONG

    def is_due(self, address: str) -> bool:
        """Whether to note a refusal of this address. Then the next one is not due for a while."""
        now = time.monotonic()
        with self._lock:
            if self._noted.get(address, -PAUSE) > now - PAUSE:
                return False
            if len(self._noted) >= MOST_ADDRESSES:
                recent = {a: at for a, at in self._noted.items() if at > now - PAUSE}
                self._noted = recent
                if len(recent) >= MOST_ADDRESSES:
                    return False
            self._noted[address] = now
            return True
