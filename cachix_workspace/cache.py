"""The binary caches: key pairs, and files below /cache/NAME/ as Nix reads and pushes them."""

from __future__ import annotations

import base64
import contextlib
import enum
import errno
import hashlib
import os
import re
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from sqlalchemy import Connection, insert, select, update

from cachix_protocol import BASE32, Cache, base32, utc_now
from cachix_workspace import narinfo
from cachix_workspace.files import TEMPORARY, Store
from cachix_workspace.narinfo import Narinfo
from cachix_workspace.refusal import Refusal
from cachix_workspace.settings import Settings
from cachix_workspace.stores import make_directory
from cachix_workspace.tables import caches

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")  # a label of a host name
NAR = re.compile(f"nar/[{BASE32}]{{32,64}}\\.nar(\\.[a-z0-9]{{1,8}})?")
# Nix asks caches by priority: cache.nixos.org has 40, so it is asked after ours.
INFO = "StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 30\n"
BLOCK = 1 << 18  # bytes of an upload in memory


class Readable(Protocol):
    """The body of a request; `read` raises Refusal if it breaks off."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class CacheRow:
    """A cache as the database has it."""

    id: int
    name: str
    public: bool
    key_name: str
    public_key: str
    created_on: str
    old_key_name: str | None = None
    old_public_key: str | None = None

    @property
    def key(self) -> str:
        """The public key in Nix's form."""
        return f"{self.key_name}:{self.public_key}"

    @property
    def keys(self) -> dict[str, bytes]:
        """The public keys by their names: a narinfo must be signed by one."""
        named = {self.key_name: self.public_key, self.old_key_name: self.old_public_key}
        return {name: base64.b64decode(key) for name, key in named.items() if name and key}

    @property
    def all_keys(self) -> str:
        """The public keys in Nix's form, separated by blanks: an old one last."""
        old = f" {self.old_key_name}:{self.old_public_key}" if self.old_key_name else ""
        return f"{self.key}{old}"


def create(
    connection: Connection, name: str, public: bool, settings: Settings
) -> tuple[CacheRow, str]:
    """Create a cache. Returns it and its secret key in Nix's form, which is kept nowhere.

    Raises Refusal if the name is taken or not usable.
    """
    if not NAME.fullmatch(name):
        allowed = "letters a to z, digits and `-`"
        raise Refusal(400, f"a cache's name is part of a host name: {allowed}, not {name!r}")
    if find(connection, name) is not None:
        raise Refusal(
            409, f"there is a cache {name} already: see `cachix-workspace cache show {name}`"
        )
    seed, public_key = _key_pair()
    host = settings.public_host.replace(":", "-")  # to Nix, a key's name ends at the first colon
    key_name = f"{name}.{host}-1"
    query = insert(caches).values(
        name=name,
        public=public,
        key_name=key_name,
        public_key=base64.b64encode(public_key).decode(),
        created_on=utc_now(),
    )
    row = connection.execute(query.returning(*caches.c)).one()
    return CacheRow(**row._mapping), f"{key_name}:{base64.b64encode(seed + public_key).decode()}"


def rotate(connection: Connection, name: str) -> tuple[CacheRow, str]:
    """Make a new key for a cache; the cache, and the secret key in Nix's form.

    The former key counts as well, until it is retired. Raises Refusal if there is one before it.
    """
    row = find_named(connection, name)
    if row.old_key_name is not None:
        hint = f"`cachix-workspace cache key retire {name}`"
        raise Refusal(
            409, f"the old key {row.old_key_name} of {name} counts still: drop it by {hint}"
        )
    seed, public_key = _key_pair()
    base, _, number = row.key_name.rpartition("-")
    key_name = f"{base}-{int(number) + 1}" if number.isdigit() else f"{row.key_name}-2"
    values = {
        "key_name": key_name,
        "public_key": base64.b64encode(public_key).decode(),
        "old_key_name": row.key_name,
        "old_public_key": row.public_key,
    }
    connection.execute(update(caches).where(caches.c.id == row.id).values(**values))
    secret = f"{key_name}:{base64.b64encode(seed + public_key).decode()}"
    return find_named(connection, name), secret


def retire(connection: Connection, name: str) -> CacheRow:
    """Drop the old key of a cache. Raises Refusal if there is none."""
    row = find_named(connection, name)
    if row.old_key_name is None:
        hint = "`cachix-workspace cache key rotate` makes another"
        raise Refusal(409, f"cache {name} has one key only: {hint}")
    values = {"old_key_name": None, "old_public_key": None}
    connection.execute(update(caches).where(caches.c.id == row.id).values(**values))
    return find_named(connection, name)


def _key_pair() -> tuple[bytes, bytes]:
    """An Ed25519 key pair: the seed and the public key."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    pair = Ed25519PrivateKey.generate()
    return pair.private_bytes_raw(), pair.public_key().public_bytes_raw()


def find(connection: Connection, name: str) -> CacheRow | None:
    """The cache of this name, if there is one."""
    row = connection.execute(select(caches).where(caches.c.name == name)).one_or_none()
    return None if row is None else CacheRow(**row._mapping)


def list_all(connection: Connection) -> list[CacheRow]:
    """All caches, the oldest first: it is the one that agents use by default."""
    rows = connection.execute(select(caches).order_by(caches.c.id))
    return [CacheRow(**row._mapping) for row in rows]


def find_named(connection: Connection, name: str) -> CacheRow:
    """The cache of this name. Raises Refusal (404) if there is none."""
    row = find(connection, name)
    if row is None:
        raise Refusal(
            404, f"there is no cache {name}: make it with `cachix-workspace cache create`"
        )
    return row


def url(settings: Settings, name: str) -> str:
    """The URL of a cache for Nix, whatever host, port and path the workspace has."""
    return f"{settings.public_url}/cache/{name}"


def find_default(connection: Connection, cache_id: int | None) -> CacheRow | None:
    """The cache of a token, by its number, else the first one; None if there is none."""
    query = select(caches).order_by(caches.c.id).limit(1)
    if cache_id:
        query = select(caches).where(caches.c.id == cache_id)
    row = connection.execute(query).one_or_none()
    return None if row is None else CacheRow(**row._mapping)


def find_for_agent(
    connection: Connection,
    cache_id: int | None,
    settings: Settings,
    host: str,
    is_ours: bool = True,
) -> Cache | None:
    """The cache that an agent is to use: its token's, else the first; None if there is none."""
    cache = find_default(connection, cache_id)
    return None if cache is None else offer(cache, settings, host, is_ours)


def offer(cache: CacheRow, settings: Settings, host: str, is_ours: bool = True) -> Cache:
    """A cache as an agent or a push is to use it.

    Its URL has the host that the client came by, if that is one of ours: the client's token goes to
    no other one. Cachix's agent derives the key's name from the cache's name and `host`, the host
    that it was given. If that gives the right name it is sent the bare key, as it expects. Ours
    takes both. To Cachix's an old key is sent while it counts, if that is the one of that name.
    """
    derived, key = f"{cache.name}.{host_name(host)}-1", cache.all_keys
    if cache.key_name == derived and (not is_ours or cache.old_key_name is None):
        key = cache.public_key
    elif cache.old_key_name == derived and not is_ours:
        key = str(cache.old_public_key)
    return Cache(
        name=cache.name,
        public_key=key,
        is_public=cache.public,
        uri=f"{settings.url_by(host)}/cache/{cache.name}",
    )


def host_name(host: str) -> str:
    """A Host header without its port."""
    try:
        return urllib.parse.urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


# --- files ----------------------------------------------------------------------------------------


def is_file_name(name: str) -> bool:
    """Whether `name` is that of a file in a cache; nothing else ever becomes a path."""
    return bool(narinfo.FILE_NAME.fullmatch(name) or NAR.fullmatch(name))


def media_type(file_name: str) -> str:
    """The Content-Type of a file in a cache."""
    return "text/x-nix-narinfo" if file_name.endswith(".narinfo") else "application/x-nix-nar"


def store_nar(store: Store, name: str, body: Readable, length: int | None) -> Stored:
    """Store an upload, all or nothing. A NAR never changes.

    Raises Refusal if fewer than `length` bytes come, their hash is not that of the file's name, or
    the disk is full.
    """
    with upload(store, name, body, length, None) as (temporary, digest):
        match = narinfo.NAR.fullmatch(name)
        if match is None or match[1] != base32(digest):
            raise Refusal(400, f"{name} is not named after the SHA-256 of its bytes")
        if store.create(temporary, name):
            return Stored.NEW
        store.touch(name)  # so that nothing collects it before its narinfo comes
        return Stored.KNOWN


class Stored(enum.Enum):
    """The result of an upload: the cache had nothing of its name, the same, or something else."""

    NEW = enum.auto()
    KNOWN = enum.auto()
    DROPPED = enum.auto()


def store_narinfo(
    store: Store,
    name: str,
    body: Readable,
    length: int | None,
    cache: CacheRow,
    renewed: Callable[[], CacheRow],
) -> Stored:
    """Store a narinfo that is signed by the cache's key, and whose NAR is there.

    `renewed` reads the cache anew, where `cache` may be old.

    Another one of the same contents adds its signatures. One of other contents is dropped while the
    first one's NAR is there: a push that has lost a race is no failure. Raises Refusal.
    """
    with upload(store, name, body, length, narinfo.MOST_BYTES) as (temporary, _):
        info = Narinfo.parse(name, temporary.read_bytes())
        if not info.is_signed_by(cache.keys):
            cache = renewed()
        _check(info, store, name, cache)
        for _ in range(3):  # another push may come between the look and the change
            if store.create(temporary, name):
                return Stored.NEW
            earlier = read(store, name)
            if earlier is None or not is_whole(earlier, store, cache):
                store.replace(temporary, name)
                return Stored.NEW
            if not info.describes_the_same(earlier):
                return Stored.DROPPED
            if set(info.signatures) - set(earlier.signatures):
                _rewrite(temporary, earlier.signed_also(info).text())
                store.replace(temporary, name)
            return Stored.KNOWN
    return Stored.KNOWN


@contextlib.contextmanager
def upload(
    store: Store, name: str, body: Readable, length: int | None, limit: int | None
) -> Iterator[tuple[Path, bytes]]:
    """Write an upload into a temporary file; its path and the SHA-256. Raises Refusal."""
    place = store.place(name)
    temporary = place / f"{TEMPORARY}{os.urandom(16).hex()}"
    try:
        with _opened(temporary, place) as file:
            received, digest = _copy(body, file, limit)
            if length is not None and received != length:
                raise Refusal(400, f"the upload broke off after {received} of {length} bytes")
            file.flush()
            # or a power loss could leave the name without the content, and Nix not push it again
            os.fsync(file.fileno())
        yield temporary, digest
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Refusal(507, "the workspace has no space left for this file") from None
        raise
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _opened(temporary: Path, place: Path) -> IO[bytes]:
    """A new file, in a directory that is made if it is not there."""
    try:
        return open(temporary, "xb")
    except FileNotFoundError:
        make_directory(place)
        return open(temporary, "xb")


def _copy(body: Readable, file: Any, limit: int | None) -> tuple[int, bytes]:
    """The number of bytes and their SHA-256. Raises Refusal if they are more than `limit`."""
    received, digest = 0, hashlib.sha256()
    while block := body.read(BLOCK):
        received += len(block)
        if limit is not None and received > limit:
            raise Refusal(413, f"this file has at most {limit} bytes")
        digest.update(block)
        file.write(block)
    return received, digest.digest()


def _rewrite(temporary: Path, text: str) -> None:
    """Replace what was uploaded."""
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _check(info: Narinfo, store: Store, name: str, cache: CacheRow) -> None:
    """Raises Refusal (400) if a narinfo is not signed by the cache's key, or its NAR not there."""
    if not info.is_signed_by(cache.keys):
        raise Refusal(
            400,
            f"{name} has no signature by {cache.key_name}, the key of the cache "
            f"{cache.name}: push with `?secret-key=FILE` at the end of the cache's URL",
        )
    nar = store.entry(info.url)
    expected = info.size if info.compression == "none" else info.file_size
    if nar is None:
        raise Refusal(400, f"{name} names {info.url}, which is not there: upload that first")
    if expected is not None and nar.size != expected:
        raise Refusal(400, f"{name} says that {info.url} has {expected} bytes, not {nar.size}")


def read(store: Store, name: str) -> Narinfo | None:
    """A narinfo that was stored; None if there is none that this release would take.

    Raises OSError if that can't be told.
    """
    content = store.read(name)
    if content is None or len(content.body) > narinfo.MOST_BYTES:
        return None
    try:
        return Narinfo.parse(name, content.body)
    except Refusal:
        return None


def is_whole(info: Narinfo, store: Store, cache: CacheRow) -> bool:
    """Whether a stored narinfo is signed by the cache's key, and its NAR still there."""
    return info.is_signed_by(cache.keys) and store.entry(info.url) is not None
