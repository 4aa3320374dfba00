"""A disk that can lose power: an ext4 file system that then keeps only what was synced."""

from __future__ import annotations

import ctypes
import fcntl
import os
import subprocess
from pathlib import Path

SIZE = 192 << 20  # bytes; the file is sparse
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000
# As with `godown -f` of xfstests: nothing more reaches the disk.
EXT4_IOC_SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2
# The kernel writes nothing back by itself while a test runs, only for fsync, syncfs and the like.
OPTIONS = "loop,commit=3000,noatime,nodiscard"


def own_mounts() -> bool:
    """Give this process its own mount namespace, so that its mounts end with it.

    Returns False if that is not allowed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    return (
        libc.unshare(CLONE_NEWNS) == 0
        and libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0
    )


class Disk:
    """An ext4 file system in a file, mounted at a directory."""

    def __init__(self, image: Path, directory: Path) -> None:
        self.image, self.directory, self.cuts = image, directory, 0
        self.directory.mkdir(parents=True)
        with open(self.image, "wb") as file:
            file.truncate(SIZE)
        subprocess.run(
            ["mkfs.ext4", "-q", "-F", "-m0", "-b4096", "-Elazy_itable_init=1", str(self.image)],
            check=True,
        )
        self.mount()

    def mount(self) -> None:
        subprocess.run(["mount", "-o", OPTIONS, str(self.image), str(self.directory)], check=True)

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.directory)], check=True)

    def lose_power(self) -> None:
        """Lose all data that was not synced.

        No process may use the disk any more; one that does still has the old disk, read-only.
        """
        fd = os.open(self.directory, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, EXT4_IOC_SHUTDOWN, NO_LOG_FLUSH.to_bytes(4, "little"))
        finally:
            os.close(fd)
        self.cuts += 1
        copy = self.image.with_suffix(f".{self.cuts}")
        subprocess.run(["cp", "--sparse=always", str(self.image), str(copy)], check=True)
        self.unmount()
        self.image.unlink()
        self.image = copy
        self.mount()

    def close(self) -> None:
        self.unmount()
        self.image.unlink(missing_ok=True)
