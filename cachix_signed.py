"""Signed deployments: what CI's key has signed runs on a machine, whatever its workspace says.

A signature is over all that the agent acts on: docs/protocol.rst has the statement. It travels
without what the agent knows anyway, so that nothing can be signed for one machine and run on
another.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import time
from typing import Any, Optional

from activate.values import dataclass, field
from cachix_cache import KEY_NAME, KEY_SIZE
from cachix_protocol import PLAIN, Undecodable, UsageError, Wish, checked_field

SEED_SIZE, SIGNATURE_SIZE = 32, 64  # bytes
EXAMPLE_KEY = "ci-1:BASE64"
MAX_NUMBER = 1 << 63


@dataclass(frozen=True)
class Statement:
    """Signed facts. `sequence` is CI's clock in nanoseconds, `expires` in seconds since 1970."""

    host: str
    agent: str
    store_path: str
    sequence: int
    rollback_scripts: dict[str, str] = field(default_factory=dict)  # by Nix's names of systems
    expires: Optional[int] = None
    allow_downgrade: bool = False
    wish: Wish = PLAIN

    def to_bytes(self) -> bytes:
        """The bytes that are signed: JSON with sorted keys, without blanks, in ASCII."""
        content = {
            "type": "cachix-deploy deployment 1",
            "host": self.host,
            "agent": self.agent,
            "storePath": self.store_path,
            **({} if self.wish.is_plain else {"options": self.wish.to_json()}),
            **self.sent(),
        }
        return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()

    def sent(self) -> dict[str, Any]:
        """The signed facts that the agent can't know by itself."""
        return {
            "sequence": self.sequence,
            "rollbackScript": self.rollback_scripts,
            "expires": self.expires,
            "allowDowngrade": self.allow_downgrade,
        }


@dataclass(frozen=True)
class Signature:
    """A statement's signature, by a key of this name."""

    key: str
    value: bytes
    statement: Statement

    @classmethod
    def from_json(
        cls, record: Any, host: str, agent: str, store_path: str, wish: Wish = PLAIN
    ) -> Signature:
        """The signature that came with a deployment by this workspace. Raises Undecodable."""
        scripts = checked_field(record, "rollbackScript", dict, optional=True) or {}
        if not all(isinstance(script, str) for script in scripts.values()):
            raise Undecodable("`rollbackScript` is of the wrong type")
        sequence = checked_field(record, "sequence", int)
        expires = checked_field(record, "expires", int, optional=True)
        if not all(0 <= number < MAX_NUMBER for number in (sequence, expires or 0)):
            raise Undecodable("`sequence` or `expires` is out of range")
        downgrade = bool(checked_field(record, "allowDowngrade", bool, optional=True))
        value = decoded(checked_field(record, "signature", str), SIGNATURE_SIZE)
        if value is None:
            raise Undecodable(f"`signature` is not {SIGNATURE_SIZE} bytes in base64")
        place = (plain_host(host), agent, store_path)
        statement = Statement(*place, sequence, scripts, expires, downgrade, wish)
        return cls(checked_field(record, "key", str), value, statement)


def plain_host(url: str) -> str:
    """A workspace's address for a statement: without the scheme, and a port only if it is odd."""
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    host, port = (parts.hostname or "").lower(), parts.port
    usual = {"http": 80, "https": 443}.get(parts.scheme)
    return host + (f":{port}" if port not in (None, usual) else "") + parts.path.rstrip("/")


# --- keys -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SecretKey:
    """A key that signs."""

    name: str
    seed: bytes = field(repr=False)

    @classmethod
    def create(cls, name: str) -> SecretKey:
        """A new key. Raises UsageError if it can't have this name."""
        if not KEY_NAME.fullmatch(name):
            raise UsageError(f"a key's name is such as ci-1, not {name[:100]!r}")
        return cls(name, os.urandom(SEED_SIZE))

    @classmethod
    def read(cls, path: str) -> SecretKey:
        """The key in a file. Raises UsageError, which does not repeat the file's text."""
        try:
            with open(path, encoding="ascii") as file:
                name, _, key = file.read(1 << 12).strip().partition(":")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the signing key {path} can't be read: {error}") from None
        both = decoded(key, SEED_SIZE + KEY_SIZE)
        if both is None or not KEY_NAME.fullmatch(name):
            hint = "make one with `cachix-deploy key create NAME FILE`"
            raise UsageError(f"{path} holds no secret key to sign deployments with: {hint}")
        return cls(name, both[:SEED_SIZE])

    def public(self) -> bytes:
        """The public key."""
        import cachix_ed25519

        return cachix_ed25519.public_key(self.seed)

    def public_text(self) -> str:
        """The public key with its name, for --deployment-key."""
        return f"{self.name}:{base64.b64encode(self.public()).decode()}"

    def text(self) -> str:
        """The secret key with its name, as `read` takes it."""
        return f"{self.name}:{base64.b64encode(self.seed + self.public()).decode()}"

    def sign(self, statement: Statement) -> dict[str, Any]:
        """The signature of a statement, as it is sent."""
        import cachix_ed25519

        value = cachix_ed25519.sign(self.seed, statement.to_bytes())
        signature = base64.b64encode(value).decode()
        return {"key": self.name, **statement.sent(), "signature": signature}


def decoded(text: str, size: int) -> Optional[bytes]:
    """The bytes that base64 stands for; None if there are not `size` of them."""
    try:
        value = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return value if len(value) == size else None


def deployment_keys(options: list[str], variable: Optional[str]) -> dict[str, bytes]:
    """The keys that may sign deployments, by name, of an option and a variable.

    Raises UsageError.
    """
    keys: dict[str, bytes] = {}
    for text in [*options, *(variable or "").split()]:
        name, _, key = text.partition(":")
        value = decoded(key, KEY_SIZE)
        if not KEY_NAME.fullmatch(name) or value is None:
            wrong = f"must be a public key such as {EXAMPLE_KEY}, not {text[:100]!r}"
            raise UsageError(f"--deployment-key {wrong}")
        if keys.setdefault(name, value) != value:
            raise UsageError(f"--deployment-key has two keys named {name}: give each its own name")
    return keys


# --- CI -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signer:
    """How `activate` signs. `valid_for` is in seconds."""

    key: SecretKey
    valid_for: Optional[int] = None
    allow_downgrade: bool = False

    def sign_all(
        self,
        host: str,
        agents: dict[str, str],
        scripts: dict[str, str],
        wishes: Optional[dict[str, Wish]] = None,
    ) -> dict[str, Any]:
        """A signature for each agent's deployment."""
        now = time.time_ns()
        expires = None if self.valid_for is None else now // 10**9 + self.valid_for
        rest = (now, scripts, expires, self.allow_downgrade)
        return {
            agent: self.key.sign(
                Statement(plain_host(host), agent, path, *rest, (wishes or {}).get(agent, PLAIN))
            )
            for agent, path in agents.items()
        }
