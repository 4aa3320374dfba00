"""Turns: a few threads that visit many guests, each by one thread at a time.

A guest that is called while it is visited is visited once more. Guests of a class are visited
together, so that one transaction may serve them all.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger(__name__)

THREADS = 6
MOST = 1000  # guests in one visit
REST, QUEUED, VISITED, AGAIN = range(4)


class Guest(ABC):
    """One that is visited when it was called, or when its time has come."""

    __slots__ = ("_place", "_due")

    def __init__(self) -> None:
        self._place, self._due = REST, math.inf

    @classmethod
    @abstractmethod
    def visit(cls, guests: Sequence[Any]) -> None:
        """Do what these guests were called for. Must not raise."""


class Turns:
    """The threads, and who waits for them."""

    def __init__(self, threads: int = THREADS) -> None:
        self._count = threads
        lock = threading.Lock()
        self._changed, self._idle = threading.Condition(lock), threading.Condition(lock)
        self._queues: dict[type[Guest], deque[Guest]] = {}
        self._times: list[tuple[float, int, Guest]] = []
        self._numbers = itertools.count()
        self._busy = 0

    def start(self) -> None:
        """Start the threads."""
        for number in range(1, self._count + 1):
            threading.Thread(target=self._run, name=f"turns-{number}", daemon=True).start()

    def call(self, *guests: Guest) -> None:
        """Have these visited soon."""
        with self._changed:
            for guest in guests:
                self._call(guest)
            self._changed.notify(min(len(guests), self._count))

    def call_at(self, moment: float, guest: Guest) -> None:
        """Have a guest visited at this moment, unless it is called before. The last word counts."""
        with self._changed:
            guest._due = moment
            if moment < math.inf:
                is_next = not self._times or moment < self._times[0][0]
                heapq.heappush(self._times, (moment, next(self._numbers), guest))
                if is_next:
                    self._changed.notify()

    def wait_until_idle(self, timeout: float) -> bool:
        """Wait until no guest waits or is visited; whether that came in time."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._busy and not self._queues, timeout)

    def _call(self, guest: Guest) -> None:
        guest._due = math.inf
        if guest._place == REST:
            guest._place = QUEUED
            self._queues.setdefault(type(guest), deque()).append(guest)
        elif guest._place == VISITED:
            guest._place = AGAIN

    def _run(self) -> None:
        while True:
            guests = self._next()
            try:
                type(guests[0]).visit(guests)
            except Exception:  # the others depend on this thread
                logger.exception("a visit failed")
            self._rest(guests)

    def _next(self) -> list[Guest]:
        """The guests to visit now, of one class; the classes take turns. Waits for some."""
        with self._changed:
            while True:
                self._call_those_due()
                if self._queues:
                    break
                pause = self._times[0][0] - time.monotonic() if self._times else None
                self._changed.wait(pause)
            kind = next(iter(self._queues))
            queue = self._queues.pop(kind)
            guests = [queue.popleft() for _ in range(min(len(queue), MOST))]
            if queue:
                self._queues[kind] = queue
                self._changed.notify()
            for guest in guests:
                guest._place = VISITED
            self._busy += 1
            return guests

    def _call_those_due(self) -> None:
        now = time.monotonic()
        while self._times and self._times[0][0] <= now:
            moment, _, guest = heapq.heappop(self._times)
            if guest._due == moment:
                self._call(guest)

    def _rest(self, guests: list[Guest]) -> None:
        with self._changed:
            self._busy -= 1
            for guest in guests:
                again, guest._place = guest._place == AGAIN, REST
                if again:
                    self._call(guest)
            if self._queues:
                self._changed.notify()
            elif not self._busy:
                self._idle.notify_all()
