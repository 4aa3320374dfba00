"""Messages that repeat are counted, and printed ever more rarely."""

from __future__ import annotations

import time
from typing import Callable

from activate.values import dataclass

FIRST_PAUSE = 60.0  # seconds until a message that repeats is printed again
LONGEST_PAUSE = 3600.0
MOST_MESSAGES = 50  # different ones that are remembered


@dataclass
class _Count:
    first: float  # monotonic times
    due: float
    repeats: int = 0


class Repeats:
    """Prints a message once, then after a minute, 2, 4, 8 and so on, with the number of repeats.

    That may be two or more messages in turn.
    """

    def __init__(
        self, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.print, self.clock = tell, clock
        self.counts: dict[str, _Count] = {}

    def tell(self, message: str) -> None:
        """Print a message, or count it."""
        now = self.clock()
        count = self.counts.get(message)
        if count is None:
            if len(self.counts) >= MOST_MESSAGES:
                self.counts.clear()
            self.counts[message] = _Count(now, now + FIRST_PAUSE)
            self.print(message)
            return
        count.repeats += 1
        if now >= count.due:
            age = now - count.first
            count.due = now + min(LONGEST_PAUSE, age)
            duration = f"{age / 60:.0f} min" if age < 7200 else f"{age / 3600:.0f} h"
            self.print(f"{message} (repeated {count.repeats} times in {duration})")

    def forget(self) -> None:
        """Begin anew: the next message is printed whatever it is."""
        self.counts.clear()
