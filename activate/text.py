"""Text that comes from others, and numbers for people: pure functions."""

from __future__ import annotations

import re

BASE32 = "0123456789abcdfghijklmnpqrsvwxyz"  # Nix's digits: no e, o, t, u
STORE_PATH = re.compile(
    rf"/nix/store/[{BASE32}]{{32}}-[0-9a-zA-Z+\-_?=][0-9a-zA-Z+\-._?=]{{0,210}}"
)
ESCAPES = re.compile(
    r"(?P<sgr>\x1b\[[0-9;:]*m)"  # colours and weights: the only ones that a line may keep
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[PX^_][^\x1b]*\x1b\\"  # titles, links, other strings
    r"|\x1b\[[0-?]*[ -/]*[@-~]|\x1b[ -/]*[0-~]?"  # the cursor, the screen, the modes
    r"|[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]"  # control; reversing the text
)


def is_store_path(text: object) -> bool:
    """Whether `text` is a store path by Nix's grammar: not an option, nor a file below one."""
    return isinstance(text, str) and STORE_PATH.fullmatch(text) is not None


def clean(text: str, colour: bool = False) -> str:
    """Remove whatever moves the cursor or changes the terminal.

    SGR colours stay where `colour` is set, and are reset at the end.
    """
    text = ESCAPES.sub(lambda match: (match["sgr"] or "") if colour else "", text)
    return text + "\x1b[0m" if "\x1b" in text else text


def one_line(text: str) -> str:
    """Replace each run of white space, newlines included, by one blank."""
    return " ".join(text.split())


def printable(line: bytes) -> str:
    """A log line as text. Invalid UTF-8 is replaced, and so is NUL, which databases refuse."""
    return line.decode("utf-8", "replace").replace("\0", "\ufffd")


def last_lines(text: str, count: int = 25) -> str:
    """The last `count` lines of a command's output."""
    return "\n".join(text.splitlines()[-count:])


def format_size(size: float) -> str:
    """A number of bytes for people, such as 1.5 MiB."""
    if size == 0:
        return "less than 10 KiB"  # Nix rounds
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
