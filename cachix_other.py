"""The real `cachix`, where our entry point of that name stands before it in PATH.

pip puts our `cachix` into the directory of a virtual environment, and modules of Nix expect it. Our
program has the subcommand `deploy` only: any other one is for Cachix's client.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn, Optional

from cachix_errors import UsageError

NAME = "cachix"
OURS = ("deploy", "agent", "activate", "key")
TAKE_VALUES = ("--host", "--hostname", "-c", "--config", "--token-file")
PASSED = "CACHIX_DEPLOY_PASSED"  # our programs that handed over: the next one may be a copy


def hand_over(program: str, argv: list[str]) -> None:
    """Become the next `cachix` in PATH, if the command line is for that. Raises UsageError."""
    word = subcommand(argv)
    if os.path.basename(program) != NAME or word is None or word in OURS:
        return
    ours = list(filter(None, [*os.environ.get(PASSED, "").split(os.pathsep), program]))
    path = next_program(ours)
    if path is None:
        hint = "no other `cachix` is in PATH: install Cachix's client for that"
        raise UsageError(f"this `cachix` has the subcommand `deploy` only, and {hint}")
    _become(path, argv, os.pathsep.join(dict.fromkeys(map(os.path.abspath, ours))))


def subcommand(argv: list[str]) -> Optional[str]:
    """The first word of a command line that is no option, nor the value of one."""
    words = iter(argv)
    for word in words:
        if word in TAKE_VALUES:
            next(words, None)
        elif not word.startswith("-"):
            return word
    return None


def next_program(ours: list[str]) -> Optional[str]:
    """The first `cachix` in PATH that is another file than these programs, if there is one."""
    for directory in os.environ.get("PATH", os.defpath).split(os.pathsep):
        path = os.path.join(directory or ".", NAME)
        if os.access(path, os.X_OK) and os.path.isfile(path) and not _is_any(path, ours):
            return path
    return None


def _is_any(path: str, programs: list[str]) -> bool:
    for program in programs:
        with contextlib.suppress(OSError):
            if os.path.samefile(path, program):
                return True
    return False


def _become(path: str, argv: list[str], passed: str) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(path, [path, *argv], {**os.environ, PASSED: passed})
    except OSError as error:
        raise UsageError(f"{path} can't be run: {error.strerror}") from None
