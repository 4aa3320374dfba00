"""Links of profiles and GC roots, made without Nix: a rollback must not need a Nix that works."""

from __future__ import annotations

import contextlib
import os
import re
from typing import Optional

from activate import nix
from activate.files import make_public
from activate.process import CommandFailed, Run, ask
from activate.text import BASE32

GC_ROOTS = "/nix/var/nix/gcroots"
# Commands that run another one without a configuration of Nix. The second is for Nix 2.3: it has no
# NIX_USER_CONF_FILES, but an activation may want to know the true directories.
NO_CONFIGURATION = ["env", "NIX_CONF_DIR=/var/empty", "NIX_USER_CONF_FILES=", "NIX_CONFIG="]
NO_DIRECTORIES = [*NO_CONFIGURATION, "XDG_CONFIG_HOME=/var/empty", "XDG_CONFIG_DIRS=/var/empty"]
QUESTION_TIMEOUT = 10.0  # seconds


def run_with_a_working_nix(path: str, run: Run) -> Run:
    """`run`, but without Nix's configuration if Nix refuses that. `path` is a valid store path.

    The generation that failed may have written it. The previous one can't repair it as long as its
    own activation fails for that reason.
    """
    question = ["nix-store", "--check-validity", path]
    with contextlib.suppress(CommandFailed):
        if ask(question, QUESTION_TIMEOUT)[0] == 0:
            return run
        for prefix in (NO_CONFIGURATION, NO_DIRECTORIES):
            if ask([*prefix, *question], QUESTION_TIMEOUT)[0] == 0:
                return lambda argv: run([*prefix, *argv])
    return run


def point(link: str, path: str) -> None:
    """Point a link at `path`, atomically. Raises OSError."""
    make_public(os.path.dirname(link))
    temporary = f"{link}.new-{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    os.symlink(path, temporary)
    os.rename(temporary, link)


def add_root(link: str) -> None:
    """Register a link as a GC root, as `nix-store --add-root LINK --indirect` does.

    Where only the daemon may do that it is left out: whatever a rollback needs has roots already.
    """
    with contextlib.suppress(Exception):
        import hashlib

        digest = hashlib.sha1(link.encode()).digest()
        root = f"{GC_ROOTS}/auto/{base32(digest)}"
        if os.path.isdir(os.path.dirname(root)) and not os.path.islink(root):
            point(root, link)


def base32(digest: bytes) -> str:
    """A hash in Nix's base 32, which begins with the highest bits of the last byte."""
    number, length = int.from_bytes(digest, "little"), (len(digest) * 8 - 1) // 5 + 1
    return "".join(BASE32[number >> 5 * place & 31] for place in reversed(range(length)))


def set_profile(profile: str, path: str, number: Optional[int] = None) -> None:
    """Point a profile at `path`, by generation `number` if that has it, else by any, else by a new.

    Raises OSError.
    """
    directory, name = os.path.split(profile)
    arguments = {}
    for entry in os.listdir(directory):
        match = re.fullmatch(rf"{re.escape(name)}-(\d+)-link", entry)
        if match is not None:
            arguments[int(match[1])] = nix.target(os.path.join(directory, entry))
    fitting = [known for known, target in arguments.items() if target == path]
    chosen = number if number in fitting else max(fitting, default=None)
    if chosen is None:
        chosen = max(arguments, default=0) + 1
        point(f"{profile}-{chosen}-link", path)
        add_root(f"{profile}-{chosen}-link")
    point(profile, f"{name}-{chosen}-link")
