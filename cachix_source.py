"""The binary cache of a workspace, as Nix is to use it for one deployment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Optional

import cachix_cache
from activate import environment, nix
from activate.agent import netrc
from activate.values import replace
from cachix_connection import Peer
from cachix_protocol import Cache
from cachix_proxy import for_nix

PUBLIC_CACHE = "cache.nixos.org-"  # how its keys begin: it signs whatever is in nixpkgs


@contextlib.contextmanager
def source(
    cache: Optional[Cache], peer: Peer, pinned: tuple[str, ...], config: dict[str, str], state: str
) -> Iterator[nix.Source]:
    """The workspace's cache for Nix, with a netrc that exists only while it is needed.

    `pinned` are the keys that count alone, if there are any, `config` is Nix's own configuration,
    and `state` the directory for the netrc. Raises Error if the cache can't be used.
    """
    configured = config.get("trusted-public-keys", "").split()
    own = tuple(key for key in configured if not key.startswith(PUBLIC_CACHE))
    if cache is None:
        environment.proxies = for_nix()
        yield nix.Source(keys=tuple(configured), signers=pinned or own)
        return
    offer = cachix_cache.offer(peer.host, cache)
    signers = pinned or tuple(dict.fromkeys([*offer.keys, *own]))
    keys = tuple(dict.fromkeys([*configured, *signers]))
    environment.proxies = for_nix(offer.url)
    note = f"the cache is on another host than --host: {offer.url}" * offer.is_elsewhere
    usual = nix.Source(offer.url, keys, signers=signers, note=note)
    if offer.is_public or not offer.is_near:
        yield replace(usual, is_far=not (offer.is_public or offer.is_near))
        return
    file = netrc.write_netrc(state, offer.url, peer.token, config.get("netrc-file", ""))
    try:
        yield replace(usual, netrc=file.path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(file.path)
        file.close()
