"""The right to use the API: a token in `Authorization`, never a cookie; or a local command."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Callable, TypeVar

from flask import current_app, g, request
from flask_smorest import Blueprint
from sqlalchemy import Connection

from cachix_protocol import listed
from cachix_workspace import agents
from cachix_workspace.admission import authenticate
from cachix_workspace.management.parsing import Parser
from cachix_workspace.orders import Actor
from cachix_workspace.refusal import Refusal
from cachix_workspace.tokens import ADMIN, CI, Token

LOCAL = "local operator"  # in the extensions of an application that a command runs by itself
ALLOWED: dict[str, frozenset[str]] = {}  # the kinds of token, by the name of the function

View = TypeVar("View", bound=Callable[..., Any])


class Operations(Blueprint):
    """Operations on things of a kind."""

    ARGUMENTS_PARSER = Parser()


def operations(name: str, description: str) -> Operations:
    """A blueprint that settles who asks before anything else of a request is looked at."""
    blueprint = Operations(name, __name__, url_prefix="/api/v1", description=description)
    blueprint.before_request(_authenticate)
    return blueprint


def allow(kinds: frozenset[str]) -> Callable[[View], View]:
    """Let tokens of these kinds use a function. Without it nobody can."""

    def decorate(view: View) -> View:
        ALLOWED[view.__name__] = kinds
        return view

    return decorate


admins = allow(frozenset({ADMIN}))
operators = allow(CI)  # tokens of CI, as far as they are for the agents


def _authenticate() -> None:
    """Raises Refusal (401 or 403)."""
    kinds = ALLOWED[(request.endpoint or "").rpartition(".")[2]]
    local = current_app.extensions.get(LOCAL)
    g.token = None if local else authenticate(kinds)
    g.by = local or Actor(g.token.label, request.remote_addr or "")
    if ADMIN in kinds and len(kinds) == 1:
        check_admin()


def by() -> Actor:
    """The actor of this request."""
    actor: Actor = g.by
    return actor


def check_admin() -> None:
    """Raises Refusal (403) if the token is no admin's for all agents: it could make others."""
    token: Token | None = g.token
    if token is not None and token.kind != ADMIN:
        raise Refusal(403, f"this needs an admin token, and yours is an {token.kind} token")
    if token is not None and token.agents is not None:
        raise Refusal(403, f"this needs an admin token for all agents, not for {token.agents}")


def check_agents(names: Iterable[str]) -> None:
    """Raises Refusal (403) if the token is not for all of these agents, which its owner named."""
    token: Token | None = g.token
    others = [name for name in names if token is not None and not token.allows(name)]
    if token is not None and others:
        raise Refusal(403, f"this token is for agents {token.agents}, not for {listed(others)}")


def allows(name: str) -> bool:
    """Whether the token is for this agent."""
    token: Token | None = g.token
    return token is None or token.allows(name)


def allows_cache(cache_id: int) -> bool:
    """Whether the token is for this cache."""
    token: Token | None = g.token
    return token is None or token.cache_id in (None, cache_id)


def own_agents(connection: Connection) -> list[str] | None:
    """The ids of the agents that the token is for; None for all agents."""
    token: Token | None = g.token
    if token is None or token.agents is None:
        return None
    return [one.id for one in agents.list_all(connection) if token.allows(one.name)]
