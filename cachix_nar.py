"""The archive (NAR) of a store path, as Nix hashes and ships it, block by block.

`nix-store --dump` makes the same bytes, but takes milliseconds to start for each path.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import sys
from typing import Callable

from cachix_errors import Error

BLOCK = 1 << 18  # bytes that are read, or passed on, at once
CASE_HACK = re.compile(rb"~nix~case~hack~[0-9]+$")  # what Nix adds to names on macOS

Sink = Callable[[bytes], object]


def write(path: str, sink: Sink) -> None:
    """Pass the archive of a file, link or directory to `sink`, in blocks.

    Raises OSError, and Error for a file of another kind or one that changes meanwhile.
    """
    archive = _Archive(sink)
    archive.add(b"nix-archive-1")
    archive.node(os.fsencode(path))
    archive.flush()


class _Archive:
    """An archive in the making. Small parts are gathered."""

    def __init__(self, sink: Sink) -> None:
        self.sink, self.parts, self.size = sink, list[bytes](), 0

    def add(self, *words: bytes) -> None:
        """Append words, each with its length and padded to 8 bytes."""
        for word in words:
            self.append(struct.pack("<Q", len(word)) + word + b"\0" * (-len(word) % 8))

    def append(self, data: bytes) -> None:
        self.parts.append(data)
        self.size += len(data)
        if self.size >= BLOCK:
            self.flush()

    def flush(self) -> None:
        """Pass on what was gathered."""
        data = b"".join(self.parts)
        self.parts, self.size = [], 0
        if data:
            self.sink(data)

    def node(self, path: bytes) -> None:
        """Append whatever is at a path."""
        status = os.lstat(path)
        self.add(b"(", b"type")
        if stat.S_ISREG(status.st_mode):
            self.file(path, status)
        elif stat.S_ISLNK(status.st_mode):
            self.add(b"symlink", b"target", os.readlink(path))
        elif stat.S_ISDIR(status.st_mode):
            self.directory(path)
        else:
            raise Error(f"{os.fsdecode(path)} is neither a file, nor a link or directory")
        self.add(b")")

    def file(self, path: bytes, status: os.stat_result) -> None:
        """Append a file's mode and contents."""
        self.add(b"regular")
        if status.st_mode & stat.S_IXUSR:
            self.add(b"executable", b"")
        self.add(b"contents")
        self.append(struct.pack("<Q", status.st_size))
        left = status.st_size
        with open(path, "rb", buffering=0) as file:
            while left and (block := file.read(min(left, BLOCK))):
                left -= len(block)
                self.append(block)
        if left:
            raise Error(f"{os.fsdecode(path)} became shorter while it was read")
        self.append(b"\0" * (-status.st_size % 8))

    def directory(self, path: bytes) -> None:
        """Append the entries of a directory, by name."""
        self.add(b"directory")
        for name, place in sorted((_name(entry), entry) for entry in os.listdir(path)):
            self.add(b"entry", b"(", b"name", name, b"node")
            self.node(os.path.join(path, place))
            self.add(b")")


def _name(entry: bytes) -> bytes:
    """The name in the archive of an entry of a directory."""
    return CASE_HACK.sub(b"", entry) if sys.platform == "darwin" else entry
