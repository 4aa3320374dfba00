"""Text that comes from others, made harmless, and numbers for people."""

from __future__ import annotations

import base64
import os
import re

BASE32 = "0123456789abcdfghijklmnpqrsvwxyz"  # Nix's digits: no e, o, t, u
STORE_PATH = re.compile(
    rf"/nix/store/[{BASE32}]{{32}}-[0-9a-zA-Z+\-_?=][0-9a-zA-Z+\-._?=]{{0,210}}"
)
MOST = 500  # characters of a text of others within a message
MOST_MESSAGE = 2000  # of a message
MOST_LINE = 1 << 16  # of a line of a log, as on the wire
MOST_CLEANED = 1 << 18  # nothing behind that is looked at
LEAST_SECRET = 8  # characters of a secret: shorter ones are part of many words
REDACTED = "[secret]"
URL_SAFE = str.maketrans("+/", "-_")
ESCAPES = re.compile(
    r"(?P<sgr>\x1b\[[0-9;:]*m)"  # colours and weights: the only ones that a line may keep
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[PX^_][^\x1b]*\x1b\\"  # titles, links, other strings
    r"|\x1b\[[0-?]*[ -/]*[@-~]|\x1b[ -/]*[0-~]?"  # the cursor, the screen, the modes
    # control characters, what is not seen, and what reverses the text
    r"|[\x00-\x08\x0a-\x1f\x7f-\x9f\xad\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)

COMMAND = re.compile(r"\A(?:\s|\x1b\[[0-9;:]*m)*::")


def is_store_path(text: object) -> bool:
    """Whether `text` is a store path by Nix's grammar: not an option, nor a file below one."""
    return isinstance(text, str) and STORE_PATH.fullmatch(text) is not None


def base32(digest: bytes) -> str:
    """Bytes in Nix's base 32: its own digits, the last bits first."""
    number, length = int.from_bytes(digest, "little"), (len(digest) * 8 + 4) // 5
    return "".join(BASE32[number >> 5 * i & 31] for i in reversed(range(length)))


_secrets: dict[str, None] = {}  # each spelling of the tokens that this process holds


def hide(secret: str) -> None:
    """Let `clean` replace a token from now on: as it is, percent-encoded, and within base64."""
    from urllib.parse import quote

    if len(secret) < LEAST_SECRET:
        return
    spellings = [secret, quote(secret, safe=""), quote(secret)]
    for shift in range(3):  # where it begins within three bytes, as after `user:`
        raw = b"\0" * shift + secret.encode()
        whole = base64.b64encode(raw[: len(raw) // 3 * 3]).decode()
        spellings += [whole[4 * bool(shift) :], whole[4 * bool(shift) :].translate(URL_SAFE)]
    _secrets.update(dict.fromkeys(spellings))


def clean(text: str, colour: bool = False, most: int = MOST) -> str:
    """Remove whatever moves the cursor or changes the terminal, all but `most` characters too.

    Tokens that this process holds are replaced. SGR colours stay where `colour` is set, and are
    reset at the end.
    """
    text = ESCAPES.sub(lambda match: (match["sgr"] or "") if colour else "", text[:MOST_CLEANED])
    for secret in _secrets:
        text = text.replace(secret, REDACTED)
    if len(text) > most:
        head, escape, last = text[: most - 3].rpartition("\x1b")
        text = (head if escape and "m" not in last else text[: most - 3]) + "..."
    is_reset = text.rpartition("\x1b")[2].startswith("[0m")
    return text + "\x1b[0m" if "\x1b" in text and not is_reset else text


def disarm(line: str) -> str:
    """A line of others that is no command to GitHub's runner, which looks for them in any output.

    It takes `::...` at the beginning of a line, and `##[...]` anywhere.
    """
    if not os.environ.get("GITHUB_ACTIONS"):
        return line
    return COMMAND.sub("| ::", line.replace("##[", "# #["))


def brief(text: str) -> str:
    """A text of others as one line within a message."""
    return one_line(clean(one_line(text[:MOST_CLEANED])))


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
