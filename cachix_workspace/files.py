"""The files of a cache, wherever they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

TEMPORARY = ".upload-"  # begins the names of files that are not whole yet


class StoreError(OSError):
    """A bucket does not answer, or refuses."""


@dataclass(frozen=True)
class Entry:
    """A file of a cache: its name there, bytes, and nanoseconds since 1970."""

    name: str
    size: int
    modified: int


@dataclass(frozen=True)
class Content:
    """All of a small file, and the nanoseconds since 1970 of its last change."""

    body: bytes
    modified: int


class Store(Protocol):
    """The files of one cache. All methods raise OSError."""

    def __hash__(self) -> int: ...

    def place(self, name: str) -> Path:
        """The directory for a temporary file that `create` or `replace` takes for a name."""

    def read(self, name: str) -> Content | None:
        """A small file; None if there is none."""

    def entry(self, name: str) -> Entry | None:
        """A file; None if there is none."""

    def entries(self, folder: str = "") -> Iterator[Entry]:
        """The files of a folder, such as `nar/`, without those of folders in it."""

    def all_entries(self) -> Iterator[Entry]:
        """All files."""

    def create(self, temporary: Path, name: str) -> bool:
        """Give an upload its name, durably; False if there is a file of that name already."""

    def replace(self, temporary: Path, name: str) -> None:
        """Put an upload in place of a file, durably."""

    def touch(self, name: str) -> None:
        """Let a file be new, so that nothing collects it for a while."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    def changed(self) -> int:
        """A number that is another one after a push, or soon after."""

    def source(self, name: str) -> Path | str:
        """The file to read from, or a URL: whoever has it may read from it for an hour."""
