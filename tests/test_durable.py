"""Names of files are on the disk before an upload is acknowledged."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from cachix_workspace import durable


class Disk:
    """Syncs that are counted, and wait for a sign if they shall."""

    def __init__(self) -> None:
        self.count = 0
        self.begun = threading.Semaphore(0)
        self.may_end = threading.Semaphore(0)
        self.problems: list[OSError | None] = []

    def sync(self, _: Path) -> None:
        problem = self.problems.pop(0) if self.problems else None
        self.begun.release()
        assert self.may_end.acquire(timeout=10)
        self.count += 1
        if problem is not None:
            raise problem


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(durable, "_sync", disk.sync)
    return disk


def start(path: Path, count: int) -> tuple[list[threading.Thread], list[object]]:
    """Threads that sync a directory, and their results."""
    results: list[object] = []

    def sync() -> None:
        try:
            results.append(durable.sync_directory(path))
        except OSError as error:
            results.append(error.errno)

    threads = [threading.Thread(target=sync, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, results


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def waiting(path: Path, count: int) -> bool:
    turn = durable._rounds.get(path)
    return turn is not None and turn.users == count


def test_a_directory_is_really_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: places.append(os.readlink(f"/proc/self/fd/{fd}")))
    durable.sync_directory(tmp_path)
    assert places == [str(tmp_path)] and not durable._rounds


def test_those_who_wait_share_the_next_sync(tmp_path: Path, disk: Disk) -> None:
    first, _ = start(tmp_path, 1)
    assert disk.begun.acquire(timeout=10)
    others, results = start(tmp_path, 20)
    while not waiting(tmp_path, 21):
        pass
    disk.may_end.release()
    join(first)
    assert disk.begun.acquire(timeout=10) and results == []
    disk.may_end.release()
    join(others)
    assert (disk.count, results) == (2, [None] * 20) and not durable._rounds


def test_a_failure_is_no_success_of_the_others(tmp_path: Path, disk: Disk) -> None:
    disk.problems = [None, OSError(errno.EIO, "broken"), None]
    first, _ = start(tmp_path, 1)
    assert disk.begun.acquire(timeout=10)
    others, results = start(tmp_path, 2)
    while not waiting(tmp_path, 3):
        pass
    for _ in range(3):
        disk.may_end.release()
    join([*first, *others])
    assert sorted(results, key=str) == [errno.EIO, None] and disk.count == 3


def test_a_disk_that_hangs_is_given_up(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "PATIENCE", 0.05)
    first, _ = start(tmp_path, 1)
    assert disk.begun.acquire(timeout=10)
    with pytest.raises(OSError, match="the disk does not answer"):
        durable.sync_directory(tmp_path)
    disk.may_end.release()
    join(first)


def test_other_directories_do_not_wait(tmp_path: Path, disk: Disk) -> None:
    (tmp_path / "other").mkdir()
    first, _ = start(tmp_path, 1)
    second, _ = start(tmp_path / "other", 1)
    assert disk.begun.acquire(timeout=10) and disk.begun.acquire(timeout=10)
    disk.may_end.release()
    disk.may_end.release()
    join([*first, *second])
