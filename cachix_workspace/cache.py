"""The binary caches: key pairs, and files below /cache/NAME/ as Nix reads and pushes them."""

from __future__ import annotations

import base64
import contextlib
import errno
import os
import re
import urllib.parse
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import Connection, insert, select

from cachix_protocol import BASE32, Cache, Error, is_store_path, utc_now
from cachix_workspace.refusal import Refusal
from cachix_workspace.settings import Settings
from cachix_workspace.tables import caches

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")  # a label of a host name
NARINFO = re.compile(f"([{BASE32}]{{32}})\\.narinfo")
NAR = re.compile(f"nar/[{BASE32}]{{32,64}}\\.nar(\\.[a-z0-9]{{1,8}})?")
NAR_HASH = re.compile(r"[a-z0-9]+:[0-9A-Za-z+/=]+")
# Nix asks caches by priority: cache.nixos.org has 40, so it is asked after ours.
INFO = "StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 30\n"
MAX_NARINFO = 1 << 20  # bytes
BLOCK = 1 << 18  # bytes of an upload in memory
TEMPORARY = ".upload-"


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

    @property
    def key(self) -> str:
        """The public key in Nix's form."""
        return f"{self.key_name}:{self.public_key}"


def create(
    connection: Connection, name: str, public: bool, settings: Settings
) -> tuple[CacheRow, str]:
    """Create a cache. Returns it and its secret key in Nix's form, which is kept nowhere.

    Raises Error if the name is taken or not usable.
    """
    if not NAME.fullmatch(name):
        allowed = "letters a to z, digits and `-`"
        raise Error(f"a cache's name is part of a host name: {allowed}, not {name!r}")
    if find(connection, name) is not None:
        raise Error(f"there is a cache {name} already: see `cachix-workspace cache show {name}`")
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


def _key_pair() -> tuple[bytes, bytes]:
    """An Ed25519 key pair: the seed and the public key."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    pair = Ed25519PrivateKey.generate()
    return pair.private_bytes_raw(), pair.public_key().public_bytes_raw()


def find(connection: Connection, name: str) -> CacheRow | None:
    """The cache of this name, if there is one."""
    row = connection.execute(select(caches).where(caches.c.name == name)).one_or_none()
    return None if row is None else CacheRow(**row._mapping)


def find_named(connection: Connection, name: str) -> CacheRow:
    """The cache that a command names. Raises Error if there is none."""
    row = find(connection, name)
    if row is None:
        raise Error(f"there is no cache {name}: make it with `cachix-workspace cache create`")
    return row


def url(settings: Settings, name: str) -> str:
    """The URL of a cache for Nix, whatever host, port and path the workspace has."""
    return f"{settings.public_url}/cache/{name}"


def find_for_agent(
    connection: Connection, cache_id: int | None, settings: Settings, host: str
) -> Cache | None:
    """The cache that an agent is to use: its token's, else the first; None if there is none.

    Cachix's agent derives the key's name from the cache's name and `host`, the host that it was
    given. If that gives the right name it is sent the bare key, as it expects. Ours takes both.
    """
    query = select(caches).order_by(caches.c.id).limit(1)
    if cache_id:
        query = select(caches).where(caches.c.id == cache_id)
    row = connection.execute(query).one_or_none()
    if row is None:
        return None
    cache = CacheRow(**row._mapping)
    derived = f"{cache.name}.{host_name(host)}-1"
    return Cache(
        name=cache.name,
        public_key=cache.public_key if cache.key_name == derived else cache.key,
        is_public=cache.public,
        uri=url(settings, cache.name),
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
    return bool(NARINFO.fullmatch(name) or NAR.fullmatch(name))


def path_of(settings: Settings, cache_name: str, file_name: str) -> Path:
    """The path of a file in a cache. Both names must have been checked."""
    return settings.data / "cache" / cache_name / file_name


def media_type(file_name: str) -> str:
    """The Content-Type of a file in a cache."""
    return "text/x-nix-narinfo" if file_name.endswith(".narinfo") else "application/x-nix-nar"


def store(target: Path, body: Readable, length: int | None) -> None:
    """Replace `target` by an upload, all or nothing.

    Raises Refusal if fewer than `length` bytes come, the disk is full, or a narinfo is wrong.
    """
    temporary = target.parent / f"{TEMPORARY}{uuid.uuid4()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            received = _copy(body, file, MAX_NARINFO if target.suffix == ".narinfo" else None)
            if length is not None and received != length:
                raise Refusal(400, f"the upload broke off after {received} of {length} bytes")
            file.flush()
            # or a power loss could leave the name without the content, and Nix not push it again
            os.fsync(file.fileno())
        if target.suffix == ".narinfo":
            check_narinfo(target.name, temporary.read_bytes())
        os.replace(temporary, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Refusal(507, "the workspace has no space left for this file") from None
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _copy(body: Readable, file: Any, limit: int | None) -> int:
    """The number of bytes. Raises Refusal if they are more than `limit`."""
    received = 0
    while block := body.read(BLOCK):
        received += len(block)
        if limit is not None and received > limit:
            raise Refusal(413, f"a narinfo has at most {limit} bytes")
        file.write(block)
    return received


def check_narinfo(file_name: str, content: bytes) -> None:
    """Raises Refusal (400) if a narinfo lacks a field that readers need, or is of another path."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise Refusal(400, f"{file_name} is not UTF-8") from None
    fields = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    store_path = fields.get("StorePath", "")
    expected = f"/nix/store/{file_name.removesuffix('.narinfo')}-"
    if not is_store_path(store_path) or not store_path.startswith(expected):
        raise Refusal(400, f"{file_name} has no `StorePath` of that hash")
    if not NAR.fullmatch(fields.get("URL", "")):
        raise Refusal(400, f"{file_name} has no `URL` such as nar/HASH.nar.xz")
    if not NAR_HASH.fullmatch(fields.get("NarHash", "")):
        raise Refusal(400, f"{file_name} has no `NarHash`")


def remove_leftovers(settings: Settings) -> None:
    """Remove the temporary files of uploads that a killed server left behind."""
    for pattern in (f"cache/*/{TEMPORARY}*", f"cache/*/nar/{TEMPORARY}*"):
        for file in settings.data.glob(pattern):
            with contextlib.suppress(OSError):
                file.unlink()
