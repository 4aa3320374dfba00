"""Who may use the API: a token in the `Authorization` header, never a cookie; or a command here."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, Callable, TypeVar

from flask import current_app, g, request

from cachix_protocol import listed
from cachix_workspace.admission import authenticate
from cachix_workspace.orders import Actor
from cachix_workspace.refusal import Refusal
from cachix_workspace.tokens import ADMIN, CI, Token

LOCAL = "local operator"  # in the extensions of an application that a command runs by itself
ALLOWED: dict[str, frozenset[str]] = {}  # the kinds of token, by the name of the function

View = TypeVar("View", bound=Callable[..., Any])


def allow(kinds: frozenset[str]) -> Callable[[View], View]:
    """Let tokens of these kinds use a function."""

    def decorate(view: View) -> View:
        @functools.wraps(view)
        def checked(*args: Any, **kwargs: Any) -> Any:
            local = current_app.extensions.get(LOCAL)
            g.token = None if local else authenticate(kinds)
            g.by = local or Actor(g.token.label, request.remote_addr or "")
            return view(*args, **kwargs)

        ALLOWED[view.__name__] = kinds
        return checked  # type: ignore[return-value]

    return decorate


admins = allow(frozenset({ADMIN}))
operators = allow(CI)  # tokens of CI, as far as they are for the agents


def by() -> Actor:
    """Whoever makes this request."""
    actor: Actor = g.by
    return actor


def check_agents(names: Iterable[str]) -> None:
    """Raises Refusal (403) if the token is not for all of these agents."""
    token: Token | None = g.token
    others = [name for name in names if token is not None and not token.allows(name)]
    if token is not None and others:
        raise Refusal(403, f"this token is for agents {token.agents}, not for {listed(others)}")


def check_admin() -> None:
    """Raises Refusal (403) if the token is no admin's."""
    token: Token | None = g.token
    if token is not None and token.kind != ADMIN:
        raise Refusal(403, f"this needs an admin token, and yours is an {token.kind} token")


def allows(name: str) -> bool:
    """Whether the token is for this agent."""
    token: Token | None = g.token
    return token is None or token.allows(name)
