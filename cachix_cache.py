"""The binary cache that a workspace names, checked before Nix or a netrc gets to see it.

To Nix the URL of a cache is more than an address: `file:` reads this machine, `?trusted=1` switches
signatures off, and a blank separates two caches. Only an address is taken from a workspace.
"""

from __future__ import annotations

import base64
import binascii
import re
import urllib.parse
from typing import Optional

from activate.values import dataclass
from cachix_protocol import UNREADABLE, Cache, Error, UsageError

NAME = re.compile(r"[a-z0-9-]{1,63}")
HOST = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252})|\[[0-9A-Fa-f:.]{2,45}\]"
URL = re.compile(rf"https?://(?:{HOST})(?::[0-9]{{1,5}})?(?:/[A-Za-z0-9._~%!$&'()*+,;=:@/-]*)?")
KEY_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._+-]{0,254}")
KEY_SIZE = 32  # bytes of an Ed25519 public key
EXAMPLE_KEY = "main.example.org-1:BASE64"


@dataclass(frozen=True)
class Offer:
    """A workspace's cache as Nix is to use it. `keys` are NAME:BASE64, as the workspace says.

    Only if the cache `is_near` it may have the agent's token. `is_elsewhere`: its host is neither
    the workspace's nor below it.
    """

    url: str
    keys: tuple[str, ...]
    is_public: bool
    is_near: bool
    is_elsewhere: bool = False


def offer(host: str, cache: Cache) -> Offer:
    """The cache that the workspace at URL `host` names. Raises Error if any of it can't be used."""
    if cache == UNREADABLE:
        raise refusal("its description can't be read")
    if not NAME.fullmatch(cache.name):
        raise refusal(f"`cacheName` is {cache.name[:100]!r}, which is no label of a host name")
    url = derived_url(host, cache.name) if cache.uri is None else cache.uri
    if not is_url(url):
        raise refusal("its `uri` is not http(s)://HOST[:PORT][/PATH]")
    keys = (named_key(host, cache),) if is_key(cache.public_key) else words(cache.public_key)
    bad = next((key for key in keys if not is_named_key(key)), None if keys else "")
    if bad is not None:
        wanted = f"NAME:KEY with {KEY_SIZE} bytes in base64"
        raise refusal(f"`publicKey` holds {bad[:100]!r} in place of {wanted}")
    return Offer(url, keys, cache.is_public, is_near(host, url), not is_below(host, url))


def refusal(problem: str) -> Error:
    """The error for a cache that can't be used."""
    return Error(f"the workspace names a cache that is not usable: {problem}; nothing was changed")


def is_url(text: str) -> bool:
    """Whether a URL is an address and nothing more: no query, user or blank, no other scheme."""
    try:
        return bool(URL.fullmatch(text)) and urllib.parse.urlsplit(text).port != 0
    except ValueError:
        return False


def is_key(text: str) -> bool:
    """Whether `text` is a public key without a name."""
    try:
        return len(base64.b64decode(text, validate=True)) == KEY_SIZE
    except (binascii.Error, ValueError):
        return False


def is_named_key(text: str) -> bool:
    """Whether `text` is a public key as Nix takes it."""
    name, _, key = text.partition(":")
    return KEY_NAME.fullmatch(name) is not None and is_key(key)


def words(text: str) -> tuple[str, ...]:
    """The keys of a list that is separated by blanks, as in nix.conf."""
    return tuple(part for part in text.split(" ") if part)


def derived_url(host: str, name: str) -> str:
    """The URL that Cachix's client gives a cache: a subdomain of the workspace."""
    parts = urllib.parse.urlsplit(host)
    return f"{parts.scheme}://{name}.{parts.netloc.rpartition('@')[2]}"


def named_key(host: str, cache: Cache) -> str:
    """A bare key with the name that Cachix's client gives it."""
    name = (urllib.parse.urlsplit(host).hostname or "").replace(":", "-")
    return f"{cache.name}.{name}-1:{cache.public_key}"


def is_near(host: str, url: str) -> bool:
    """Whether a cache may have the token: on the workspace's host or below, as encrypted as it."""
    is_weaker = host.startswith("https:") and not url.startswith("https:")
    return is_below(host, url) and not is_weaker


def is_below(host: str, url: str) -> bool:
    """Whether a cache is on the workspace's host or below it."""
    name, other = (urllib.parse.urlsplit(each).hostname or "" for each in (host, url))
    return other == name or other.endswith(f".{name}")


def trusted_keys(options: list[str], variable: Optional[str]) -> tuple[str, ...]:
    """The keys that this machine's operator pins, of an option and a variable. Raises UsageError.

    They replace the workspace's own: a stolen workspace can't name one of its own then.
    """
    keys = tuple(dict.fromkeys([*options, *(variable or "").split()]))
    bad = next((key for key in keys if not is_named_key(key)), None)
    if bad is not None:
        raise UsageError(f"--trusted-key must be a key such as {EXAMPLE_KEY}, not {bad[:100]!r}")
    return keys
