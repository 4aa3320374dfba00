"""Where the files of caches are: in a directory of each, or in a bucket (see bucket.py)."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cachix_workspace.durable import sync_directory
from cachix_workspace.files import TEMPORARY, Content, Entry, Store
from cachix_workspace.settings import Settings

LEFT = 86_400.0  # seconds after which a temporary file of a shared directory is nobody's


def store_of(settings: Settings, cache_name: str) -> Store:
    """The files of a cache, whose name must have been checked. Raises Error."""
    if settings.is_bucket:
        from cachix_workspace.bucket import bucket_of  # without boto3 there are none

        return bucket_of(settings.cache_store, cache_name, settings.data / "uploads")
    return _directory(settings.caches, cache_name)


@functools.lru_cache(maxsize=1000)
def _directory(caches: Path, cache_name: str) -> Directory:
    return Directory(caches / cache_name)


@dataclass(frozen=True)
class Directory:
    """A cache in a directory."""

    root: Path
    # made once: pathlib would cost an upload a tenth
    folders: dict[str, Path] = field(default_factory=dict, compare=False, repr=False)

    def place(self, name: str) -> Path:
        folder = name.rpartition("/")[0]
        return self.folders.get(folder) or self.folders.setdefault(folder, self.root / folder)

    def read(self, name: str) -> Content | None:
        try:
            with open(self._at(name), "rb", buffering=0) as file:
                return Content(file.read(), os.fstat(file.fileno()).st_mtime_ns)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def entry(self, name: str) -> Entry | None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = os.stat(self._at(name))
            return Entry(name, status.st_size, status.st_mtime_ns)
        return None

    def entries(self, folder: str = "") -> Iterator[Entry]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self._at(folder)) as files:
            for file in files:
                if file.name.startswith(".") or not file.is_file(follow_symlinks=False):
                    continue
                with contextlib.suppress(FileNotFoundError):  # it was removed meanwhile
                    status = file.stat(follow_symlinks=False)
                    yield Entry(f"{folder}{file.name}", status.st_size, status.st_mtime_ns)

    def all_entries(self) -> Iterator[Entry]:
        for directory, _, _ in os.walk(self.root):
            folder = os.path.relpath(directory, self.root)
            yield from self.entries("" if folder == "." else f"{folder}/")

    def create(self, temporary: Path, name: str) -> bool:
        place = self.place(name)
        make_directory(place)
        is_new = _link(temporary, self._at(name))
        sync_directory(place)  # also if it was there: another upload may be about to
        return is_new

    def replace(self, temporary: Path, name: str) -> None:
        place = self.place(name)
        make_directory(place)
        os.replace(temporary, self._at(name))
        sync_directory(place)

    def touch(self, name: str) -> None:
        os.utime(self._at(name))

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._at(name))

    def changed(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            return os.stat(self.root).st_mtime_ns
        return 0

    def source(self, name: str) -> Path | str:
        return self.root / name

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}"  # pathlib would cost a read of a narinfo a tenth


def make_directory(path: Path) -> None:
    """Make a directory, durably. Raises OSError."""
    if not path.exists():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


def _link(temporary: Path, target: str) -> bool:
    """Give a file a name, unless there is a file of that name already."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if os.path.exists(target):
            return False
        os.replace(temporary, target)
    return True


def remove_leftovers(settings: Settings) -> None:
    """Remove temporary files of uploads that a killed server left behind.

    In a directory that others use too only old ones go: the rest may be theirs.
    """
    newest = time.time() - (LEFT if settings.has_shared_directory else 0)
    places = [(settings.caches, "*/"), (settings.caches, "*/*/"), (settings.data / "uploads", "")]
    for place, folder in places:
        for file in place.glob(f"{folder}{TEMPORARY}*"):
            with contextlib.suppress(OSError):
                if file.stat().st_mtime < newest or not settings.has_shared_directory:
                    file.unlink()
