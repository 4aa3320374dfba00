"""The one door to other programs: lists of arguments only, a built environment, and a deadline for every wait."""

from __future__ import annotations

import contextlib
import os
import pwd
import select
import signal
import subprocess
from typing import Callable, Optional

KILL_AFTER = 5.0  # seconds between SIGTERM and SIGKILL for a group that ran past its deadline
FALLBACK_PATH = (
    "/run/current-system/sw/bin",
    "/nix/var/nix/profiles/default/bin",
    "/usr/bin",
    "/bin",
)
# What a command may see. Tokens and what ties a process to a service of systemd are in neither list.
KEPT = frozenset(
    (
        "SHELL",
        "LANG",
        "LANGUAGE",
        "TZ",
        "TZDIR",
        "TMPDIR",
        "TERM",
        "SSL_CERT_FILE",
        "DBUS_SESSION_BUS_ADDRESS",
    )
    + (
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "no_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "NO_PROXY",
    )
)
KEPT_PREFIXES = ("LC_", "LOCALE_ARCHIVE", "XDG_", "NIX_")

_running: set[subprocess.Popen[bytes]] = set()

Run = Callable[
    [list[str]], int
]  # runs a command with its output in the log, returns its exit status


class Error(Exception):
    """What the user is told: a sentence that says what failed and what to do. `status` is the exit status."""

    status = 1


class CommandFailed(Error):
    """A command ended with a status other than 0, could not be started, or ran past its deadline."""

    def __init__(self, argv: list[str], why: str, output: str = "") -> None:
        super().__init__(
            f"`{' '.join(argv)}` {why}" + (f": {output.strip()[-500:]}" if output.strip() else "")
        )


class DeadlinePassed(CommandFailed):
    """A command was ended because it ran too long."""

    def __init__(self, argv: list[str], timeout: float) -> None:
        super().__init__(argv, f"was ended because it ran longer than {timeout:.0f} s")


def home() -> str:
    """The home directory; without HOME the passwd entry counts."""
    return os.environ.get("HOME") or pwd.getpwuid(os.geteuid()).pw_dir


def user() -> str:
    """The name of the effective user."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return os.environ.get("USER") or str(os.geteuid())


def xdg(name: str, default: str) -> str:
    """A base directory such as XDG_STATE_HOME; `default` is below the home directory. Relative values don't count."""
    value = os.environ.get(name, "")
    return value if value.startswith("/") else os.path.join(home(), default)


def environment() -> dict[str, str]:
    """The environment of whatever is run, built anew."""
    kept = {k: v for k, v in os.environ.items() if k in KEPT or k.startswith(KEPT_PREFIXES)}
    present = [part for part in os.environ.get("PATH", "").split(":") if part.startswith("/")]
    path = [*present, *(part for part in FALLBACK_PATH if part not in present)]
    return {**kept, "PATH": ":".join(path), "HOME": home(), "USER": user(), "LOGNAME": user()}


def say(log: int, line: str) -> None:
    """Append `line` to the log file as a line of its own; never raises (a full disk is no reason to stop)."""
    with contextlib.suppress(OSError):
        size = os.fstat(log).st_size
        start = "\n" if size and os.pread(log, 1, size - 1) != b"\n" else ""
        os.write(log, f"{start}{line}\n".encode("utf-8", "replace"))


def run(
    argv: list[str], log: int, timeout: float, before: Optional[Callable[[], None]] = None
) -> int:
    """Run `argv` with its output in the log file and return its exit status (negative: the signal that ended it).

    `before` is called by the process that becomes the command. Raises CommandFailed where it can't be started,
    DeadlinePassed after its whole process group was ended.
    """
    say(log, "$ " + " ".join(argv))
    process = start(argv, log, log, before)
    try:
        if not wait(process, timeout):
            end_group(process)
            say(log, f"ended after {timeout:.0f} s")
            raise DeadlinePassed(argv, timeout)
    finally:
        _running.discard(process)
    return int(process.returncode)


def start(
    argv: list[str], stdout: int, stderr: int, before: Optional[Callable[[], None]] = None
) -> subprocess.Popen[bytes]:
    """Start `argv` in a session of its own, so that its whole group can be ended. Raises CommandFailed."""
    env = environment()
    try:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=env, cwd="/", start_new_session=True,
            preexec_fn=before,
        )  # fmt: skip
        _running.add(process)
        return process
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or str(error)
        raise CommandFailed(argv, f"could not be started ({what})") from None


def ask(argv: list[str], timeout: float = 30.0) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a short question; raises CommandFailed and DeadlinePassed as `run`."""
    process = start(argv, subprocess.PIPE, subprocess.PIPE)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        end_group(process)
        raise DeadlinePassed(argv, timeout) from None
    finally:
        _running.discard(process)
    return process.returncode, stdout.decode("utf-8", "replace"), stderr.decode("utf-8", "replace")


def output(argv: list[str], timeout: float = 30.0) -> str:
    """What `argv` prints on stdout. For short questions; raises CommandFailed with what it printed on stderr."""
    status, stdout, stderr = ask(argv, timeout)
    if status:
        raise CommandFailed(argv, f"ended with status {status}", stderr)
    return stdout


def checked(run: Run, argv: list[str]) -> None:
    """Run `argv` where any status but 0 is a failure. Raises CommandFailed."""
    status = run(argv)
    if status:
        raise CommandFailed(argv, f"ended with status {status}")


def wait(process: subprocess.Popen[bytes], timeout: float) -> bool:
    """Whether `process` ended within `timeout` seconds. Sleeps instead of polling where the kernel has pidfds."""
    with contextlib.suppress(AttributeError, OSError):
        fd = os.pidfd_open(process.pid)
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll(timeout * 1000)
        finally:
            os.close(fd)
        timeout = 0.0
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout)
    return process.returncode is not None


def end_all() -> None:
    """Ask all that this process has started and waits for to end: its waits end with that."""
    for process in list(_running):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGTERM)


def end_group(process: subprocess.Popen[bytes], kill_after: Optional[float] = None) -> None:
    """End the process group: SIGTERM first, SIGKILL for what is left of it after `kill_after` seconds."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
        wait(process, KILL_AFTER if kill_after is None else kill_after)
        os.killpg(process.pid, signal.SIGKILL)
    wait(process, KILL_AFTER)
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
