"""The leader of a deployment: one process, whatever HOME it has, and whatever files are deleted.

A deployment is led by whoever holds one of these with its id:

- the lock in its own directory, in the state directory;
- the deployment lock of Cachix's client, which lies below a cache directory, and so may be emptied
  at any time, or be another one for another HOME;
- the machine lock, beside the profile.

An agent takes the first two, and its switch process inherits them. The switch process takes the
third one. Behind the mark of `leftovers`, the file of the machine lock has two ids: that of the
deployment that holds it, and that of the one that was confirmed last. Agents with other state
directories know each other by them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import Optional

from activate import journal, leftovers, lock
from activate.process import Error
from activate.values import dataclass

ID_BYTES = 64  # always this long, so that a full disk can't refuse a later id
HOLDER_AT = leftovers.MARK_BYTES
CONFIRMED_AT = HOLDER_AT + ID_BYTES


@dataclass(frozen=True)
class Locks:
    """The locks of a deployment's leader, until `close`. A child may inherit them."""

    all: tuple[lock.Lock, ...]

    @property
    def fds(self) -> list[int]:
        """The descriptors that hold the locks."""
        return [one.fd for one in self.all]

    def close(self) -> None:
        """Release them, unless another process has inherited them."""
        for one in self.all:
            one.close()


def take(entry: journal.Journal) -> Optional[Locks]:
    """The locks of a deployment; None while another process holds any.

    Raises Error if that of Cachix's client can't be made, but it is done without where another user
    owns the directory. Once the machine has been changed no file that can't be made stops a
    rollback.
    """
    record, locks = entry.record, []
    shared = lock.shared_path("deployment", record.agent)
    with contextlib.ExitStack() as stack:
        for path, text in ((shared, record.id), (own_path(entry), None)):
            try:
                taken = lock.take(path, text=text)
            except lock.ForeignDirectory:
                continue
            except OSError as error:
                if path == shared and record.step in journal.HARMLESS:
                    raise Error(f"{path} can't be locked: {error.strerror}") from None
                continue
            if taken is None:
                return None
            locks.append(stack.enter_context(contextlib.closing(taken)))
        if holds_machine(record.id, record.profile):
            return None
        stack.pop_all()
    return Locks(tuple(locks))


def own_path(entry: journal.Journal) -> str:
    """The lock file in a deployment's own directory."""
    return entry.path("owner.lock")


def is_led(entry: journal.Journal) -> bool:
    """Whether any process, of any release, leads this deployment."""
    record = entry.record
    return (
        lock.held(own_path(entry))
        or holds_shared(record.id, record.agent)
        or holds_machine(record.id, record.profile)
    )


def is_free(entry: journal.Journal) -> bool:
    """Whether no process holds any of the locks that this deployment needs, or sees to its end."""
    shared = lock.held(lock.shared_path("deployment", entry.record.agent))
    return not shared and not is_led(entry) and not lock.held(leader_path(entry))


def leader_path(entry: journal.Journal) -> str:
    """The lock file of the process that began a deployment by hand, held until its end is written.

    An agent that finds the deployment without an end meanwhile would undo or repeat it.
    """
    return entry.path("leader.lock")


def by_hand_path(state: str) -> str:
    """The lock file of whoever does something by hand, from before the first thing to the end.

    Between the deployment that is cancelled and the rollback, no other one has its turn.
    """
    return os.path.join(state, "by-hand.lock")


def is_led_elsewhere(deployment_id: str, agent: str, profiles: Iterable[str]) -> bool:
    """Whether a process leads a deployment that has no journal here, maybe for another HOME.

    It would be of one of these profiles.
    """
    return holds_shared(deployment_id, agent) or any(
        holds_machine(deployment_id, profile) for profile in profiles
    )


def holds_shared(deployment_id: str, agent: str) -> bool:
    """Whether a deployment holds the lock that Cachix's client takes, too."""
    path = lock.shared_path("deployment", agent)
    return lock.held(path) and lock.read(path) == deployment_id


def holds_machine(deployment_id: str, profile: Optional[str]) -> bool:
    """Whether a deployment holds the machine lock of a profile."""
    if profile is None:
        return False
    path = lock.machine_path(profile)
    return lock.held(path) and _read(path, HOLDER_AT) == deployment_id


def note_holder(fd: int, deployment_id: str) -> None:
    """Write who holds the machine lock into its file."""
    confirmed = _text(os.pread(fd, ID_BYTES, CONFIRMED_AT))
    _write(fd, HOLDER_AT, deployment_id)
    _write(fd, CONFIRMED_AT, confirmed)  # makes room for the next one


def note_confirmed(fd: int, deployment_id: str) -> None:
    """Write into the machine lock's file that this deployment is the one that was confirmed."""
    _write(fd, CONFIRMED_AT, deployment_id)


def last_confirmed(profile: Optional[str]) -> str:
    """The deployment of a profile that was confirmed last; empty if that is not known."""
    return "" if profile is None else _read(lock.machine_path(profile), CONFIRMED_AT)


def _write(fd: int, place: int, deployment_id: str) -> None:
    """Write an id. A full disk must not prevent a rollback."""
    with contextlib.suppress(OSError):
        os.pwrite(fd, deployment_id.ljust(ID_BYTES)[:ID_BYTES].encode(), place)


def _read(path: str, place: int) -> str:
    """An id in the file of a machine lock; empty if there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(place)
            return _text(file.read(ID_BYTES))
    except OSError:
        return ""


def _text(raw: bytes) -> str:
    """An id as it stands in the file."""
    return raw.decode("ascii", "replace").strip(" \0")
