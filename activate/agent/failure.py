"""Failures of downloads: classes by Nix's messages, and a sentence for each with its remedy.

The messages are those of Nix 2.3 to 2.34.
"""

from __future__ import annotations

import os
import re
from typing import Optional

from activate import environment, nix
from activate.process import Error
from activate.text import STORE_PATH, format_size, last_lines

# Patterns of Nix's messages for each class. The order counts: Nix says of whatever it could not
# get, for any cause, that no substituter has it.
CLASSES = {
    "space": "No space left on device|Disk quota exceeded|database or disk is full",
    "daemon": r"cannot connect to (?:daemon|socket) at (?!.*Permission denied)"
    "|daemon disconnected unexpectedly",
    "read-only": "^(?!.*unable to download).*/nix/.*: Read-only file system",
    "permission": "^(?!.*unable to download).*/nix/.*: "
    "(?:Permission denied|Operation not permitted)|is not allowed to connect to the Nix daemon",
    "untrusted": "ignoring untrusted substituter",
    "signature": "not signed by any of the keys|does not have a valid signature"
    "|lacks a .*signature",
    "corrupt": "hash mismatch|bad_alloc|string is too long|bad archive|non-zero padding"
    "|is incomplete",
    "stale": "does not exist in binary cache",
    "credentials": "HTTP error 40[13]|does not appear to be a binary cache",
    "network": "unable to download|Couldn't connect|Could not connect|Timeout was reached"
    "|Operation too slow|cannot connect to '|failed to start SSH connection|AWS error"
    "|NAR info file .* is corrupt",
    "missing": "don't know how to build these paths|is not valid|no substituter that can build it"
    "|some references of path .* could not be realised",
}
FAR = (
    "is on another host than --host, or does not encrypt: put its credentials into Nix's netrc-file"
)
LOCAL = ("space", "daemon", "read-only", "permission", "untrusted")  # no substituter can help
# An untrusted user's options are ignored without a harm unless one of these classes follows.
WITHHELD = ("signature", "credentials", "missing")
IGNORED_OPTION = (
    "ignoring the .*-specified setting '(?:trusted-public-keys|netrc-file|.*substit.*)'"
)
FAILED_URL = re.compile(r"unable to download '([^']+)': (.*)")
TIMED_OUT = re.compile("Timeout was reached|Operation too slow|timed out")
RETRY = re.compile(r"; retrying in .*")
PREFIX = re.compile(r"^\s*(?:(?:warning|error|error \(ignored\)): ?)*")
ERROR = re.compile(r"^\s*(?:error \(ignored\): )?error: (\S.*)", re.MULTILINE)
VAGUE = re.compile("build of .* failed$|some substitutes for the outputs of derivation")


class DownloadFailed(Error):
    """A closure could not be downloaded. `detail` has the last lines of Nix's output.

    Nix that has said nothing may have been ended by a signal; `by_signal`: it was.
    """

    def __init__(self, reason: str, output: Optional[str] = None, by_signal: bool = False) -> None:
        super().__init__(reason)
        self.detail = last_lines(output or "")
        self.is_clear = not by_signal and (output is None or bool(classify(output)))


def classify(text: str) -> str:
    """The class of a failed download, by Nix's words; empty if it is none of them."""
    name = next((name for name in CLASSES if mentions(text, name)), "")
    return "untrusted" if name in WITHHELD and re.search(IGNORED_OPTION, text) else name


def mentions(text: str, name: str) -> bool:
    """Whether a text has a message of this class, maybe beside those of others."""
    return re.search(CLASSES[name], text, re.MULTILINE) is not None


def bare(line: str) -> str:
    """A message without the words in front that rank it, and without what Nix does next."""
    return RETRY.sub("", PREFIX.sub("", line)).strip()[:300]


def failed_url(line: str, retried: bool) -> str:
    """The URL that could not be downloaded, by a line of Nix; empty if it is about none.

    Whatever Nix tries again counts only if it took long, unless `retried` is set.
    """
    match = FAILED_URL.search(line)
    if match is None or not (retried or TIMED_OUT.search(line) or not RETRY.search(line)):
        return ""
    return match[1]


def first_error(text: str, status: int) -> str:
    """The first message of Nix that says why it failed, with `status`."""
    if status < 0:
        memory = " (out of memory?)" if status == -9 else ""
        return f"nix-store was ended by signal {-status}{memory}"
    errors = [line.strip() for line in ERROR.findall(text)]
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("warning:")]
    clear = [line for line in errors if not VAGUE.search(line)]
    # the downloads of Nix 2.3 say why without `error:`, right before that of the whole
    others = [
        line for line in lines if not ERROR.match(line) and not STORE_PATH.match(line.strip())
    ]
    best = [*clear, *reversed(others), *errors]
    return bare(best[0]) if best else f"nix-store ended with status {status} without a message"


def message_of(name: str, text: str) -> tuple[str, int]:
    """The line that puts a failure into its class, and where it starts. Its last try is better."""
    pattern = IGNORED_OPTION if name == "untrusted" else "(?!)"
    pattern = f"(?:{CLASSES[name]})|{pattern}"
    matches = list(re.finditer(pattern, text, re.MULTILINE))
    starts = [text.rfind("\n", 0, match.start() + 1) + 1 for match in matches]
    lines = [text[start:].partition("\n")[0] for start in starts]
    final = (i for i, line in enumerate(lines) if not RETRY.search(line))
    best = next(final, 0)
    return bare(lines[best]), starts[best]


def space() -> tuple[int, int]:
    """The bytes and the inodes that this user may still use on the store's file system."""
    stat = os.statvfs(nix.STORE if os.path.isdir(nix.STORE) else "/")
    return stat.f_bavail * stat.f_frsize, stat.f_favail if stat.f_files else 1 << 62


def explain(
    text: str, source: nix.Source, path: str, status: int = 1, cache: Optional[str] = None
) -> str:
    """A message for a failed download. `path` is named if Nix names no other one.

    `cache` is the one that has failed, if that is known; else the workspace's is named.
    """
    name = classify(text)
    if not name:
        return f"the download failed: {first_error(text, status)}"
    line, start = message_of(name, text)
    match = STORE_PATH.search(text, start)
    return sentence(name, line, source, match[0] if match else path, cache)


def sentence(name: str, line: str, source: nix.Source, path: str, cache: Optional[str]) -> str:
    """The message for a class of failure: cause and remedy."""
    cache = cache or source.substituter or "any substituter of this machine"
    user, daemon = environment.user(), "the Nix daemon"
    # Nix takes 401 and 403 for missing
    unread = "" if source.netrc is None else ", or let this agent's token read it"
    if source.is_far:
        unread = f"; it got no token, because it {FAR}"
    keys = " ".join(source.keys) or "that this machine trusts"
    trust = f"add {user} to trusted-users in this machine's nix.conf, and restart {daemon}"
    distrust = ""  # older daemons do not say that they ignore the options of a user
    if source.substituter and not nix.may_forbid_substitution():
        distrust = f"; {daemon} takes keys and tokens from trusted users only: {trust}"
    size, inodes = space()
    free = f"{nix.STORE} has {format_size(size)} and {inodes} inodes free"
    return {
        "space": f"{line}: the file system of {free}; collect garbage or enlarge it",
        "daemon": f"{daemon} is not there: {line}; start it (`systemctl start nix-daemon`)",
        "read-only": f"{line}: mount it writable",
        "permission": f"{line}: run the agent as root, or let user {user} use {daemon} "
        "(NIX_REMOTE=daemon, `allowed-users` in nix.conf)",
        "untrusted": f"{daemon} ignores {cache}, because it does not trust user {user}: {trust}",
        "signature": f"the signature of {path} is by none of the keys {keys}: push it again, "
        f"signed by one of them (by `nix copy --refresh` if the push copies 0 paths){distrust}",
        "corrupt": f"{cache} serves a damaged {path}, push it again: {line}",
        "stale": f"{line}, but its description is there: remove the narinfo of {path} from the "
        "cache, and push the path again (by `nix copy --refresh`)",
        "credentials": f"{cache} refused this agent's credentials, or is no binary cache: {line}"
        + (unread if source.is_far else ""),
        "network": f"the download from {cache} broke off: {line}",
        "missing": f"{path} is not in {cache}: push it there first{unread}{distrust}",
    }[name]
