"""The token in a file as people write them: bare, or a line of a shell's or systemd's variables."""

from __future__ import annotations

import re

from cachix_errors import UsageError

ASSIGNMENT = re.compile(r"[ \t]*(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)")
QUOTED = re.compile(r"""[ \t]*(?:'([^']*)'|"([^"]*)")[ \t]*(?:[#;].*)?""")
COMMENT = re.compile(r"[ \t]*[#;]|[ \t]*$")


def token_in(text: str, variable: str) -> str:
    """The token: the last value of the variable, else the whole text without its comments.

    The result is not checked. Raises UsageError if the text has other variables alone.
    """
    lines = [line for line in text.lstrip("\ufeff").splitlines() if not COMMENT.match(line)]
    pairs = [match.groups() for line in lines if (match := ASSIGNMENT.fullmatch(line))]
    values = [value for name, value in pairs if name == variable]
    if values:
        return _unquoted(values[-1])
    others = [name for name, _ in pairs if name.startswith("CACHIX_") or len(lines) > 1]
    if others and len(pairs) == len(lines):
        raise UsageError(f"the token file sets {', '.join(others)}, but not {variable}")
    return _unquoted("\n".join(lines))


def _unquoted(value: str) -> str:
    match = QUOTED.fullmatch(value)
    if match:
        return (match[1] if match[1] is not None else match[2]).strip()
    return re.split(r"[ \t]+#", value.strip(), maxsplit=1)[0].strip()
