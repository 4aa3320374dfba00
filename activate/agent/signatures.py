"""The check that a trusted key has signed a system before it runs.

Nix asks for no signature where a path is content-addressed, or was built or added here. Whoever can
write into a cache could run anything by that.
"""

from __future__ import annotations

import json
import os
import re
import threading

from activate import nix
from activate.agent import database
from activate.agent.failure import DownloadFailed
from activate.process import Error, ask, output, say

NO_KEY = (
    "only cache.nixos.org has signed it, which signs whatever is in nixpkgs: add the key of your "
    "cache to nix.conf, or start the agent with --trusted-key"
)
QUESTION_TIMEOUT = 300.0  # seconds
COPY_TIMEOUT = 60.0  # seconds for the cache to say its signatures
MOST_SEEN = 1000  # paths whose signatures are remembered

_seen: set[tuple[str, str, tuple[str, ...]]] = set()  # path, hash of its contents, accepted keys


class Look:
    """A look at the signatures of paths, beside the download if they are there already."""

    def __init__(self, paths: list[str], source: nix.Source) -> None:
        self.paths, self.source, self.signed = paths, source, False
        self.thread = threading.Thread(target=self.look, name="signatures", daemon=True)
        self.early = bool(paths and source.signers) and all(map(os.path.lexists, paths))
        if self.early:
            self.thread.start()

    def look(self) -> None:
        """Note whether an accepted key has signed all paths."""
        self.signed = are_known_signed(self.paths, self.source.signers)

    def require(self, log: int) -> None:
        """Raise DownloadFailed unless an accepted key has signed all paths; Error if Nix fails.

        Paths that were built or added here get their signatures from the cache first.
        """
        if not self.paths:
            return
        refuse_content_addressed(self.paths)
        if not self.source.signers:
            if self.source.keys and are_signed(self.paths, self.source.keys, QUESTION_TIMEOUT):
                raise DownloadFailed(f"{' or '.join(self.paths)}: {NO_KEY}")
            return
        if self.early:
            self.thread.join(QUESTION_TIMEOUT)
        if self.signed or are_known_signed(self.paths, self.source.signers):
            return
        if self.source.substituter is not None:
            say(log, f"asking {self.source.substituter} for signatures")
            copy_signatures(self.paths, self.source, COPY_TIMEOUT)
            if are_signed(self.paths, self.source.signers, QUESTION_TIMEOUT):
                return
        keys = " ".join(self.source.signers)
        raise DownloadFailed(
            f"the signature of {' or '.join(self.paths)} is by none of the keys {keys}: push it, "
            "signed by one of them (by `nix copy --refresh` if the push copies 0 paths)"
        )


def present(paths: list[str]) -> list[str]:
    """Those of the paths that the store has already. Raises CommandFailed if Nix can't be run."""
    return [
        path
        for path in paths
        if ask(["nix-store", "--check-validity", path], QUESTION_TIMEOUT)[0] == 0
    ]


def refuse_content_addressed(paths: list[str]) -> None:
    """Raise Error if Nix took a path without any signature, by its contents alone."""
    addresses = database.content_addresses(paths)
    if addresses is None:
        addresses = content_addresses(paths, QUESTION_TIMEOUT)
    for path in paths:
        if addresses.get(path):
            remedy = "deploy the output of a derivation"
            raise Error(f"{path} is content-addressed, so that nobody has to sign it: {remedy}")


def are_known_signed(paths: list[str], keys: tuple[str, ...]) -> bool:
    """As `are_signed`; Nix is not asked again where the same contents had a signature before."""
    hashes = database.hashes(paths)
    facts = {(path, hashes.get(path, ""), keys) for path in paths}
    if facts <= _seen:
        return True
    if not are_signed(paths, keys, QUESTION_TIMEOUT):
        return False
    if len(_seen) > MOST_SEEN:
        _seen.clear()
    _seen.update(facts if len(hashes) == len(paths) else ())
    return True


def are_signed(paths: list[str], keys: tuple[str, ...], timeout: float) -> bool:
    """Whether one of these keys has signed each path. Raises CommandFailed if Nix can't be run."""
    options = [*nix.option("trusted-public-keys", " ".join(keys)), *nix.EXPERIMENTAL]
    words = ["verify", "--no-contents", "--sigs-needed", "1", *paths, *options]
    return _ask_new_or_old(words, timeout)


def copy_signatures(paths: list[str], source: nix.Source, timeout: float) -> bool:
    """Let Nix take the signatures that a source's cache has of valid paths; whether it has some."""
    options = [*nix.option("narinfo-cache-positive-ttl", "0"), *nix.EXPERIMENTAL]
    options += nix.option("netrc-file", source.netrc) if source.netrc is not None else []
    words = ["copy-sigs", "--substituter", str(source.substituter), *paths, *options]
    return _ask_new_or_old(words, timeout)


def _ask_new_or_old(words: list[str], timeout: float) -> bool:
    """Whether `nix store WORDS` succeeds; `nix WORDS`, where Nix is older than 2.4."""
    status, _, messages = ask(["nix", "store", *words], timeout)
    if status and re.search("not a recognised command|unrecognised flag|unknown", messages):
        status = ask(["nix", *words], timeout)[0]
    return status == 0


def content_addresses(paths: list[str], timeout: float) -> dict[str, str]:
    """The content addresses of those valid paths that have one. Raises CommandFailed or Error."""
    text = output(["nix", "path-info", "--json", *paths, *nix.EXPERIMENTAL], timeout)
    try:
        answer = json.loads(text)
        records = answer.items() if isinstance(answer, dict) else [(r["path"], r) for r in answer]
        return {path: record["ca"] for path, record in records if (record or {}).get("ca")}
    except (ValueError, TypeError, KeyError):
        raise Error(f"`nix path-info --json` printed no paths: {text[:200]!r}") from None
