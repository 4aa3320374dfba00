"""The description of a store path in a binary cache: parsed as Nix does, signed by the cache's key.

Nix splits a narinfo at newlines only, and the last of two fields counts. Whatever it could read in
another way than this module does is refused, as agents believe what is stored here.
"""

from __future__ import annotations

import base64
import binascii
import functools
import re
from dataclasses import dataclass, replace
from typing import Any

from cachix_protocol import BASE32, is_store_path
from cachix_workspace.refusal import Refusal

FILE_NAME = re.compile(f"([{BASE32}]{{32}})\\.narinfo")
MOST_BYTES = 1 << 20
LARGEST = 1 << 62  # bytes of a NAR
NAR = re.compile(f"nar/([{BASE32}]{{52}})\\.nar(\\.[a-z0-9]{{1,8}})?")  # by the file's SHA-256
HASH = re.compile(f"sha256:[{BASE32}]{{52}}")
NUMBER = re.compile(r"[0-9]{1,19}")
COMPRESSIONS = frozenset(
    ("none", "br", "bzip2", "compress", "grzip", "gzip", "lrzip", "lz4", "lzip", "lzma", "lzop")
    + ("xz", "zstd")
)


@dataclass(frozen=True)
class Narinfo:
    """A store path as a cache describes it. `size` is that of the NAR, `file_size` of its file."""

    store_path: str
    url: str
    compression: str
    nar_hash: str
    size: int
    references: tuple[str, ...]
    signatures: tuple[str, ...]
    file_size: int | None
    lines: tuple[str, ...]  # all of them but the signatures, as they came

    @classmethod
    def parse(cls, file_name: str, content: bytes) -> Narinfo:
        """Raises Refusal (400) that says what is wrong."""
        lines = _lines(file_name, content)
        fields = _fields(file_name, lines)
        result = cls(
            store_path=fields.get("StorePath", ""),
            url=fields.get("URL", ""),
            compression=fields.get("Compression", "bzip2"),  # as Nix takes it
            nar_hash=fields.get("NarHash", ""),
            size=int(fields.get("NarSize", "") or 0) if _is_number(fields, "NarSize") else 0,
            references=tuple(fields.get("References", "").split()),
            signatures=tuple(line[5:] for line in lines if line.startswith("Sig: ")),
            file_size=int(fields["FileSize"]) if _is_number(fields, "FileSize") else None,
            lines=tuple(line for line in lines if not line.startswith("Sig: ")),
        )
        if "FileSize" in fields and result.file_size is None:
            raise Refusal(400, f"{file_name} has no number as its `FileSize`")
        result.check(file_name)
        return result

    def check(self, file_name: str) -> None:
        """Raises Refusal (400) for a field that is missing or wrong."""
        start = f"/nix/store/{file_name.removesuffix('.narinfo')}-"
        references = [f"/nix/store/{name}" for name in self.references]
        for is_good, problem in (
            (self.is_of(start), "has no `StorePath` of that hash"),
            (NAR.fullmatch(self.url), "has no `URL` such as nar/HASH.nar.xz"),
            (self.compression in COMPRESSIONS, "has an unknown `Compression`"),
            (HASH.fullmatch(self.nar_hash), "has no `NarHash` such as sha256:HASH in base32"),
            (0 < self.size <= LARGEST, "has no `NarSize`, which is a number of bytes"),
            (all(map(is_store_path, references)), "has `References` that are no store paths"),
        ):
            if not is_good:
                raise Refusal(400, f"{file_name} {problem}")

    def is_of(self, start: str) -> bool:
        """Whether the store path is one, and begins like this."""
        return is_store_path(self.store_path) and self.store_path.startswith(start)

    @property
    def fingerprint(self) -> bytes:
        """The text that is signed. https://nix.dev/manual/nix/latest/store/store-path has it."""
        names = ",".join(f"/nix/store/{name}" for name in sorted(set(self.references)))
        return f"1;{self.store_path};{self.nar_hash};{self.size};{names}".encode()

    def is_signed_by(self, keys: dict[str, bytes]) -> bool:
        """Whether one of the signatures is by one of the public keys, which are named."""
        return any(_verifies(signature, keys, self.fingerprint) for signature in self.signatures)

    def describes_the_same(self, other: Narinfo) -> bool:
        """Whether another narinfo has the same contents, whatever its NAR's file is."""
        return self.fingerprint == other.fingerprint

    def signed_also(self, other: Narinfo) -> Narinfo:
        """This narinfo with the signatures of another one added."""
        return replace(self, signatures=tuple(dict.fromkeys(self.signatures + other.signatures)))

    def text(self) -> str:
        """The file."""
        return "\n".join([*self.lines, *(f"Sig: {one}" for one in self.signatures), ""])


def _lines(file_name: str, content: bytes) -> list[str]:
    """The lines of a narinfo. Raises Refusal (400) for characters that a reader may trip over."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise Refusal(400, f"{file_name} is not UTF-8") from None
    lines = text.split("\n")
    if lines[-1]:
        raise Refusal(400, f"{file_name} ends within a line")
    if not all(line.isprintable() for line in lines):
        raise Refusal(400, f"{file_name} has control characters")
    return lines[:-1]


def _fields(file_name: str, lines: list[str]) -> dict[str, str]:
    """The fields of a narinfo but for the signatures. Raises Refusal (400)."""
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(": ")
        if not colon or not re.fullmatch("[A-Za-z]{1,40}", name):
            raise Refusal(400, f"{file_name} has a line that is not `Name: value`")
        if name in fields and name != "Sig":
            raise Refusal(400, f"{file_name} has two fields `{name}`")
        fields[name] = value
    return fields


def _is_number(fields: dict[str, str], name: str) -> bool:
    """Whether a field is a number of bytes."""
    return NUMBER.fullmatch(fields.get(name, "")) is not None


@functools.lru_cache(maxsize=1000)
def _public_key(raw: bytes) -> Any:
    """The public key of these bytes. Raises ValueError."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    return Ed25519PublicKey.from_public_bytes(raw)


def _verifies(signature: str, keys: dict[str, bytes], text: bytes) -> bool:
    """Whether a signature, NAME:BASE64, is by the public key of that name."""
    from cryptography.exceptions import InvalidSignature

    name, _, encoded = signature.partition(":")
    try:
        raw = base64.b64decode(encoded, validate=True)
        _public_key(keys[name]).verify(raw, text)
    except (KeyError, InvalidSignature, binascii.Error, ValueError):
        return False
    return True
