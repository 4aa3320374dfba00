"""The substituters of this machine, and which of them a line of Nix says to fail."""

from __future__ import annotations

from typing import Optional

from activate import nix
from activate.agent import failure

Failures = dict[str, str]  # what Nix says of each substituter that fails


class Substituters:
    """The workspace's cache, if there is one, and the substituters of nix.conf."""

    def __init__(self, ours: Optional[str]) -> None:
        self.ours = ours
        self._others: Optional[list[str]] = None

    def all(self) -> list[str]:
        """The URLs of all of them; ours is the first."""
        return [*([] if self.ours is None else [self.ours]), *self.others()]

    def others(self) -> list[str]:
        """The URLs of those of nix.conf. Nix is asked for them only once."""
        if self._others is None:
            self._others = [url for url in nix.substituters() if not self.is_ours(url)]
        return self._others

    def is_ours(self, url: str) -> bool:
        """Whether a substituter is the workspace's cache."""
        return self.ours is not None and base(url) == base(self.ours)

    def label(self, url: str) -> str:
        """A substituter for people: they may not know what their nix.conf has."""
        return url if self.is_ours(url) else f"{url} (of this machine's nix.conf)"

    def owner(self, line: str) -> Optional[str]:
        """The substituter whose URL a line of Nix has; None if it is nobody's.

        That of an S3 bucket, or of a redirection, is nobody's.
        """
        url = failure.failed_url(line, retried=True)
        return next((one for one in self.all() if url.startswith(base(one) + "/")), None)

    def blame(self, line: str, retried: bool) -> Failures:
        """The substituters that have failed, by a line of Nix.

        What Nix tries again counts if `retried`, but never if it is our own cache, which is needed
        most.
        """
        if not failure.failed_url(line, retried):
            return {}
        owner, why = self.owner(line), failure.bare(line)
        if owner is None:
            return dict.fromkeys(self.others(), why)
        is_bad = not self.is_ours(owner) or failure.failed_url(line, retried=False)
        return {owner: why} if is_bad else {}


def base(url: str) -> str:
    """A substituter's URL without its parameters and its last slash."""
    return url.partition("?")[0].rstrip("/")
