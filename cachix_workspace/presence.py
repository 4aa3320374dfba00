"""Who is there: written in batches, so that no agent waits for the database, or fails with it.

An agent that comes as it came before is connected at once, by a number that was reserved. The
database hears of it a moment later, with all the others of that moment, in one transaction.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping

from cachix_protocol import utc_now
from cachix_workspace import agents, nodes
from cachix_workspace.agents import Arrived
from cachix_workspace.database import Database, Lock, reason_of

logger = logging.getLogger(__name__)

WINDOW = 0.05  # seconds whose changes are one transaction
MOST = 2000  # agents in one
RESERVED = 20_000  # numbers for connections; more are reserved when half of them are used
PAUSE = 2.0  # seconds after a failure
QUIET = 60.0  # seconds between two complaints

Tell = Callable[..., None]


class Presence:
    """The changes that the database has not heard of."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._here: dict[str, Arrived] = {}  # connections by agents
        self._gone: list[int] = []  # numbers
        self._pending: set[int] = set()  # numbers that are not written
        self._numbers: list[int] = []  # reserved ones
        self._complained = -QUIET

    def start(self, database: Database, node_id: str, tell: Tell) -> None:
        """Start the thread that writes for this node.

        `tell` is called with the ids of agents once the database has heard of them.
        """
        work = (database, node_id, tell)
        threading.Thread(target=self._run, args=work, name="presence", daemon=True).start()

    def take_numbers(self, count: int) -> list[int]:
        """Numbers for connections; fewer while no more can be reserved."""
        with self._changed:
            taken, self._numbers = self._numbers[:count], self._numbers[count:]
            self._changed.notify_all()
        return taken

    def note_here(self, numbers: Mapping[str, int]) -> None:
        """Note that agents are connected, by connections of these numbers."""
        with self._changed:
            for agent_id, number in numbers.items():
                if agent_id in self._here:
                    self._pending.discard(self._here[agent_id].number)
                self._here[agent_id] = Arrived(number, utc_now())
            self._pending.update(numbers.values())
            self._changed.notify_all()

    def note_gone(self, numbers: Collection[int]) -> None:
        """Note that connections of these numbers have ended.

        Those that the database has not heard of yet it never will: the agent may be elsewhere.
        """
        ended = set(numbers)
        with self._changed:
            self._gone += numbers
            self._pending -= ended
            self._here = {
                agent_id: each for agent_id, each in self._here.items() if each.number not in ended
            }
            self._changed.notify_all()

    def is_pending(self, number: int) -> bool:
        """Whether the database has not heard of a connection."""
        return number in self._pending

    def wait_until_written(self, timeout: float) -> bool:
        """Wait until the database has heard of all; whether that came in time."""
        with self._changed:
            is_done = self._changed.wait_for
            return is_done(lambda: not (self._pending or self._gone), timeout)

    def _needs_work(self) -> bool:
        return bool(self._here or self._gone or len(self._numbers) < RESERVED // 2)

    def _run(self, database: Database, node_id: str, tell: Tell) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._needs_work)
            try:
                self._reserve(database)
                time.sleep(WINDOW)
                self._write(database, node_id, tell)
            except Exception as error:  # the agents are connected all the same
                self._complain(error)
                time.sleep(PAUSE)

    def _reserve(self, database: Database) -> None:
        if len(self._numbers) >= RESERVED // 2:
            return
        with database.write() as connection:
            numbers = nodes.next_numbers(connection, RESERVED)
        with self._changed:
            self._numbers += numbers

    def _write(self, database: Database, node_id: str, tell: Tell) -> None:
        """Write one batch; what could not be written is kept."""
        with self._changed:
            here = {each: self._here[each] for each in list(self._here)[:MOST]}
            gone = self._gone[:MOST]
        if not (here or gone):
            return
        with database.write(Lock.ROWS) as connection:
            if here:
                agents.mark_here(connection, node_id, here)
            absent = agents.mark_gone(connection, node_id, gone) if gone else []
        with self._changed:
            for agent_id, arrived in here.items():
                self._pending.discard(arrived.number)
                if self._here.get(agent_id) == arrived:
                    del self._here[agent_id]
            del self._gone[: len(gone)]
            self._changed.notify_all()
        tell(*here, *absent)

    def _complain(self, error: Exception) -> None:
        if time.monotonic() > self._complained + QUIET:
            self._complained = time.monotonic()
            reason = reason_of(error)
            logger.warning("which agents are connected can't be written now: %s", reason)
