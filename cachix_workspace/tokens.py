"""Tokens: what agents, CI and administrators prove themselves with. Shown once, stored hashed."""

from __future__ import annotations

import base64
import binascii
import datetime
import hashlib
import hmac
import secrets
from dataclasses import dataclass

from sqlalchemy import Connection, insert, or_, select, update

from cachix_protocol import utc_now
from cachix_workspace import Error, Refusal
from cachix_workspace.tables import tokens

AGENT, ACTIVATE, ADMIN = "agent", "activate", "admin"
KINDS = (AGENT, ACTIVATE, ADMIN)
ANY = frozenset(KINDS)
CI = frozenset({ACTIVATE, ADMIN})  # who may deploy, follow logs and push to caches
MACHINE = frozenset({AGENT})


@dataclass(frozen=True)
class Token:
    """A token as the database has it: never the secret itself. Times are RFC 3339 or None."""

    id: int
    kind: str
    hash: str
    description: str
    cache_id: int | None
    created_on: str
    expires_on: str | None
    revoked_on: str | None

    def state(self, now: str) -> str:
        """valid, expired or revoked."""
        if self.revoked_on is not None:
            return "revoked"
        return "expired" if self.expires_on is not None and self.expires_on <= now else "valid"


def digest(secret: str) -> str:
    """What is stored of a secret. No salt and no stretching: nobody can guess 256 random bits."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def create(
    connection: Connection,
    kind: str,
    description: str = "",
    expires_in: float | None = None,
    cache_id: int | None = None,
    secret: str | None = None,
) -> tuple[int, str]:
    """A new token's number and secret. `expires_in` is in days; a `secret` is given only by tests."""
    secret = secret or f"{kind}-{secrets.token_urlsafe(32)}"
    expires_on = None if expires_in is None else _in_days(expires_in)
    known = {"kind": kind, "hash": digest(secret), "description": description, "cache_id": cache_id}
    query = (
        insert(tokens)
        .values(**known, created_on=utc_now(), expires_on=expires_on)
        .returning(tokens.c.id)
    )
    return int(connection.execute(query).scalar_one()), secret


def _in_days(days: float) -> str:
    try:
        moment = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=days)
    except OverflowError:
        raise Error(
            f"a token can't expire in {days:g} days: leave --expires away if it never shall"
        ) from None
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def everyone(connection: Connection) -> list[Token]:
    """All tokens, the oldest first."""
    return [
        Token(**row._mapping) for row in connection.execute(select(tokens).order_by(tokens.c.id))
    ]


def revoke(connection: Connection, token_id: int) -> bool:
    """End a token for ever; False where there is none of this number. Repeating it changes nothing."""
    known = connection.execute(
        select(tokens.c.revoked_on).where(tokens.c.id == token_id)
    ).one_or_none()
    if known is not None and known.revoked_on is None:
        connection.execute(
            update(tokens).where(tokens.c.id == token_id).values(revoked_on=utc_now())
        )
    return known is not None


def invalid_ids(connection: Connection) -> set[int]:
    """The tokens that no longer count: a server closes their sockets."""
    ended = or_(tokens.c.revoked_on.is_not(None), tokens.c.expires_on <= utc_now())
    return set(connection.execute(select(tokens.c.id).where(ended)).scalars())


def secret_of(authorization: str | None) -> str | None:
    """The secret in an Authorization header: Bearer, or the password of Basic (as Nix sends it)."""
    scheme, _, value = (authorization or "").partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer":
        return value or None
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(value, validate=True).decode().partition(":")[2] or None
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return None


def authenticate(connection: Connection, authorization: str | None, kinds: frozenset[str]) -> Token:
    """The token of a request. Raises Refusal: 401 without a token that counts, 403 where it is of another kind."""
    right = " or ".join(f"an {kind} token" for kind in KINDS if kind in kinds)
    secret = secret_of(authorization)
    if secret is None:
        raise Refusal(401, f"this needs {right}: send it as `Authorization: Bearer TOKEN`")
    hashed = digest(secret)
    row = connection.execute(select(tokens).where(tokens.c.hash == hashed)).one_or_none()
    if row is None or not hmac.compare_digest(row.hash, hashed):
        raise Refusal(
            401, f"this token is unknown here: create {right} with `cachix-workspace token create`"
        )
    token = Token(**row._mapping)
    state = token.state(utc_now())
    if state != "valid":
        raise Refusal(
            401, f"this token is {state}: create {right} with `cachix-workspace token create`"
        )
    if token.kind not in kinds:
        raise Refusal(403, f"this needs {right}, and yours is an {token.kind} token")
    return token
