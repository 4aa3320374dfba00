"""Who asks, and how much: the token, the agent's name, the body within its limit, the offset."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator

from flask import request
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from cachix_protocol import Error, is_agent_name, utc_now
from cachix_workspace import audit, owners, tokens
from cachix_workspace.context import Workspace, current_workspace
from cachix_workspace.refusal import Refusal, UnknownToken
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
    if token.replaces is not None and token.kind != AGENT:
        _end_predecessor(workspace, token)
    return token


def _end_predecessor(workspace: Workspace, token: Token) -> None:
    """End the token that this one of CI replaces, at its first use."""
    with workspace.database.read() as connection:
        former = tokens.get(connection, token.replaces or 0)
    if former is not None and former.revoked_on is None:
        with workspace.database.write() as connection:
            tokens.note_first_use(connection, token)
            detail = f"{former.id}, which token {token.id} replaces"
            address = request.remote_addr or ""
            audit.record(connection, token.label, "token revoke", detail, address)


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


def authenticate_agent() -> tuple[Token, str]:
    """The token of an agent that connects, and its name. Raises Refusal."""
    token, name = authenticate(AGENTS), agent_name()
    with _reading(current_workspace()) as connection:
        owners.check(connection, token, name)
    return token, name


def authenticate_report(deployment_id: str | None = None) -> tuple[Token, str]:
    """The token of an agent that reports, and its name. Raises Refusal."""
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
    """The body of this request, block by block."""

    def read(self, size: int, /) -> bytes:
        """Raises Refusal (400) if the peer leaves, stalls, or breaks HTTP."""
        try:
            return request.stream.read(size)
        except Exception as error:  # gunicorn's own classes, which share no base but this one
            raise Refusal(400, f"the request broke off: {error}") from None


def read_body(limit: int) -> bytes:
    """The whole body. Raises Refusal if it has over `limit` bytes (413), or broke off (400)."""
    is_short = (request.content_length or 0) <= limit
    body = BodyStream().read(limit + 1) if is_short else b""
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
