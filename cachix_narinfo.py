"""The closures of store paths as Nix's database has them, and their signed descriptions (narinfo).

The workspace checks them by cachix_workspace/narinfo.py.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator

from activate.process import output
from activate.text import base32, hide
from activate.values import dataclass, field
from cachix_cache import KEY_NAME, KEY_SIZE
from cachix_protocol import Error, UsageError, is_store_path
from cachix_signed import SEED_SIZE, decoded

KEY_VARIABLE = "CACHIX_SIGNING_KEY"
TIMEOUT = 600.0  # seconds for a question about a closure
AT_ONCE = 1000  # paths on one command line
FIXED_LINES = 5  # of a path in a dump of Nix's database


@dataclass(frozen=True)
class PathInfo:
    """A valid store path. `nar_hash` is the SHA-256 of its archive, `size` that archive's bytes.

    `references` are names without /nix/store/, and so is `deriver`.
    """

    path: str
    nar_hash: bytes
    size: int
    references: tuple[str, ...]
    deriver: str = ""

    @property
    def hash(self) -> str:
        """The part of the path by which caches name it."""
        return self.path[11:43]

    @property
    def fingerprint(self) -> bytes:
        """The text that is signed."""
        names = ",".join(f"/nix/store/{name}" for name in self.references)
        return f"1;{self.path};sha256:{base32(self.nar_hash)};{self.size};{names}".encode()


@dataclass(frozen=True)
class Archived:
    """A path's archive as a file of a cache: its name, compression, size and SHA-256."""

    url: str
    compression: str
    size: int
    digest: bytes


# --- Nix ------------------------------------------------------------------------------------------


def invalid(paths: list[str]) -> list[str]:
    """Those paths that this machine's store does not have. Raises CommandFailed."""
    argv = ["nix-store", "--check-validity", "--print-invalid", *paths]
    return [line for line in output(argv, TIMEOUT).splitlines() if line in paths]


def closure(paths: list[str]) -> list[PathInfo]:
    """All paths that these ones need, each after its references. Raises CommandFailed, Error."""
    names = output(["nix-store", "--query", "--requisites", *paths], TIMEOUT).split()
    infos: dict[str, PathInfo] = {}
    for start in range(0, len(names), AT_ONCE):
        argv = ["nix-store", "--dump-db", *names[start : start + AT_ONCE]]
        infos.update((info.path, info) for info in parse_dump(output(argv, TIMEOUT)))
    missing = next((name for name in names if name not in infos), None)
    if missing is not None:
        raise Error(f"Nix says nothing of {missing}: is it being deleted?")
    return [infos[name] for name in names]


def parse_dump(text: str) -> Iterator[PathInfo]:
    """The paths in a dump of Nix's database. Raises Error if it is none.

    For each there are lines: path, hash, size, deriver or nothing, number of references, and these.
    """
    lines, position = text.split("\n"), 0
    while position + FIXED_LINES < len(lines):
        path, digest, size, deriver, count = lines[position : position + FIXED_LINES]
        position += FIXED_LINES
        try:
            references = lines[position : position + int(count)]
            position += int(count)
            raw = bytes.fromhex(digest.rpartition(":")[2])
            names = sorted(os.path.basename(one) for one in references)
            info = PathInfo(path, raw, int(size), tuple(names), os.path.basename(deriver))
        except ValueError:
            info = PathInfo("", b"", 0, ())
        if not is_store_path(info.path) or len(info.nar_hash) != KEY_SIZE:
            raise Error(f"`nix-store --dump-db` printed no description of a path: {path[:100]!r}")
        yield info


# --- the key --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CacheKey:
    """The secret key of a cache. Its `name` is empty if it came without one."""

    name: str
    seed: bytes = field(repr=False)

    @classmethod
    def parse(cls, text: str, place: str) -> CacheKey:
        """A key as NAME:BASE64 or BASE64, from a place. Raises UsageError, without the text."""
        name, _, encoded = text.strip().rpartition(":")
        both = decoded(encoded, SEED_SIZE + KEY_SIZE)
        if both is None or (name and not KEY_NAME.fullmatch(name)):
            form = "NAME:KEY or KEY, as `cachix-workspace cache create` prints it"
            raise UsageError(f"{place} holds no secret key of a cache, which is {form}")
        hide(encoded)
        return cls(name, both[:SEED_SIZE])

    @classmethod
    def read(cls, path: str) -> CacheKey:
        """The key in a file. Raises UsageError."""
        try:
            with open(path, encoding="ascii") as file:
                return cls.parse(file.read(1 << 12), path)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the key of the cache, {path}, can't be read: {error}") from None

    def named(self, public_keys: tuple[str, ...], cache: str) -> CacheKey:
        """This key by the name that the cache has for it. Raises UsageError if it is not its key.

        `public_keys` are NAME:BASE64.
        """
        import cachix_ed25519

        own = base64.b64encode(cachix_ed25519.public_key(self.seed)).decode()
        for public_key in public_keys:
            name, _, key = public_key.partition(":")
            if key == own:
                return CacheKey(name, self.seed)
        names = " or ".join(key.partition(":")[0] for key in public_keys)
        mine = f" {self.name}" if self.name else ""
        hint = f"set {KEY_VARIABLE}, or give --cache-key=FILE"
        raise UsageError(
            f"the signing key{mine} is not that of the cache {cache}, which is {names}, so that no"
            f" agent would take what it signs: {hint}"
        )

    def sign(self, text: bytes) -> str:
        """The signature of a text, as in a narinfo."""
        import cachix_ed25519

        signature = cachix_ed25519.sign(self.seed, text)
        return f"{self.name}:{base64.b64encode(signature).decode()}"


def narinfo(info: PathInfo, archived: Archived, key: CacheKey) -> bytes:
    """The description of a path in a cache, signed."""
    lines = [
        f"StorePath: {info.path}",
        f"URL: {archived.url}",
        f"Compression: {archived.compression}",
        f"FileHash: sha256:{base32(archived.digest)}",
        f"FileSize: {archived.size}",
        f"NarHash: sha256:{base32(info.nar_hash)}",
        f"NarSize: {info.size}",
        f"References: {' '.join(info.references)}",
        *([f"Deriver: {info.deriver}"] if info.deriver else []),
        f"Sig: {key.sign(info.fingerprint)}",
    ]
    return "\n".join([*lines, ""]).encode()
