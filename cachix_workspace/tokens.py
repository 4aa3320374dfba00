"""Tokens: agents, CI and administrators authenticate by them. Shown once, stored hashed."""

from __future__ import annotations

import base64
import binascii
import datetime
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass

from sqlalchemy import Connection, insert, or_, select, update

from cachix_protocol import UsageError, utc_now
from cachix_workspace.refusal import Refusal, UnknownToken
from cachix_workspace.tables import tokens

AGENT, ACTIVATE, ADMIN, METRICS = "agent", "activate", "admin", "metrics"
KINDS = (AGENT, ACTIVATE, ADMIN, METRICS)
ANY = frozenset({AGENT, ACTIVATE, ADMIN})  # may read caches
CI = frozenset({ACTIVATE, ADMIN})  # may deploy, follow logs and push to caches
AGENTS = frozenset({AGENT})
MAX_NUMBER = (1 << 31) - 1  # more than a database's integers hold is no number of a token
OVERLAP = 7.0  # days for which a token is valid beside its successor, unless that is used
WARN = (14, 3)  # days before a token expires
MOVED = "its name is for another machine; for this one, remove secret-NAME.json from its state"
PATTERN = re.compile(r"[0-9A-Za-z*][0-9A-Za-z._*-]{0,127}")


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
    agents: str | None = None
    used_on: str | None = None
    issued_by: int | None = None
    most: int | None = None
    replaces: int | None = None

    @property
    def is_unbound(self) -> bool:
        """Whether the token is for the first agent that connects with it, and none has."""
        return self.kind == AGENT and self.agents == ""

    @property
    def is_enrolment(self) -> bool:
        """Whether agents of many names may use it, each of which gets a token of its own."""
        return self.kind == AGENT and self.agents is not None and not self.is_for_one

    @property
    def label(self) -> str:
        """The token in a few words, for people."""
        return f"token {self.id} ({self.kind}{self.description and ': '}{self.description[:60]})"

    @property
    def is_for_one(self) -> bool:
        """Whether the token is for one agent only."""
        return self.agents is not None and not set("*,") & set(self.agents)

    def allows(self, name: str) -> bool:
        """Whether the token is for the agent of this name."""
        return self.agents is None or any(
            _matches(pattern, name) for pattern in self.agents.split(",")
        )

    def check_agent(self, name: str) -> None:
        """Raises Refusal (403) unless an agent of this name may use the token."""
        if self.is_unbound:
            raise Refusal(403, "no agent has connected with this token so far")
        if not self.allows(name):
            one, many = f"belongs to agent {self.agents}", f"is for agents {self.agents}"
            owner = one if self.is_for_one else many
            raise Refusal(403, f"this token {owner}, and not for {name[:128]!r}")

    def check_cache(self, cache_id: int) -> None:
        """Raises Refusal (403) unless the token may use this cache."""
        if self.cache_id not in (None, cache_id):
            raise Refusal(403, "this token is for another cache")

    def state(self, now: str) -> str:
        """valid, expired or revoked."""
        if self.revoked_on is not None:
            return "revoked"
        return "expired" if self.expires_on is not None and self.expires_on <= now else "valid"


def _matches(pattern: str, name: str) -> bool:
    """Whether a name fits a pattern, in which `*` stands for any characters."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name) is not None


def checked_patterns(text: str, option: str) -> str:
    """Patterns of agents' names, separated by commas. Raises UsageError that names the option."""
    patterns = [part.strip(" ") for part in text.split(",")]
    if not all(PATTERN.fullmatch(pattern) for pattern in patterns):
        example = "names such as web,db-*"
        raise UsageError(f"{option} must be {example}, not {text[:100]!r}")
    return ",".join(dict.fromkeys(patterns))


def digest(secret: str) -> str:
    """The hash that is stored of a secret.

    It needs neither salt nor stretching: nobody can guess 256 random bits.
    """
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def create(
    connection: Connection,
    kind: str,
    description: str = "",
    expires_in: float | None = None,
    cache_id: int | None = None,
    secret: str | None = None,
    agents: str | None = None,
    **more: int | None,
) -> tuple[int, str]:
    """Create a token; its number and its secret.

    `expires_in` is in days, `agents` are checked patterns of names, None for any agent, empty for
    the first that connects. Only tests choose the `secret`. `more` has the columns `issued_by`,
    `most` and `replaces`.
    """
    secret = secret or f"{kind}-{secrets.token_urlsafe(32)}"
    query = insert(tokens).values(
        kind=kind,
        hash=digest(secret),
        description=description,
        cache_id=cache_id,
        agents=agents,
        created_on=utc_now(),
        expires_on=None if expires_in is None else _in_days(expires_in),
        **more,
    )
    return int(connection.execute(query.returning(tokens.c.id)).scalar_one()), secret


def _in_days(days: float) -> str:
    moment = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=days)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def list_all(connection: Connection) -> list[Token]:
    """All tokens, the oldest first."""
    rows = connection.execute(select(tokens).order_by(tokens.c.id))
    return [Token(**row._mapping) for row in rows]


def revoke(connection: Connection, token_id: int) -> bool:
    """Revoke a token; False if there is none of this number. Repeating it changes nothing."""
    mine = tokens.c.id == min(token_id, MAX_NUMBER)
    row = connection.execute(select(tokens.c.revoked_on).where(mine)).one_or_none()
    if row is not None and row.revoked_on is None:
        connection.execute(update(tokens).where(mine).values(revoked_on=utc_now()))
    return row is not None


def lock(connection: Connection, token_id: int) -> None:
    """Lock a token for the rest of the transaction."""
    query = select(tokens.c.id).where(tokens.c.id == token_id)
    connection.execute(query.with_for_update(key_share=True))


def get(connection: Connection, token_id: int) -> Token | None:
    """The token of this number, if there is one."""
    token_id = min(token_id, MAX_NUMBER)
    row = connection.execute(select(tokens).where(tokens.c.id == token_id)).one_or_none()
    return None if row is None else Token(**row._mapping)


def rotate(connection: Connection, token: Token) -> tuple[int, str]:
    """Create a token's successor; its number and its secret.

    Both are valid until the new one is used, or for OVERLAP days. See `owners` for agents.
    """
    lasts = _in_days(OVERLAP)
    successor = create(
        connection,
        token.kind,
        token.description,
        cache_id=token.cache_id,
        agents=token.agents,
        most=token.most,
        replaces=token.id,
    )
    ends = lasts if token.expires_on is None else min(lasts, token.expires_on)
    connection.execute(update(tokens).where(tokens.c.id == token.id).values(expires_on=ends))
    return successor


def successor(connection: Connection, token_id: int) -> Token | None:
    """The valid token that replaces this one, if there is one."""
    query = select(tokens).where((tokens.c.replaces == token_id) & tokens.c.revoked_on.is_(None))
    row = connection.execute(query.limit(1)).one_or_none()
    return None if row is None else Token(**row._mapping)


def bind(connection: Connection, token: Token, name: str) -> None:
    """Make a token that of the first agent that connects with it."""
    mine = (tokens.c.id == token.id) & (tokens.c.agents == "")
    connection.execute(update(tokens).where(mine).values(agents=name))


def note_first_use(connection: Connection, token: Token) -> None:
    """End the token that this one, which is of CI, replaces."""
    mine = (tokens.c.id == token.replaces) & tokens.c.revoked_on.is_(None)
    connection.execute(update(tokens).where(mine).values(revoked_on=utc_now()))


def revoke_issued(connection: Connection, token_id: int) -> list[int]:
    """Revoke the tokens that agents got for an enrolment token; their numbers."""
    theirs = (tokens.c.issued_by == token_id) & tokens.c.revoked_on.is_(None)
    query = update(tokens).where(theirs).values(revoked_on=utc_now())
    return list(connection.execute(query.returning(tokens.c.id)).scalars())


def expiring(connection: Connection) -> list[Token]:
    """The valid tokens that expire within the longest of WARN days."""
    soon = (tokens.c.expires_on > utc_now()) & (tokens.c.expires_on <= _in_days(max(WARN)))
    rows = connection.execute(select(tokens).where(soon & tokens.c.revoked_on.is_(None)))
    return [Token(**row._mapping) for row in rows]


def days_left(token: Token) -> float:
    """The days until a token expires."""
    if token.expires_on is None:
        return float("inf")
    end = datetime.datetime.fromisoformat(token.expires_on.replace("Z", "+00:00"))
    return (end - datetime.datetime.now(datetime.timezone.utc)).total_seconds() / 86_400


def note_used(connection: Connection, used: dict[int, str]) -> None:
    """Note when tokens were used last, by their numbers."""
    for token_id, moment in used.items():
        query = update(tokens).where(tokens.c.id == token_id).values(used_on=moment)
        connection.execute(query)


def invalid_ids(connection: Connection) -> set[int]:
    """The numbers of all tokens that are revoked or have expired."""
    invalid = or_(tokens.c.revoked_on.is_not(None), tokens.c.expires_on <= utc_now())
    return set(connection.execute(select(tokens.c.id).where(invalid)).scalars())


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


def find_by_secret(connection: Connection, secret: str) -> Token | None:
    """The token of this secret, whether it is valid or not."""
    hashed = digest(secret)
    row = connection.execute(select(tokens).where(tokens.c.hash == hashed)).one_or_none()
    if row is None or not hmac.compare_digest(row.hash, hashed):
        return None
    return Token(**row._mapping)


def authenticate(connection: Connection, authorization: str | None, kinds: frozenset[str]) -> Token:
    """The token of a request.

    Raises Refusal: 401 without a valid token, 403 if the token's kind is not among `kinds`.
    """
    names = [f"{'a' if kind == METRICS else 'an'} {kind} token" for kind in KINDS if kind in kinds]
    right = " or ".join(names)
    remedy = f"create {right} with `cachix-workspace token create`"
    secret = secret_of(authorization)
    if secret is None:
        raise Refusal(401, f"this needs {right}: send it as `Authorization: Bearer TOKEN`")
    token = find_by_secret(connection, secret)
    if token is None:
        raise UnknownToken(401, f"this token is unknown here: {remedy}")
    state = token.state(utc_now())
    if state == "revoked" and token.issued_by is not None:  # else the agent would enrol again
        raise Refusal(403, f"the token that {token.agents} kept was taken back: {MOVED}")
    if state != "valid":
        raise Refusal(401, f"this token is {state}: {remedy}")
    if token.kind not in kinds:
        article = "a" if token.kind == METRICS else "an"
        raise Refusal(403, f"this needs {right}, and yours is {article} {token.kind} token")
    return token
