"""What ran before: found and kept from the garbage collector before anything changes."""

from __future__ import annotations

import contextlib
import os
import threading
from types import ModuleType
from typing import Any, Callable, Optional

import activate
from activate import journal, lock, machine, nix
from activate.process import CommandFailed, Error, Run, ask, say

LOCK_TIMEOUT = 4 * 3600.0  # seconds to wait for another deployment of the same machine profile
ROOT_TIMEOUT = 600.0  # seconds


class Withdrawn(Exception):
    """Nothing was changed, and nothing is to be: the agent has ended or says so, or the machine stops."""


def lock_machine(
    profile: str, log: int, patience: float, stop: threading.Event, wanted: Callable[[], bool] = lambda: True
) -> lock.Lock:
    """The lock of what the profile decides, for as long as this process lives; whatever its last holder left running
    has ended. Raises Error or OSError, and Withdrawn by `stop` or once it is not `wanted` any more."""
    os.makedirs(os.path.dirname(profile), mode=0o755, exist_ok=True)
    path = lock.machine_path(profile)
    if lock.held(path):
        say(log, f"waiting for another deployment of {profile} to end")
    taken = lock.take(path, LOCK_TIMEOUT, wanted=lambda: wanted() and not stop.is_set())
    if taken is None and (stop.is_set() or not wanted()):
        raise Withdrawn
    if taken is None:
        raise Error(f"another deployment of {profile} did not end within {LOCK_TIMEOUT / 3600:.0f} hours")
    machine.end_marked(taken.fd, log, patience)
    machine.clear(taken.fd)
    return taken


def change(record: journal.Record) -> nix.Change:
    """What a deployment changes, and what ran before."""
    return nix.Change(
        record.store_path, str(record.profile), record.previous_running, record.previous_profile,
        record.previous_generation, committed=journal.COMMITTING in record.times,
    )  # fmt: skip


def facts(entry: journal.Journal, kind: ModuleType, profile: str, log: int, timeout: float) -> dict[str, Any]:
    """The facts that the journal keeps of what ran before. The machine lock is held. Raises Error for a wrong kind."""
    target = nix.target(profile)
    if target is not None and os.path.isdir(target) and activate.detect(target) is not kind:
        present = activate.detect(target).NAME
        raise Error(f"{profile} holds a {present} and {entry.record.store_path} is a {kind.NAME}: it was not deployed")
    previous = {
        "previous_running": kind.running_path(profile),
        "previous_profile": target,
        "previous_generation": nix.generation(profile),
    }
    unrestored = rollback_failed(entry, profile)
    if unrestored is not None:
        previous = {name: getattr(unrestored, name) for name in previous}
    root([p for p in (previous["previous_running"], previous["previous_profile"]) if p], entry, log, timeout)
    return {"kind": kind.NAME, "profile": profile, **previous}


def rollback_failed(entry: journal.Journal, profile: str) -> Optional[journal.Record]:
    """The last deployment of this profile if its rollback failed: what ran before it is still what to go back to."""
    for found in journal.newest_first(os.path.dirname(os.path.dirname(entry.directory))):
        if found.record.profile == profile and found.record.id != entry.record.id:
            return found.record if found.record.step == journal.ROLLBACK_FAILED else None
    return None


def root(paths: list[str], entry: journal.Journal, log: int, timeout: float) -> None:
    """Give what ran before a GC root each, as far as the download has not done so in its own step."""
    missing = [path for path in dict.fromkeys(paths) if path not in entry.record.rooted]
    if not missing:
        return
    with contextlib.suppress(CommandFailed):
        argv = ["nix-store", "--realise", *missing, "--add-root", entry.path("previous"), "--indirect"]
        if ask(argv, min(ROOT_TIMEOUT, timeout))[0] == 0:
            return
    say(log, f"warning: the garbage collector may take {' '.join(missing)}, and then there is no way back")


def stranger(change: nix.Change, kind: ModuleType) -> str:
    """Who else has deployed, in a sentence; empty where what runs is ours or what ran before."""
    runs = kind.running_path(change.profile) or nix.target(change.profile)
    if runs in (change.new, change.previous_running, change.previous_profile):
        return ""
    return f"{runs} runs now, so somebody else has deployed: it is left alone"


def nothing_to_undo(change: nix.Change, kind: ModuleType) -> str:
    """Why the machine is to be left as it is; empty where it is to be rolled back."""
    now = (kind.running_path(change.profile), nix.target(change.profile))
    same = now == (change.previous_running, change.previous_profile) == (change.new, change.new)
    return "it ran before already: nothing to roll back" if same else stranger(change, kind)


def has_previous(change: nix.Change, kind: ModuleType) -> bool:
    """Whether there is something to go back to: for a plain path that may be no profile at all."""
    return change.previous_running is not None or kind is activate.profile


def restore(change: nix.Change, kind: ModuleType, run: Run) -> list[str]:
    """Roll back, and look whether that worked; what is not as it was before, a sentence each."""
    if not has_previous(change, kind):
        return ["there is no previous system to go back to"]
    try:
        return kind.rollback(change, run) or differences(change, kind)
    except Exception as error:  # a mistake of this program must not hide that the machine was left like this
        return [f"{type(error).__name__}: {error}", *differences(change, kind)]


def differences(change: nix.Change, kind: ModuleType) -> list[str]:
    """What is not as it was before, a sentence each."""
    running, profile = kind.running_path(change.profile), nix.target(change.profile)
    problems = []
    if running != change.previous_running:
        problems.append(f"{running} runs instead of {change.previous_running}")
    if profile != change.previous_profile:
        problems.append(f"{change.profile} is {profile} instead of {change.previous_profile}")
    return problems
