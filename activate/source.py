"""Where Nix downloads from, and how much of it at a time."""

from __future__ import annotations

import os
from typing import Optional

from activate.values import dataclass

LEAST_SLOTS, MOST_SLOTS = 16, 128  # paths that are downloaded at a time
SLOT_BYTES = 32 << 20  # of the machine's memory for each: one of xz may take 8 MiB, and more


def option(name: str, value: str) -> list[str]:
    """The arguments that set an option of Nix."""
    return ["--option", name, value]


def slots() -> int:
    """How many paths Nix may download at a time, by the memory of this machine.

    While one waits for the network, the others need not: 128 take half the time of 32 where a
    round trip takes 80 ms.
    """
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):  # this system does not say
        return LEAST_SLOTS
    return max(LEAST_SLOTS, min(MOST_SLOTS, memory // SLOT_BYTES))


# A narinfo is small, so that a substituter which says nothing for so long is stuck.
DRY_RUN_OPTIONS = option("stalled-download-timeout", "10")
DOWNLOAD_OPTIONS = [
    *["--max-jobs", "32"],  # by which Nix before 2.16 counts
    *option("max-substitution-jobs", "32"),
    *option("http-connections", "128"),
    *option("connect-timeout", "10"),  # seconds; Nix before 2.31 waits for minutes
    *option("stalled-download-timeout", "30"),  # seconds
    *option("fsync-store-paths", "true"),
]
SLOTS = str(slots())
# behind the numbers above, which are for a machine of 1 GiB: Nix takes the last ones
FOR_MEMORY = [*option("max-jobs", SLOTS), *option("max-substitution-jobs", SLOTS)]


@dataclass(frozen=True)
class Source:
    """A source of closures besides the machine's own substituters.

    `keys` are all trusted keys, `netrc` is the path of a file with credentials, `only` are the
    substituters that replace all others. `fresh`: what Nix remembers of narinfos does not count.
    `is_far`: the cache is private and on another host than the workspace, so that no token goes
    there. One of the keys `signers` must have signed what is deployed; without any, none must.
    `note` is a line for the log.
    """

    substituter: Optional[str] = None
    keys: tuple[str, ...] = ()
    netrc: Optional[str] = None
    only: Optional[tuple[str, ...]] = None
    fresh: bool = False
    is_far: bool = False
    signers: tuple[str, ...] = ()
    note: str = ""

    def options(self) -> list[str]:
        """The options for a download. Whatever is not set here is set by the machine's nix.conf."""
        options = [*DOWNLOAD_OPTIONS, *FOR_MEMORY]
        if self.only is not None:  # 2.3 keeps the extra ones of nix.conf otherwise
            options += option("substituters", " ".join(self.only))
            options += option("extra-substituters", "")
        elif self.substituter is not None:
            options += option("extra-substituters", self.substituter)
        if self.substituter is not None:
            options += option("trusted-public-keys", " ".join(self.keys))
        options += option("narinfo-cache-negative-ttl", "0")
        if self.fresh:
            options += option("narinfo-cache-positive-ttl", "0")
        return options if self.netrc is None else options + option("netrc-file", self.netrc)
