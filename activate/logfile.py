"""The log of a deployment: a file that every command writes to, read as wire lines."""

from __future__ import annotations

import contextlib
import os
import stat
import sys

from activate import journal
from activate.text import printable

LINE_BYTES = 1 << 16  # a line on the wire is at most this long
READ_BYTES = 1 << 17  # below 1 MiB as JSON, however much is escaped: proxies refuse more


def private(path: str, flags: int) -> int:
    """Open a file that only this user can read; a link is not followed. Raises OSError."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def open_log(entry: journal.Journal) -> int:
    """Open the log file for appending. If that fails: warn, and open /dev/null instead."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    try:
        return private(entry.path("log"), flags)
    except OSError as error:
        print(f"the log of deployment {entry.record.id} is lost: {error}", file=sys.stderr)
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)


def cut(data: bytes, most: int, final: bool) -> tuple[list[bytes], int]:
    """Cut a log into at most `most` wire lines; the lines, and how many bytes they take.

    `data` begins at the start of a line. Bytes without a newline wait for it, until there are more
    than a wire line has or the log is `final`. The cuts depend on the log alone, so that a line
    keeps its index whenever it is sent.
    """
    lines: list[bytes] = []
    start = 0
    while start < len(data) and len(lines) < most:
        newline = data.find(b"\n", start, start + LINE_BYTES + 1)
        if newline >= 0:
            lines.append(data[start:newline])
            start = newline + 1
        elif len(data) - start > LINE_BYTES:
            lines.append(data[start : start + LINE_BYTES])
            start += LINE_BYTES
        elif final:
            lines.append(data[start:])
            start = len(data)
        else:
            break
    return lines, start


def end(entry: journal.Journal) -> int:
    """The end of the log in bytes, without what is written after the deployment has ended."""
    size = 0
    with contextlib.suppress(OSError):
        status = os.stat(entry.path("log"))
        size = status.st_size if stat.S_ISREG(status.st_mode) else 0
    limit = entry.record.log_size
    return size if limit is None else min(size, limit)


def is_lost(entry: journal.Journal, sent: int) -> bool:
    """Whether the log of a deployment that has ended is gone.

    It is if it is shorter than the `sent` bytes, or if it is empty although commands were run.
    """
    return end(entry) < max(sent, 0 if entry.record.step == journal.SUPERSEDED else 1)


def lines_from(entry: journal.Journal, offset: int, most: int) -> tuple[list[str], int]:
    """At most `most` wire lines of the log from `offset` on, and the offset behind them.

    They are flushed to disk first: if a power loss took away a line that was sent already, the
    lines after it would be counted wrong. The log of a deployment that has ended is on disk.
    """
    data, final = b"", entry.record.step in journal.FINAL
    with contextlib.suppress(OSError), open(entry.path("log"), "rb") as file:
        file.seek(offset)
        data = file.read(max(0, min(READ_BYTES, end(entry) - offset)))
        if data and not final:
            os.fsync(file.fileno())
    lines, size = cut(data, most, final=final and offset + len(data) >= end(entry))
    return [printable(line) for line in lines], offset + size
