"""One way to a person: messages on stderr, results on stdout, the docopt front, tokens, tables.

The agent, the CI command and the workspace's own command share it.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import io
import os
import re
import select
import sys
import threading
from collections.abc import Mapping
from typing import Any, Callable, Optional, TextIO

from activate import startup
from activate.text import MOST_LINE, MOST_MESSAGE, clean, disarm
from cachix_protocol import Error, UsageError
from cachix_tokenfile import token_in
from cachix_usage import narrowed

READER_TIMEOUT = 3600.0  # seconds for which nobody reads a full stdout
PATIENCE = 0.2  # seconds for which whoever prints a message waits until it is written
EXIT_PATIENCE = 1.0  # seconds for which the end of the program waits for its messages
MOST_WAITING = 1000  # messages that wait for a reader of stderr

verbose = False  # set once by `main`


def write_all(fd: int, data: bytes) -> None:
    """Write `data` to a file that may be set not to block, as CI runners do. Raises OSError.

    That is a TimeoutError if such a file takes nothing for READER_TIMEOUT seconds.
    """
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            if not select.select([], [fd], [], READER_TIMEOUT)[1]:
                raise TimeoutError(f"nobody has read it for {READER_TIMEOUT:.0f} s") from None


# --- messages -------------------------------------------------------------------------------------


class Messages(io.RawIOBase):
    """stderr by a thread, so that no other thread waits for a reader that hangs.

    Whoever prints a message waits until it is written, but for PATIENCE seconds only, and not at
    all until everything is written that is late. The oldest messages are lost if there are too
    many.
    """

    name = "<stderr>"

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.reset()
        os.register_at_fork(after_in_child=self.reset)

    def reset(self) -> None:
        """Begin anew, in the child of a fork, which has no such thread."""
        self.changed = threading.Condition()
        self.waiting: collections.deque[bytes] = collections.deque()
        self.thread: Optional[threading.Thread] = None
        self.lost = 0
        self.busy = self.late = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.fd

    def isatty(self) -> bool:
        return os.isatty(self.fd)

    def write(self, data: Any) -> int:
        """Take a message, which is written soon. Never raises."""
        with self.changed:
            patience = 0.0 if self.late and not self.is_idle() else PATIENCE
            self.waiting.append(bytes(data))
            if len(self.waiting) > MOST_WAITING:
                self.waiting.popleft()
                self.lost += 1
            self.start()
            self.changed.notify_all()
            self.late = not self.changed.wait_for(self.is_idle, patience)
        return len(data)

    def start(self) -> None:
        """Start the thread with the first message."""
        if self.thread is None:
            self.thread = threading.Thread(target=self.run, name="messages", daemon=True)
            try:
                self.thread.start()
            except RuntimeError:  # there are too many threads
                self.thread = None
                self.write_next()

    def run(self) -> None:
        """Write messages for as long as the program runs (a thread)."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting)
                self.busy = True
            self.write_next()
            with self.changed:
                self.busy = False
                self.changed.notify_all()

    def write_next(self) -> None:
        """Write the oldest message, after the number of those that were lost before it."""
        with self.changed:
            message = self.waiting.popleft()
            if self.lost:
                message = f"{self.lost} messages were lost\n".encode() + message
            self.lost = 0
        with contextlib.suppress(OSError, ValueError):
            write_all(self.fd, message)

    def is_idle(self) -> bool:
        """Whether everything is written."""
        return not self.waiting and not self.busy

    def finish(self) -> None:
        """Wait for the last messages, for a moment."""
        with self.changed:
            self.changed.wait_for(self.is_idle, EXIT_PATIENCE)


class Stderr(io.TextIOWrapper):
    """Text for stderr, whoever prints it: nothing of it does anything to a terminal."""

    def write(self, text: str) -> int:
        """Write a text, cleaned line by line."""
        super().write("\n".join(clean(line, most=MOST_LINE) for line in text.split("\n")))
        return len(text)


def prepare() -> None:
    """Make this process independent of who has started it, and of who reads stderr."""
    startup.open_descriptors()
    startup.reset_signals()
    startup.disarm_warnings()
    if sys.stderr is sys.__stderr__:  # else it is none of ours, but that of a test
        encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
        messages: Any = Messages(2)
        atexit.register(messages.finish)
        sys.stderr = Stderr(messages, encoding, "backslashreplace", line_buffering=True)


def tell(message: str) -> None:
    """Print a message for the operator, one line on stderr, cleaned. Never raises."""
    line = disarm(clean(" ".join(message.splitlines()), most=MOST_MESSAGE))
    with contextlib.suppress(OSError, ValueError):
        print(f"{line}\n", end="", file=sys.stderr, flush=True)


def exit_now(status: int) -> None:
    """End this process although other threads hang, and write its last messages before."""
    messages = getattr(sys.stderr, "buffer", None)
    with contextlib.suppress(OSError, ValueError):
        if sys.stdout is not None:
            sys.stdout.flush()
        if isinstance(messages, Messages):
            messages.finish()
    os._exit(status)


def debug(message: str) -> None:
    """Print a message for --verbose."""
    if verbose:
        tell(message)


def complain(error: Exception) -> None:
    """Print an error. A bug of this program comes with its traceback, with --verbose any error."""
    tell(f"error: {error or type(error).__name__}")
    if verbose or not isinstance(error, (Error, OSError)):
        import traceback

        trace = traceback.format_exception(type(error), error, error.__traceback__)
        for line in "".join(trace).splitlines():  # a text of others may have more lines than one
            tell(f"  {line}")


class Screen:
    """stdout, shared by threads: whole lines, never an exception.

    `broken` says that nobody reads it any more.
    """

    def __init__(self) -> None:
        self.colour = _is_colourful(os.environ)
        self.broken = False
        self.lock = threading.Lock()

    def paint(self, text: str, colour: Optional[str]) -> str:
        """`text` in an SGR colour, where stdout is a terminal."""
        return f"\x1b[{colour}m{text}\x1b[0m" if self.colour and colour else text

    def print(self, line: str) -> None:
        """Print a line, cleaned. Characters that stdout can't encode are escaped."""
        self.write(disarm(clean(line, self.colour, MOST_LINE)))

    def write(self, line: str) -> None:
        """Print a line as it is: text of others is cleaned before."""
        stream = sys.stdout
        encoding = getattr(stream, "encoding", None) or "utf-8"
        with self.lock:
            if self.broken or stream is None:
                return
            try:
                _write_line(stream, line.encode(encoding, "backslashreplace") + b"\n", encoding)
            except (OSError, ValueError) as error:
                self.broken = True
                if not isinstance(error, BrokenPipeError):
                    tell(f"warning: stdout can't be written: {error}")
                with contextlib.suppress(OSError, ValueError):  # or Python complains when it exits
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _is_colourful(environment: Mapping[str, str]) -> bool:
    """Whether stdout has colours: NO_COLOR forbids and FORCE_COLOR wants them, else a terminal."""
    if environment.get("NO_COLOR") or sys.stdout is None:
        return False
    if environment.get("FORCE_COLOR", "0") not in ("", "0"):
        return True
    return sys.stdout.isatty() and environment.get("TERM") != "dumb"


def _write_line(stream: TextIO, line: bytes, encoding: str) -> None:
    """Write a line to stdout, even if it is set not to block: Python would lose a part then."""
    stream.flush()
    try:
        fd = stream.fileno()
    except io.UnsupportedOperation:  # that of a test
        stream.write(line.decode(encoding, "replace"))
        return
    write_all(fd, line)


def align(rows: list[list[str]]) -> list[list[str]]:
    """Clean the cells of `rows`, and pad them, so that they print as columns."""
    rows = [[clean(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [[cell.ljust(width) for cell, width in zip(row, widths)] for row in rows]


# --- command line ---------------------------------------------------------------------------------


def long_options(usage: str) -> tuple[str, ...]:
    """The long options that a usage text lists, a line each."""
    return tuple(re.findall(r"^  (?:-\w )?(--[a-z-]+)", usage, re.MULTILINE))


def normalize(argv: list[str], usage: str) -> list[str]:
    """The command line in the form that docopt takes. Raises UsageError.

    docopt takes unambiguous prefixes, so that a mistyped `--token SECRET` would be a
    `--token-file`. It refuses `"--host URL"` as one argument, which home-manager's module passes.
    It takes a value that begins with `--` for an option. Empty arguments are dropped, but for those
    that are the value of an option.
    """
    options = long_options(usage)
    with_value = {option for option in options if f"{option}=" in usage}
    words: list[str] = []
    for argument in argv:
        head, blank, rest = argument.partition(" ")
        words += [head, rest] if blank and head in options else [argument]
    return [word for word in _check_options(words, options, with_value) if word]


def _check_options(words: list[str], options: tuple[str, ...], with_value: set[str]) -> list[str]:
    """Refuse unknown options, and tie values to theirs: `--name VALUE` becomes `--name=VALUE`."""
    checked: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        if word == "--":
            return checked + words[position:]
        name = word.partition("=")[0]
        if word.startswith("--") and name not in options:
            hint = "; tokens come from the environment or --token-file" * name.startswith("--tok")
            raise UsageError(f"there is no option {name[:40]}{hint}: see --help")
        following = words[position + 1 : position + 2]
        if word in with_value and following and following != ["--"]:
            word = f"{word}={following[0]}"
            position += 1
        checked.append(word)
        position += 1
    return checked


class UnknownForm(UsageError):
    """A command line that fits none of the usage's forms. `words` is the normalized line."""

    def __init__(self, reason: str, words: list[str]) -> None:
        super().__init__(f"{reason}: see --help")
        self.reason, self.words = reason, words


def parse(
    argv: list[str], usage: str, version: str, explain: Callable[[list[str]], str]
) -> dict[str, Any]:
    """The command line as a dictionary. Raises UsageError, or SystemExit for --help and --version.

    `explain` says which argument is wrong where none of the usage's forms fits: docopt does not.
    """
    import docopt

    words = normalize(argv, usage)
    text, others = narrowed(usage, words) or (usage, {})
    try:
        return {**others, **docopt.docopt(text, argv=words, version=version)}
    except docopt.DocoptExit as error:
        reason = str(error).splitlines()[0]
    if reason.startswith("Usage:"):
        raise UnknownForm(explain(words), words)
    raise UsageError(f"{reason}: see --help")


def number(options: dict[str, Any], name: str, low: float, high: float) -> float:
    """The value of an option that is a number from `low` to `high`. Raises UsageError."""
    value = _float(options[name])
    if not low <= value <= high:
        raise UsageError(f"{name} must be a number from {low:g} to {high:g}, not {options[name]!r}")
    return value


def positive(options: dict[str, Any], name: str, unit: str, high: float = 1e7) -> float:
    """The value of an option that is a number of `unit`, above 0 and at most `high`.

    Raises UsageError.
    """
    value = _float(options[name])
    if not 0 < value <= high:
        limits = f"above 0 and at most {high:,.0f}"
        raise UsageError(f"{name} must be a number of {unit} {limits}, not {options[name]!r}")
    return value


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def choice(options: dict[str, Any], name: str, allowed: tuple[str, ...]) -> str:
    """The value of an option that is one of a few words. Raises UsageError."""
    if options[name] not in allowed:
        raise UsageError(f"{name} must be {' or '.join(allowed)}, not {options[name]!r}")
    return str(options[name])


# --- tokens ---------------------------------------------------------------------------------------


def read_token(variable: str, file_option: Optional[str]) -> str:
    """The token from --token-file, the environment, or the systemd credential of that name.

    Raises UsageError.
    """
    credential = os.path.join(os.environ.get("CREDENTIALS_DIRECTORY", "/nonexistent"), variable)
    token = os.environ.get(variable, "")
    path = file_option or (credential if not token and os.path.exists(credential) else None)
    if path is not None:
        try:
            with open(path, encoding="utf-8") as file:
                token = token_in(file.read(1 << 16), variable)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the token file {path} can't be read: {error}") from None
    token = token.strip().strip("\"'")
    if not token:
        raise UsageError(f"there is no token: set {variable}, or give --token-file=FILE")
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise UsageError("the token contains whitespace or non-ASCII characters")
    return token


def write_secret(text: str, path: str) -> None:
    """Write a secret into a new file that only this user can read. Raises Error."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(file, "w", encoding="ascii") as stream:
            stream.write(text + "\n")
    except OSError as error:
        raise Error(f"{path} can't be written: {error.strerror}; name a new file") from None
