"""The log of a deployment: a file that every command writes to, and that is read in wire lines."""

from __future__ import annotations

import contextlib
import os
import stat
import sys

from activate import journal
from activate.text import printable

LINE_BYTES = 1 << 16  # a line on the wire is at most this long
READ_BYTES = 1 << 17  # below 1 MiB as JSON, however much is escaped: proxies refuse more


def open_log(entry: journal.Journal) -> int:
    """The log file of a deployment, opened for appending; /dev/null where it can't be opened, which is said."""
    try:
        return os.open(
            entry.path("log"), os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
    except OSError as error:
        print(f"the log of deployment {entry.record.id} is lost: {error}", file=sys.stderr)
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)


def tail(log: int, start: int, most: int = 1 << 18) -> str:
    """What the log says from byte `start` on; its last `most` bytes where that is more."""
    end = os.fstat(log).st_size
    start = max(start, end - most)
    return (
        os.pread(log, max(0, end - start), start).decode("utf-8", "replace") if end > start else ""
    )


def cut(data: bytes, most: int, final: bool) -> tuple[list[bytes], int]:
    """Wire lines of a log from the start of one on, at most `most`, and how many bytes they take.

    What has no newline yet waits for it, until it is longer than a wire line or the log is `final`. Where the cuts are
    depends on the log alone, so that a line keeps its index whenever it is sent.
    """
    lines: list[bytes] = []
    start = 0
    while start < len(data) and len(lines) < most:
        end = data.find(b"\n", start, start + LINE_BYTES + 1)
        if end >= 0:
            lines.append(data[start:end])
            start = end + 1
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
    """Where the log ends by now, in bytes; what is written after the end of the deployment does not count."""
    size = 0
    with contextlib.suppress(OSError):
        found = os.stat(entry.path("log"))
        size = found.st_size if stat.S_ISREG(found.st_mode) else 0
    limit = entry.record.log_size
    return size if limit is None else min(size, limit)


def is_lost(entry: journal.Journal, told: int) -> bool:
    """Whether the log of a deployment that has ended is gone: it is shorter than the `told` bytes that were sent of it,
    or there is none though something was run."""
    return end(entry) < max(told, 0 if entry.record.step == journal.SUPERSEDED else 1)


def lines_from(entry: journal.Journal, offset: int, most: int) -> tuple[list[str], int]:
    """Wire lines of the log from `offset` on, and the offset behind them.

    They are durable: what a power loss could take away must not have been told, the lines after it would be counted
    wrong. At the end of a deployment the whole log is durable already.
    """
    data, final = b"", entry.record.step in journal.FINAL
    with contextlib.suppress(OSError), open(entry.path("log"), "rb") as file:
        file.seek(offset)
        data = file.read(max(0, min(READ_BYTES, end(entry) - offset)))
        if data and not final:
            os.fsync(file.fileno())
    lines, size = cut(data, most, final=final and offset + len(data) >= end(entry))
    return [printable(line) for line in lines], offset + size
