"""The one door to other programs: argument lists only, and a deadline for every wait."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from typing import Callable, Optional, Protocol, Union

from activate import environment, startup
from activate.text import MOST_LINE, clean

KILL_AFTER = 5.0  # seconds between SIGTERM and SIGKILL for a process group
WAIT = 5.0  # seconds after which a handler of a signal runs that came just before a wait
INTERRUPTED = "interrupted by the user"  # Nix, of a signal; it ends with status 1 then

Run = Callable[[list[str]], int]  # runs a command, its output in the log; returns its exit status
Before = Callable[[], None]  # called by the process that becomes the command

_running: set[subprocess.Popen[bytes]] = set()


class Error(Exception):
    """A message for the user: what failed, and what to do. `status` is the exit status.

    `is_clear`: it has a cause of its own, so that no signal to this machine's processes is it.
    """

    status = 1
    is_clear = True


class CommandFailed(Error):
    """A command could not be started, timed out, or ended with a status other than 0."""

    is_clear = False

    def __init__(self, argv: list[str], why: str, output: str = "") -> None:
        detail = f": {output.strip()[-500:]}" if output.strip() else ""
        super().__init__(f"`{' '.join(argv)}` {why}{detail}")


class DeadlinePassed(CommandFailed):
    """A command timed out, and was ended."""

    def __init__(self, argv: list[str], timeout: float) -> None:
        super().__init__(argv, f"was ended because it ran longer than {timeout:.0f} s")


class Output(Protocol):
    """A writer of commands' output into a log, see activate/switch/output.py."""

    def fileno(self) -> int:
        """The descriptor that commands write to."""

    def say(self, line: str) -> None:
        """Write `line` as a line of its own. Never raises."""


Log = Union[int, Output]  # a log file, or what writes into one


def say(log: Log, line: str) -> None:
    """Append `line` to a log, as a line of its own, cleaned. Never raises: the disk may be full."""
    line = "\n".join(clean(part, most=MOST_LINE) for part in line.split("\n"))
    if not isinstance(log, int):
        log.say(line)
        return
    with contextlib.suppress(OSError):
        size = os.fstat(log).st_size
        start = "\n" if size and os.pread(log, 1, size - 1) != b"\n" else ""
        os.write(log, f"{start}{line}\n".encode("utf-8", "replace"))


def run(argv: list[str], log: Log, timeout: float, before: Optional[Before] = None) -> int:
    """Run `argv`, its output in the log. Returns its exit status, or minus its signal.

    Raises CommandFailed if it can't be started, and DeadlinePassed after `timeout` seconds, when
    its whole process group has been ended.
    """
    say(log, "$ " + " ".join(argv))
    descriptor = log if isinstance(log, int) else log.fileno()
    process = start(argv, descriptor, descriptor, before)
    try:
        if not wait(process, timeout):
            end(process)
            say(log, f"ended after {timeout:.0f} s")
            raise DeadlinePassed(argv, timeout)
    finally:
        _running.discard(process)
    return int(process.returncode)


def start(
    argv: list[str], stdout: int, stderr: int, before: Optional[Before] = None
) -> subprocess.Popen[bytes]:
    """Start `argv` in its own session, so that its group can be ended. Raises CommandFailed."""
    env = environment.for_commands()
    try:
        with startup.former_limits():
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=env,
                cwd="/",
                start_new_session=True,
                umask=startup.COMMAND_UMASK,
                preexec_fn=before,
            )
        _running.add(process)
        return process
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CommandFailed(argv, f"could not be started ({reason})") from None


def ask(argv: list[str], timeout: float = 30.0) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a question. Raises CommandFailed, also after a signal."""
    process = start(argv, subprocess.PIPE, subprocess.PIPE)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        end(process)
        raise DeadlinePassed(argv, timeout) from None
    finally:
        _running.discard(process)
    status, messages = process.returncode, stderr.decode("utf-8", "replace")
    if status < 0 or (status and INTERRUPTED in messages):
        raise CommandFailed(argv, "was ended by a signal", messages)
    return status, stdout.decode("utf-8", "replace"), messages


def output(argv: list[str], timeout: float = 30.0) -> str:
    """The stdout of a short question. Raises CommandFailed with its stderr unless it succeeds."""
    status, stdout, stderr = ask(argv, timeout)
    if status:
        raise CommandFailed(argv, f"ended with status {status}", stderr)
    return stdout


def checked(run: Run, argv: list[str]) -> None:
    """Run `argv` where any status but 0 is a failure. Raises CommandFailed."""
    if status := run(argv):
        raise CommandFailed(argv, f"ended with status {status}")


def wait(process: subprocess.Popen[bytes], timeout: float) -> bool:
    """Whether `process` ends within `timeout` seconds. It hardly polls if there are pidfds."""
    with contextlib.suppress(AttributeError, OSError):
        fd, deadline = os.pidfd_open(process.pid), time.monotonic() + timeout
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            while (left := deadline - time.monotonic()) > 0 and not poll.poll(
                min(left, WAIT) * 1000
            ):
                pass
        finally:
            os.close(fd)
        timeout = 0.0
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout)
    return process.returncode is not None


def forget(process: subprocess.Popen[bytes]) -> None:
    """Close the pipes of a command that has ended, or that nobody waits for any more."""
    _running.discard(process)
    for pipe in filter(None, (process.stdout, process.stderr)):
        pipe.close()


def end_all() -> None:
    """Send SIGTERM to every command we are waiting for, so that the waits return."""
    for process in list(_running):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGTERM)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a child of ours with its whole process group."""
    end_group(process.pid, lambda timeout: wait(process, timeout))
    forget(process)


def end_group(pid: int, wait_for_end: Callable[[float], bool]) -> None:
    """Send SIGTERM to a process group, and SIGKILL to what is left of it after KILL_AFTER seconds.

    `wait_for_end` waits for the group, or for its leader, for at most so many seconds.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGTERM)
        wait_for_end(KILL_AFTER)
        os.killpg(pid, signal.SIGKILL)
    wait_for_end(KILL_AFTER)
