"""Files of a cache besides narinfos and NARs: pushes may add them, and no agent reads them.

They are listings of paths (`HASH.ls`), logs of builds, realisations and debug information, as Nix
2.x writes them: https://nix.dev/manual/nix/latest/store/types/http-binary-cache-store
"""

from __future__ import annotations

import re

from cachix_protocol import BASE32
from cachix_workspace import cache
from cachix_workspace.cache import Readable, Stored
from cachix_workspace.files import Store

MOST_BYTES = 64 << 20
NAME = re.compile(
    f"[{BASE32}]{{32}}\\.ls"
    f"|log/[{BASE32}]{{32}}-[0-9A-Za-z+._?=-]{{1,211}}\\.drv"
    r"|realisations/sha256:[0-9a-f]{64}![0-9A-Za-z+._?=-]{1,100}\.doi"
    r"|debuginfo/[0-9a-f]{40}(\.debug)?"
)


def is_name(name: str) -> bool:
    """Whether a cache takes a file of this name."""
    return NAME.fullmatch(name) is not None


def media_type(name: str) -> str:
    """The Content-Type of such a file: logs are text, all others JSON."""
    return "text/plain" if name.startswith("log/") else "application/json"


def put(store: Store, name: str, body: Readable, length: int | None) -> Stored:
    """Store an upload, all or nothing, in place of a former one. Raises Refusal."""
    with cache.upload(store, name, body, length, MOST_BYTES) as (temporary, _):
        is_new = store.entry(name) is None
        store.replace(temporary, name)
        return Stored.NEW if is_new else Stored.KNOWN
