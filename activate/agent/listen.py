"""Nix's output as it comes: a command may be ended because of what it says."""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Iterator
from typing import Callable, Optional

from activate import process
from activate.text import is_store_path, printable

TICK_SECONDS = 5.0
SLICE_SECONDS = 1.0  # between two looks whether a command that says nothing has ended
LINE_BYTES = 1 << 16
MOST_LINES, FIRST_LINES = 3000, 1000  # that are kept of an output, and how many of its start

Hear = Callable[[str], bool]  # takes a line; whether the command is to be ended


class Messages:
    """The output of Nix, but for the paths that it copies: these are only counted."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.listed = self.copied = 0  # store paths that stand alone on a line, and copied ones

    def add(self, line: str) -> None:
        """Take in a line."""
        self.listed += is_store_path(line.strip())
        if line.startswith("copying path '"):
            self.copied += 1
            return
        self.lines.append(line)
        if len(self.lines) > MOST_LINES:
            del self.lines[FIRST_LINES]

    @property
    def text(self) -> str:
        """The lines that were kept."""
        return "\n".join(self.lines)


def listen(
    argv: list[str], timeout: float, hear: Hear, tick: Optional[Callable[[], None]] = None
) -> int:
    """Run `argv`, and hear each line of its output; its exit status, or minus its signal.

    `tick` is called every TICK_SECONDS. Raises CommandFailed if it can't be started, and
    DeadlinePassed after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    command = process.start(argv, subprocess.PIPE, subprocess.STDOUT)
    try:
        for line in _lines(command, deadline, tick or (lambda: None)):
            if hear(line):
                process.end(command)
                return int(command.returncode or 0)
        if time.monotonic() >= deadline or not process.wait(command, deadline - time.monotonic()):
            process.end(command)
            raise process.DeadlinePassed(argv, timeout)
    finally:
        process.forget(command)
    return int(command.returncode)


def _lines(
    command: subprocess.Popen[bytes], deadline: float, tick: Callable[[], None]
) -> Iterator[str]:
    """The lines of a command's output, until it has ended or the deadline has passed."""
    assert command.stdout is not None
    fd, rest = command.stdout.fileno(), b""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    next_tick = time.monotonic() + TICK_SECONDS
    while (now := time.monotonic()) < deadline:
        if now >= next_tick:
            tick()
            next_tick = now + TICK_SECONDS
        if not poll.poll(1000 * min(SLICE_SECONDS, deadline - now)):
            if command.poll() is not None:
                break  # what it has started keeps the pipe open
            continue
        data = os.read(fd, LINE_BYTES)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) > LINE_BYTES:
            lines, rest = [*lines, rest], b""
        yield from map(printable, lines)
    if rest:
        yield printable(rest)
