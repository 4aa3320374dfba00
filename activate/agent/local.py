"""Deployments by hand: the path to go back to, what is under way, and its cancellation."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from typing import Optional

from activate import cancellation, history, holder, journal, kinds, leftovers, lock, nix
from activate.agent import present
from activate.process import Error

POLL = 0.2  # seconds between two looks at a deployment that is to end
SHARED = ("deployment-", ".lock")


# --- the machine ----------------------------------------------------------------------------------


def profile_of(
    records: list[journal.Record], profile_name: Optional[str]
) -> tuple[kinds.Kind, str, Optional[str]]:
    """The kind, the profile and its name on the command line, of the records or of the machine.

    The newest of the records come first. Raises Error if there are several, or none.
    """
    known: dict[str, tuple[kinds.Kind, str, Optional[str]]] = {}
    for record in records:
        kind = kinds.find(record.kind)
        if kind is not None and record.profile and profile_name in (None, record.profile_name):
            known.setdefault(record.profile, (kind, record.profile, record.profile_name))
    if len(known) > 1:
        names = ", ".join(str(name or profile) for _, profile, name in known.values())
        raise Error(f"this machine has several profiles, name one of them: {names}")
    if known:
        return next(iter(known.values()))
    match = present.detect(profile_name)
    if match is None:
        name = f"no profile {profile_name}" if profile_name else "no profile"
        hint = "nothing was activated so far" if os.geteuid() == 0 else "try as root"
        raise Error(f"there is {name} that this user may change: {hint}")
    return (*match, profile_name)


def agent_of(state: str, records: list[journal.Record], default: str) -> str:
    """The name of this machine's agent, whose lock keeps a remote deployment away."""
    marks = [name for name in _listed(state) if name.startswith("registered-")]
    newest = sorted(marks, key=lambda name: _modified(os.path.join(state, name)))
    if newest:
        return newest[-1][len("registered-") : -len(".json")]
    shared = os.path.dirname(lock.shared_path("agent", default))
    for name in _listed(shared):  # Cachix's agent alone
        if name.startswith("agent-") and lock.held(os.path.join(shared, name)):
            return name[len("agent-") : -len(".lock")]
    return records[0].agent if records else default


def _listed(directory: str) -> list[str]:
    with contextlib.suppress(OSError):
        return sorted(os.listdir(directory))
    return []


def _modified(path: str) -> float:
    with contextlib.suppress(OSError):
        return os.stat(path).st_mtime
    return 0.0


# --- the way back ---------------------------------------------------------------------------------


def confirmed_paths(records: Iterable[journal.Record]) -> list[str]:
    """The paths that were confirmed, latest last, by the records of a profile, oldest first.

    A rollback by hand takes away what it left behind, so that the next one goes further back.
    """
    paths: list[str] = []
    for record in records:
        if not record.is_confirmed:
            continue
        if not paths and record.previous_running is not None:
            paths.append(record.previous_running)
        if record.by_hand == journal.ROLLBACK and record.store_path in paths:
            while paths[-1] != record.store_path:
                paths.pop()
        elif paths[-1:] != [record.store_path]:
            paths.append(record.store_path)
    return paths


def generations(profile: str) -> list[str]:
    """The paths of a profile's generations up to the present one, latest last."""
    directory, name = os.path.split(profile)
    now, paths = nix.generation(profile), {}
    for file in _listed(directory):
        number = file[len(name) + 1 : -len("-link")]
        if file == f"{name}-{number}-link" and number.isdigit():
            path = nix.target(f"{directory}/{file}")
            if path is not None and now is not None and int(number) <= now:
                paths[int(number)] = path
    return [paths[number] for number in sorted(paths)]


def way_back(running: Optional[str], confirmed: list[str], older: list[str]) -> list[str]:
    """The paths to go back to, the nearest first. `older` are other generations of the profile.

    If what runs was never confirmed, the last path that was is the nearest.
    """
    if running in confirmed:
        confirmed = confirmed[: len(confirmed) - 1 - confirmed[::-1].index(str(running))]
    if running in older:
        older = older[: len(older) - 1 - older[::-1].index(str(running))]
    paths = dict.fromkeys([*reversed(confirmed), *reversed(older)])
    return [path for path in paths if path != running]


def target_of(records: list[journal.Record], kind: kinds.Kind, profile: str, to: str) -> str:
    """The path to roll back to. `to` is a path, a deployment's number, or empty. Raises Error."""
    if to.isdigit():
        matches = [r for r in records if str(r.index) == to and not r.by_hand]
        record = next((r for r in matches if r.is_confirmed), None)
        if record is None:
            steps = f"was not confirmed ({matches[0].step})" if matches else "is not known here"
            raise Error(f"deployment {to} {steps}: see `cachix-deploy status`")
        to = record.store_path
    if to:
        return to
    mine = [record for record in reversed(records) if record.profile == profile]
    running = kind.running_path(profile)
    if running and present.waits_for_boot(mine):
        return running  # another one was made to boot next, and has never run
    known = {record.store_path for record in mine}
    older = [path for path in generations(profile) if path not in known]
    paths = way_back(running, confirmed_paths(mine), older)
    if not paths:
        raise Error(f"no path is known that {profile} had before: name one by --to=PATH")
    left = [path for path in paths if os.path.lexists(path) and kinds.detect(path) is kind]
    if not left:
        gone = f"{paths[0]}, which ran before, is not in the store any more"
        raise Error(f"{gone}: download it by `cachix-deploy activate-local {paths[0]}`")
    return left[0]


# --- what is under way ----------------------------------------------------------------------------


def under_way(state: str) -> list[journal.Journal]:
    """The deployments that have not ended, whether anybody leads them or not."""
    journals = history.load_all(state)[0]
    return [entry for entry in journals if entry.record.step not in journal.FINAL]


def foreign_holder(profile: str) -> str:
    """The lock that a program with another state holds, such as Cachix's agent; empty if none."""
    shared = os.path.dirname(lock.shared_path("deployment", "x"))
    names = [name for name in _listed(shared) if name.startswith(SHARED[0])]
    paths = [lock.machine_path(profile), *(os.path.join(shared, name) for name in names)]
    return next((path for path in paths if lock.held(path)), "")


def end_commands(entry: journal.Journal, ended: set[bytes]) -> None:
    """End what a cancelled deployment runs: a download, an activation or a script.

    A rollback is never disturbed. `ended` are the marks of commands that were ended already.
    """
    entry.reload()
    record = entry.record
    if record.step in journal.HARMLESS:
        leftovers.end_commands(entry.directory)
    elif record.step in (journal.ACTIVATING, journal.CHECKING) and record.profile:
        with contextlib.suppress(OSError):
            fd = os.open(lock.machine_path(record.profile), os.O_RDONLY | os.O_CLOEXEC)
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            mark = os.pread(fd, leftovers.MARK_BYTES, 0).strip()
            if mark and mark not in ended:
                ended.add(mark)
                leftovers.end_marked(fd, null, 1.0)
            os.close(fd)
            os.close(null)


def cancel(entry: journal.Journal) -> None:
    """Cancel a deployment, and wait while anybody leads it. Raises OSError."""
    cancellation.request(entry)
    ended: set[bytes] = set()
    while entry.record.step not in journal.FINAL and holder.is_led(entry):
        end_commands(entry, ended)
        time.sleep(POLL)
        entry.reload()
