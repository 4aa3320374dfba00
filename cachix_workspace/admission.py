"""The admission of requests: the token, the agent's name, the body within its limit, the offset."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator
from typing import Any

from flask import request
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from cachix_protocol import Error, is_agent_name, utc_now
from cachix_workspace import audit, owners, tokens
from cachix_workspace.context import Workspace, current_workspace
from cachix_workspace.door import note_token
from cachix_workspace.refusal import Refusal, UnknownToken
from cachix_workspace.roster import Snapshot, comes_again, read_snapshot
from cachix_workspace.tokens import AGENT, AGENTS, Token

logger = logging.getLogger(__name__)


def authenticate(kinds: frozenset[str]) -> Token:
    """The token of this request.

    Raises Refusal: 401 without a valid token, 403 if the token's kind is not among `kinds`.
    """
    workspace = current_workspace()
    with _reading(workspace) as connection:
        token = tokens.authenticate(connection, request.headers.get("Authorization"), kinds)
    workspace.used[token.id] = utc_now()
    note_token(request.environ)
    if token.replaces is not None and token.kind != AGENT:
        _end_predecessor(workspace, token)
    return token


def _end_predecessor(workspace: Workspace, token: Token) -> None:
    """End the token that this one of CI replaces, at its first use."""
    with workspace.database.read() as connection:
        former = tokens.get(connection, token.replaces or 0)
    if former is not None and former.revoked_on is None:
        with contextlib.suppress(Error, SQLAlchemyError):  # the next request tries it again
            with workspace.database.write() as connection:
                tokens.note_first_use(connection, token)
                detail = f"{former.id}, which token {token.id} replaces"
                address = request.remote_addr or ""
                audit.record(connection, token.label, "token revoke", detail, address)
            workspace.note_revoked([former.id])


@contextlib.contextmanager
def _reading(workspace: Workspace) -> Iterator[Connection]:
    """Read the database to decide about a token; a refusal is noted."""
    try:
        with workspace.database.read() as connection:
            yield connection
    except Refusal as refusal:
        _note_refusal(workspace, str(refusal))
        is_unknown = isinstance(refusal, UnknownToken)
        if is_unknown and workspace.refusals.is_too_many(request.remote_addr or ""):
            raise Refusal(429, f"too many unknown tokens from this address: {refusal}") from None
        raise


def _note_refusal(workspace: Workspace, reason: str) -> None:
    """Note that a token was refused, but not each time."""
    address = request.remote_addr or ""
    if "Authorization" in request.headers and workspace.refusals.is_due(address):
        logger.warning("refused a token from %s: %s", address or "nowhere", reason)
        failures = contextlib.suppress(Error, SQLAlchemyError)  # the answer is the same
        with failures, workspace.database.write() as connection:
            audit.record(connection, "?", "token refused", reason, address)


def _snapshot() -> Snapshot | None:
    """The agents and their tokens, if many come at once."""
    workspace = current_workspace()

    def read() -> Snapshot:
        with workspace.database.read() as connection:
            return read_snapshot(connection)

    return workspace.roster.look(read)


def _recognized(may_be_new: bool = False) -> tuple[Token, str] | None:
    """The token and the name of an agent that comes as it came before, if many come at once.

    One that is new is recognized too if asked for: whoever registers it looks whether it still is.
    """
    snapshot, name = _snapshot(), request.headers.get("name", "")
    token = snapshot and snapshot.token(request.headers.get("Authorization"))
    if not (snapshot and token and token.allows(name)):
        return None
    member = snapshot.members.get(name)
    is_new = may_be_new and member is None and owners.is_simple(token) and is_agent_name(name)
    if not (is_new or comes_again(member, token)):
        return None
    current_workspace().used[token.id] = utc_now()
    note_token(request.environ)
    return token, name


def authenticate_agent() -> tuple[Token, str]:
    """The token of an agent that connects, and its name. Raises Refusal."""
    if recognized := _recognized(may_be_new=True):
        return recognized
    token, name = authenticate(AGENTS), agent_name()
    with _reading(current_workspace()) as connection:
        owners.check(connection, token, name)
    return token, name


def authenticate_report(deployment_id: str | None = None) -> tuple[Token, str]:
    """The token of an agent that reports, and its name. Raises Refusal."""
    if recognized := _recognized():
        return recognized
    token, name = authenticate(AGENTS), agent_name()
    with _reading(current_workspace()) as connection:
        owners.check_report(connection, token, name, deployment_id)
    return token, name


def agent_name() -> str:
    """The header `name`. Raises Refusal (400) if it can't be an agent's name."""
    name = request.headers.get("name", "")
    if not is_agent_name(name):
        allowed = "letters, digits, `.`, `_`, `-`, at most 128"
        raise Refusal(400, f"the header `name` must be the agent's name: {allowed}")
    return name


class BodyStream:
    """The body of a request, block by block."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def read(self, size: int, /) -> bytes:
        """Raises Refusal (400) if the peer leaves, stalls, or breaks HTTP."""
        try:
            return bytes(self._stream.read(size))
        except Exception as error:  # gunicorn's own classes, which share no base but this one
            raise Refusal(400, f"the request broke off: {error}") from None


def read_body(limit: int) -> bytes:
    """The whole body. Raises Refusal if it has over `limit` bytes (413), or broke off (400)."""
    is_short = (request.content_length or 0) <= limit
    body = BodyStream(request.stream).read(limit + 1) if is_short else b""
    if not is_short or len(body) > limit:
        raise Refusal(413, f"at most {limit} bytes are taken in one request")
    if request.content_length is not None and len(body) < request.content_length:
        raise Refusal(400, "the request broke off")
    return body


def log_offset() -> int:
    """The query's `offset`, 0 by default. Raises Refusal (400)."""
    return query_number("offset", 0, 10**9 - 1)


def query_word(name: str, words: Collection[str]) -> str | None:
    """A word in the query, None if it is missing. Raises Refusal (400) if it is none of these."""
    text = request.args.get(name)
    if text is not None and text not in words:
        raise Refusal(400, f"`{name}` must be one of {', '.join(words)}, not {text[:40]!r}")
    return text


def query_number(name: str, default: int, most: int) -> int:
    """A number in the query. Raises Refusal (400) if it is none, or above `most`."""
    text = request.args.get(name, str(default))
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) > most:
        raise Refusal(400, f"`{name}` must be a number from 0 to {most}, not {text[:40]!r}")
    return int(text)
