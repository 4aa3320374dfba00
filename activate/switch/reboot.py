"""The reboot of a deployment: one forth, and at most one back.

The journal notes each of them, with the boot that it leaves, before the machine is asked for it. By
that the next boot knows that it is the new one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from activate import environment, holder, journal, kinds, machine, nix, operation, outcomes
from activate.kinds import boot, nixos
from activate.kinds.change import Change
from activate.kinds.verdict import Policy
from activate.process import CommandFailed, Error, ask, say
from activate.switch.activation import Untouched
from activate.switch.progress import Progress, Stopping

TIMEOUT = 900.0  # seconds from the request to the end of this boot: services may stop slowly
WALL_TIMEOUT = 10.0  # seconds
FORTH, BACK = 1, 2  # the number of the reboot


# --- before anything is changed -------------------------------------------------------------------


def refuse(record: journal.Record, kind: kinds.Kind, policy: Policy) -> None:
    """Raise Error if a system of this kind, or this machine, can't be deployed as it was asked."""
    problem = ""
    if record.operation not in kind.OPERATIONS:
        known = ", ".join(kind.OPERATIONS)
        problem = f"the operation `{record.operation}` makes no sense for a {kind.NAME} ({known})"
    elif record.reboot != operation.NEVER:
        problem = obstacle(record, kind, policy)
    if problem:
        raise Error(f"{problem}; nothing was changed")


def obstacle(record: journal.Record, kind: kinds.Kind, policy: Policy) -> str:
    """Why this machine can't be rebooted by a deployment; empty if it can."""
    if contradiction := operation.contradiction(record.operation, record.reboot):
        return contradiction
    if kind is not nixos:
        return f"a {kind.NAME} needs no reboot: only NixOS is rebooted"
    if os.geteuid() != 0:
        return "only root may reboot this machine, and its agent runs as another user"
    path = environment.for_commands()["PATH"]
    import shutil  # takes as long as a command, and is seldom needed

    if not os.path.isdir("/run/systemd/system") or shutil.which("systemctl", path=path) is None:
        return "there is no systemd here that could reboot this machine"
    if record.reboot == operation.WINDOW and not policy.reboot_window:
        return "there is no --reboot-window, for which the reboot was to wait"
    if warning := boot.warning(kind.NAME, record.store_path):
        return f"{warning}, which would have to confirm it"
    return ""


# --- after the commit -----------------------------------------------------------------------------


def is_needed(record: journal.Record, kind: kinds.Kind) -> bool:
    """Whether a deployment that is committed is to reboot, or has rebooted already."""
    if record.reboot == operation.NEVER or record.reboots:
        return False
    runs = kind.running_path(str(record.profile)) == record.store_path
    if record.boot_id != machine.boot_id():  # a power loss was the reboot: it is to be confirmed
        return True
    return not runs or machine.needs_reboot(record.store_path, record.store_path)


def await_turn(progress: Progress, kind: kinds.Kind) -> None:
    """Leave the reboot to the agent, which waits for its window."""
    record = progress.journal.record
    now = machine.boot_id()
    is_booted = (
        record.boot_id != now and kind.running_path(str(record.profile)) == record.store_path
    )
    boot_id = record.boot_id if is_booted else now  # recovery takes another one for a reboot
    progress.enter(journal.AWAITING_REBOOT, attempts=0, boot_id=boot_id)
    holder.note_confirmed(progress.machine_lock.fd, progress.journal.record.id)


def go_forth(progress: Progress) -> None:
    """Reboot into the new system. Raises Stopping then, or Error if the machine does not reboot."""
    record = progress.journal.record
    target = nix.target(str(record.profile))
    if target != record.store_path:
        reason = f"{record.profile} is {target} now, so somebody else has deployed"
        raise Untouched(f"{reason}: it is not rebooted", outcomes.CHANGED_BY_OTHERS)
    progress.enter(journal.REBOOTING, reboots=FORTH, boot_id=machine.boot_id())
    ask_for_it(progress, f"rebooting into {record.store_path}")


def go_back(
    progress: Progress, kind: kinds.Kind, change: Change, enter: Callable[[], None]
) -> None:
    """Reboot into the previous system, if the new one was booted for this deployment.

    Returns if the previous system has to be activated instead. `enter` enters the rollback. Raises
    Stopping if the machine reboots.
    """
    record = progress.journal.record
    asked = record.reboots == BACK and record.boot_id == machine.boot_id()
    booted = record.reboots == FORTH and record.boot_id != machine.boot_id()
    if kind is not nixos or kind.running_path(change.profile) != change.new:
        return
    if not (asked or booted) or record.attempts >= 3 or change.previous_running is None:
        return
    if booted:
        enter()
        if problems := nixos.restore_boot(change, progress.run):
            say(progress.log, f"the previous system can't be booted: {'; '.join(problems)}")
            return
    try:
        progress.enter(journal.ROLLING_BACK, reboots=BACK, boot_id=machine.boot_id())
        ask_for_it(progress, f"rebooting back into {change.previous_running}")
    except (Error, OSError) as error:
        say(progress.log, f"{error}; the previous system is activated instead")


def ask_for_it(progress: Progress, words: str) -> None:
    """Ask systemd for a reboot, and wait for it. Raises Stopping then, else Error."""
    say(progress.log, words)
    with contextlib.suppress(CommandFailed):
        message = f"cachix-deploy: {words} ({outcomes.title(progress.journal.record)})"
        ask(["wall", message], WALL_TIMEOUT)
    status = progress.run(["systemctl", "reboot"])
    if status:
        raise Error(f"`systemctl reboot` ended with status {status}")
    if progress.stop.wait(TIMEOUT):
        raise Stopping
    raise Error(f"the machine did not reboot within {TIMEOUT:.0f} s")


# --- after the boot -------------------------------------------------------------------------------


def describe_end(record: journal.Record, restored: str) -> str:
    """How a rollback ended, in words."""
    return f"rolled back to {restored}" + ", which runs now" * (record.reboots > 0)
