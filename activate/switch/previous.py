"""The previous system: recorded and rooted before anything changes, restored by a rollback."""

from __future__ import annotations

import contextlib
import os
from typing import Any, Optional

from activate import byhand, history, holder, journal, kinds, lock, nix, operation, recovery
from activate.kinds.change import Change, Lasting
from activate.process import CommandFailed, Error, Log, Run, ask, say

ROOT_TIMEOUT = 600.0  # seconds
State = tuple[Optional[str], Optional[str]]  # the path that runs, the target of the profile
UNCONFIRMED = journal.EFFECTS | {journal.CHECKING, journal.ROLLBACK_FAILED}


def change(record: journal.Record) -> Change:
    """The change that a deployment makes, with the machine's state before it."""
    return Change(
        new=record.store_path,
        profile=str(record.profile),
        previous_running=record.previous_running,
        previous_profile=record.previous_profile,
        previous_generation=record.previous_generation,
        committed=journal.COMMITTING in record.times,
        activated=record.operation != operation.BOOT,
    )


def facts(
    entry: journal.Journal, kind: kinds.Kind, profile: str, log: Log, timeout: float
) -> dict[str, Any]:
    """The facts for the journal: kind, profile, and the previous paths, which get GC roots.

    Raises Error if the profile holds another kind. The caller holds the machine lock.
    """
    state = observe(kind, profile)
    target = state[1]
    if target is not None and os.path.isdir(target) and kinds.detect(target) is not kind:
        raise Error(
            f"{profile} holds a {kinds.detect(target).NAME} and {entry.record.store_path} is a "
            f"{kind.NAME}: it was not deployed"
        )
    journals, _ = history.load_all(entry.state)
    last = holder.last_confirmed(profile)
    suspects = unconfirmed(entry, profile, journals, last)
    previous = confirmed(state, nix.generation(profile), profile, suspects)
    paths = (previous["previous_running"], previous["previous_profile"])
    add_roots([path for path in paths if path], entry, log, timeout)
    sequence = history.next_sequence([*journals, entry])
    own = {"kind": kind.NAME, "profile": profile, "sequence": sequence, "confirmed": last}
    return {**own, **previous}


def observe(kind: kinds.Kind, profile: str) -> State:
    """The path that runs, and the one that the profile points at."""
    return kind.running_path(profile), nix.target(profile)


def unconfirmed(
    entry: journal.Journal, profile: str, journals: list[journal.Journal], last: str = ""
) -> list[journal.Record]:
    """The deployments that may have left this machine on their path, latest first.

    None of them is older than the last one that was confirmed or rolled back, here or, as `last`
    says, in another state directory.
    """
    records = [other.record for other in reversed(journals)]
    machine_lock, deployments = lock.machine_path(profile), []
    for record in records:
        if record.id == entry.record.id or record.profile is None:
            continue
        if lock.machine_path(record.profile) != machine_lock:
            continue
        if record.settles or record.step == journal.ROLLED_BACK:
            break
        if record.step in UNCONFIRMED and not recovery.is_settled_elsewhere(record, last):
            deployments.append(record)
    return deployments


def confirmed(
    now: State,
    generation: Optional[int],
    profile: str,
    suspects: list[journal.Record],
) -> dict[str, Any]:
    """The system to go back to: what is there now, unless it is the path of a failed deployment.

    The previous system of that deployment is then that of the next one too. `suspects` are the
    unconfirmed deployments.
    """
    running, target = now
    for record in suspects:
        if running == record.store_path:
            running = record.previous_running
        if target == record.store_path and record.profile == profile:
            target, generation = record.previous_profile, record.previous_generation
    return {
        "previous_running": running,
        "previous_profile": target,
        "previous_generation": generation,
    }


def add_roots(paths: list[str], entry: journal.Journal, log: Log, timeout: float) -> None:
    """Add GC roots for the previous paths that the download did not already root."""
    missing = [path for path in dict.fromkeys(paths) if path not in entry.record.rooted]
    if not missing:
        return
    with contextlib.suppress(CommandFailed):
        timeout = min(ROOT_TIMEOUT, timeout)
        nix.add_roots(missing, entry.path("previous"), lambda argv: ask(argv, timeout)[0])
        return
    names = " ".join(missing)
    say(log, f"warning: no GC root for {names}: a rollback fails once it has been collected")


def foreign_deployment(change: Change, kind: kinds.Kind) -> str:
    """A message if somebody else has deployed, because neither new nor previous path runs."""
    runs = kind.running_path(change.profile) or nix.target(change.profile)
    if runs in (change.new, change.previous_running, change.previous_profile):
        return ""
    return f"{runs} runs now, so somebody else has deployed: it is left alone"


def nothing_to_undo(change: Change, kind: kinds.Kind) -> str:
    """A message if the machine must be left as it is; empty if it must be rolled back."""
    now = observe(kind, change.profile)
    same = now == (change.previous_running, change.previous_profile) == (change.new, change.new)
    if same:
        return "it ran before already: nothing to roll back"
    return foreign_deployment(change, kind)


def can_restore(change: Change, kind: kinds.Kind) -> bool:
    """Whether there is a previous system, or the kind can go back to no profile at all."""
    return change.previous_running is not None or not kind.NEEDS_PREVIOUS


def restore(change: Change, kind: kinds.Kind, run: Run) -> list[str]:
    """Roll back, and check the result; a message for each thing that was not restored."""
    if not can_restore(change, kind):
        return ["there is no previous system to go back to"]
    try:
        run = byhand.run_with_a_working_nix(change.previous_running or change.new, run)
        return kind.rollback(change, run) or differences(change, kind)
    except Exception as error:  # a bug of ours must not hide the machine's state
        return [f"{type(error).__name__}: {error}", *differences(change, kind)]


def is_back(change: Change, kind: kinds.Kind, problems: list[str]) -> bool:
    """Whether the machine is where it was, whatever the rollback's `problems` say.

    A previous system that refuses to begin, as the new one did, has nothing to restore.
    """
    lasting = any(isinstance(problem, Lasting) for problem in problems)
    return not lasting and not differences(change, kind)


def differences(change: Change, kind: kinds.Kind) -> list[str]:
    """A message for each thing that differs from the state before."""
    running, profile = observe(kind, change.profile)
    problems = []
    if running != change.previous_running:
        problems.append(f"{running} runs instead of {change.previous_running}")
    if profile != change.previous_profile:
        problems.append(f"{change.profile} is {profile} instead of {change.previous_profile}")
    return problems
