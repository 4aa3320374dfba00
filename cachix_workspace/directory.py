"""The data directory: private, for one server at a time, with a reserve for a full disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from cachix_protocol import Error
from cachix_workspace.settings import DATABASE, NOTE

RESERVE = ".reserve"  # a file that is removed where a full disk lets no database be opened
RESERVE_SIZE = 1 << 20  # bytes: SQLite needs 32 KiB to open a database, and a page for each change
SYSTEM_FILES = ("lost+found",)  # a file system that is mounted there has them


def prepare(directory: Path, has_files: bool = False) -> None:
    """Make the data directory private. Raises OSError, or Error if it holds other files.

    With `has_files` it may have some without a database, as that is elsewhere.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    is_ours = has_files or any(directory.joinpath(name).exists() for name in (DATABASE, NOTE))
    if not is_ours and any(map(_is_foreign, directory.iterdir())):
        raise Error(
            f"the data directory {directory} holds other files: "
            "name an empty directory, or one that does not exist yet"
        )
    if directory.stat().st_mode & 0o077:
        directory.chmod(0o700)  # whoever made it for the service may have left it open to others
    for file in directory.glob(f"{DATABASE}*"):
        if file.stat().st_mode & 0o077:  # earlier releases did not see to it
            file.chmod(0o600)


def _is_foreign(file: Path) -> bool:
    return file.name not in SYSTEM_FILES and not file.name.startswith(".")


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Be the only server of a data directory. Its lock ends with the process, however that ends.

    The directory itself is locked: no file is left, and a full disk is no obstacle. Raises Error.
    """
    try:
        prepare(directory)
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise Error(unusable(directory, error)) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Error(f"another server serves {directory}: stop it first") from None
        except OSError as error:
            raise Error(unusable(directory, error)) from None
        yield
    finally:
        os.close(lock)


def unusable(directory: Path, error: Exception) -> str:
    """The sentence on a data directory that can't be used."""
    reason = getattr(error, "orig", None) or getattr(error, "strerror", None) or error
    return f"the data directory {directory} can't be used: {reason}{_hint(directory)}"


def _hint(directory: Path) -> str:
    """The remedy where files belong to somebody else: root, most of the time, ran a command."""
    with contextlib.suppress(OSError):
        for file in (directory, *sorted(directory.glob(f"{DATABASE}*"))):
            if file.stat().st_uid != os.geteuid():
                owner, user = file.stat().st_uid, os.geteuid()
                return (
                    f"; {file} belongs to user {owner}, and this is user {user}: run this as the "
                    "user of the server, or give all files there to one user by chown"
                )
    return ""


def keep_reserve(directory: Path) -> None:
    """Keep a little of the disk, so that the workspace can be opened when it is full."""
    reserve = directory / RESERVE
    try:
        if not reserve.exists():
            with open(reserve, "xb") as file:
                file.write(bytes(RESERVE_SIZE))
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        if error.errno != errno.EEXIST:
            release_reserve(directory)


def release_reserve(directory: Path) -> bool:
    """Give the reserve back; whether there was one."""
    try:
        directory.joinpath(RESERVE).unlink()
    except OSError:
        return False
    return True
