"""The binary caches of the workspace: key pairs, and files below /cache/NAME/ as Nix reads and pushes them."""

from __future__ import annotations

import base64
import contextlib
import errno
import os
import re
import urllib.parse
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import Connection, insert, select

import cachix_protocol
from cachix_workspace import Error, Refusal, Settings
from cachix_workspace.tables import caches

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")  # a label of a host name
BASE32 = "[0123456789abcdfghijklmnpqrsvwxyz]"
NARINFO = re.compile(f"({BASE32}{{32}})\\.narinfo")
NAR = re.compile(f"nar/{BASE32}{{32,64}}\\.nar(\\.[a-z0-9]{{1,8}})?")
STORE_PATH = re.compile(f"/nix/store/({BASE32}{{32}})-[^/\\s]+")
NAR_HASH = re.compile(r"[a-z0-9]+:[0-9A-Za-z+/=]+")
INFO = "StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 30\n"  # asked before cache.nixos.org, which has 40
MAX_NARINFO = 1 << 20  # bytes
BLOCK = 1 << 18
TEMPORARY = ".upload-"


class Readable(Protocol):
    """The body of a request; `read` raises Refusal where it breaks off."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class Cache:
    """A cache as the database has it. Nix knows its key as `key_name:public_key`."""

    id: int
    name: str
    public: bool
    key_name: str
    public_key: str
    created_on: str

    @property
    def key(self) -> str:
        return f"{self.key_name}:{self.public_key}"


def create(
    connection: Connection, name: str, public: bool, settings: Settings
) -> tuple[Cache, str]:
    """A new cache and its secret key in Nix's form, which is kept nowhere. Raises Error for a name that can't be."""
    if not NAME.fullmatch(name):
        raise Error(
            f"a cache's name is part of a host name: letters a to z, digits and `-`, not {name!r}"
        )
    if find(connection, name) is not None:
        raise Error(f"there is a cache {name} already: see `cachix-workspace cache show {name}`")
    seed, public_key = _key_pair()
    key_name = f"{name}.{settings.public_host}-1"
    values = {
        "name": name,
        "public": public,
        "key_name": key_name,
        "public_key": base64.b64encode(public_key).decode(),
    }
    connection.execute(insert(caches).values(**values, created_on=cachix_protocol.utc_now()))
    made = find(connection, name)
    if made is None:
        raise Error(f"the cache {name} could not be stored")
    return made, f"{key_name}:{base64.b64encode(seed + public_key).decode()}"


def _key_pair() -> tuple[bytes, bytes]:
    """An Ed25519 key pair: the seed and the public key."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    pair = Ed25519PrivateKey.generate()
    return pair.private_bytes_raw(), pair.public_key().public_bytes_raw()


def find(connection: Connection, name: str) -> Cache | None:
    row = connection.execute(select(caches).where(caches.c.name == name)).one_or_none()
    return None if row is None else Cache(**row._mapping)


def url(settings: Settings, cache: Cache) -> str:
    """Where Nix finds the cache, whatever its host, port and path are."""
    return f"{settings.public_url}/cache/{cache.name}"


def for_agent(
    connection: Connection, cache_id: int | None, settings: Settings, host: str
) -> cachix_protocol.Cache | None:
    """The cache that an agent is told of: its token's, else the first; None without any.

    Cachix's agent makes the key's name of the cache's name and the host that it was given, `host`: where that gives
    the right name the key is sent as it expects it, bare. Ours understands both.
    """
    mine = (
        select(caches).where(caches.c.id == cache_id)
        if cache_id
        else select(caches).order_by(caches.c.id).limit(1)
    )
    row = connection.execute(mine).one_or_none()
    if row is None:
        return None
    found = Cache(**row._mapping)
    derived = f"{found.name}.{host_name(host)}-1"
    key = found.public_key if found.key_name == derived else found.key
    return cachix_protocol.Cache(found.name, key, found.public, url(settings, found))


def host_name(host: str) -> str:
    """A Host header without its port."""
    try:
        return urllib.parse.urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


class ByHost:
    """WSGI middleware: what is asked of NAME.<public host> is asked of /cache/NAME, as Cachix's agent expects it."""

    def __init__(self, app: Any, settings: Settings) -> None:
        self.app, self.suffix = app, "." + settings.public_host

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        host = host_name(environ.get("HTTP_HOST", ""))
        name = host[: -len(self.suffix)]
        if host.endswith(self.suffix) and NAME.fullmatch(name):
            environ = {**environ, "PATH_INFO": f"/cache/{name}{environ.get('PATH_INFO', '/')}"}
        return self.app(environ, start_response)  # type: ignore[no-any-return]


# --- files -----------------------------------------------------------------------------------------------------------


def is_file_name(name: str) -> bool:
    """Whether `name` is of a file that a cache holds; nothing else ever becomes a path."""
    return bool(NARINFO.fullmatch(name) or NAR.fullmatch(name))


def path_of(settings: Settings, cache_name: str, file_name: str) -> Path:
    """Both names must have been checked."""
    return settings.data / "cache" / cache_name / file_name


def media_type(file_name: str) -> str:
    return "text/x-nix-narinfo" if file_name.endswith(".narinfo") else "application/x-nix-nar"


def store(target: Path, body: Readable, length: int | None) -> None:
    """Write an upload in place of `target`, all or nothing. Raises Refusal where less than `length` bytes come."""
    temporary = target.parent / f"{TEMPORARY}{uuid.uuid4()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            received = _copy(body, file, MAX_NARINFO if target.suffix == ".narinfo" else None)
            if length is not None and received != length:
                raise Refusal(400, f"the upload broke off after {received} of {length} bytes")
            file.flush()
            os.fsync(
                file.fileno()
            )  # a name that survives a power loss without its content would never be sent again
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
    """The number of bytes. Raises Refusal where they are more than `limit`."""
    received = 0
    while block := body.read(BLOCK):
        received += len(block)
        if limit is not None and received > limit:
            raise Refusal(413, f"a narinfo has at most {limit} bytes")
        file.write(block)
    return received


def check_narinfo(file_name: str, content: bytes) -> None:
    """Raises Refusal (400) where a narinfo lacks what every reader needs, or is of another path."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise Refusal(400, f"{file_name} is not UTF-8") from None
    fields = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    known, expected = (
        STORE_PATH.fullmatch(fields.get("StorePath", "")),
        NARINFO.fullmatch(file_name),
    )
    if not known or not expected or known[1] != expected[1]:
        raise Refusal(400, f"{file_name} has no `StorePath` of that hash")
    if not NAR.fullmatch(fields.get("URL", "")):
        raise Refusal(400, f"{file_name} has no `URL` such as nar/HASH.nar.xz")
    if not NAR_HASH.fullmatch(fields.get("NarHash", "")):
        raise Refusal(400, f"{file_name} has no `NarHash`")


def remove_leftovers(settings: Settings) -> None:
    """Remove what uploads left that were under way when the server was killed."""
    for pattern in (f"cache/*/{TEMPORARY}*", f"cache/*/nar/{TEMPORARY}*"):
        for file in settings.data.glob(pattern):
            with contextlib.suppress(OSError):
                file.unlink()
