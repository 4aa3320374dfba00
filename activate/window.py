"""Times at which a machine may be rebooted, such as `Mon..Fri 02:00-04:00`, by its own clock."""

from __future__ import annotations

import re
import time

from activate.process import Error
from activate.values import dataclass

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
DAY_MINUTES = 24 * 60
EXAMPLE = "`Mon..Fri 02:00-04:00`, `Sat,Sun 22:00-06:00` or `03:00-05:00`"


@dataclass(frozen=True)
class Window:
    """From `start` to before `end`, in minutes of these days (0 is Monday).

    If it ends at or before its start, it ends on the next day.
    """

    days: frozenset[int]
    start: int
    end: int

    def is_open(self, now: time.struct_time) -> bool:
        """Whether a moment is within the window."""
        minute, today = 60 * now.tm_hour + now.tm_min, now.tm_wday
        if self.start < self.end:
            return today in self.days and self.start <= minute < self.end
        yesterday = (today - 1) % len(DAYS)
        return (today in self.days and minute >= self.start) or (
            yesterday in self.days and minute < self.end
        )


def parse(text: str) -> Window:
    """The window of an option. Raises Error."""
    match = re.fullmatch(r"(?:(\S+)\s+)?(\d\d:\d\d)-(\d\d:\d\d)", text.strip())
    if match is not None:
        days, start, end = _days(match[1]), _minute(match[2]), _minute(match[3])
        if days and 0 <= start < DAY_MINUTES and 0 <= end <= DAY_MINUTES and start != end:
            return Window(days, start, end)
    raise Error(f"a reboot window is such as {EXAMPLE}, not {text[:100]!r}")


def is_open(text: str) -> bool:
    """Whether the window of an option is open now; never without one."""
    return bool(text) and parse(text).is_open(time.localtime())


def _days(text: str) -> frozenset[int]:
    """The days that a text names; none if it is wrong."""
    if not text:
        return frozenset(range(len(DAYS)))
    days: set[int] = set()
    for part in text.split(","):
        first, dots, last = part.partition("..")
        if first not in DAYS or (last or first) not in DAYS or bool(dots) != bool(last):
            return frozenset()
        start, end = DAYS.index(first), DAYS.index(last or first)
        days.update((start + i) % len(DAYS) for i in range((end - start) % len(DAYS) + 1))
    return frozenset(days)


def _minute(text: str) -> int:
    """The minute of the day of HH:MM; -1 if there is none."""
    hour, minute = int(text[:2]), int(text[3:])
    return 60 * hour + minute if hour <= 24 and minute < 60 else -1
