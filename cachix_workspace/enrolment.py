"""Adding agents: one by its name, which exists from then on, or many by an enrolment token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import Connection, select

from cachix_workspace import agents, audit, cache, tables, tokens, upkeep
from cachix_workspace.orders import Actor
from cachix_workspace.refusal import Refusal
from cachix_workspace.tokens import AGENT

MAX_DAYS = 36_500
MOST_AGENTS = 10**6


@dataclass(frozen=True)
class Enrolled:
    """A token: its number and secret, and the agents that it is for."""

    token_id: int
    secret: str
    agents: str  # a name, or patterns of names
    is_for_one: bool


@dataclass(frozen=True)
class Terms:
    """For how many days a token is valid, None without an end, and for which cache."""

    days: float | None = None
    cache: str = ""
    description: str = ""

    def check(self, connection: Connection) -> int | None:
        """The id of the cache; None for the oldest one. Raises Refusal (400 or 404)."""
        if self.days is not None and not 0 < self.days <= MAX_DAYS:
            raise Refusal(400, f"a token is valid for up to {MAX_DAYS} days, and for more than 0")
        return cache.find_named(connection, self.cache).id if self.cache else None


def add_one(
    connection: Connection, name: str, terms: Terms, by: Actor, labels: str = ""
) -> Enrolled:
    """Add an agent, with a token that is for it alone. Raises Refusal (400, 404 or 409)."""
    upkeep.check_name(name)
    cache_id = terms.check(connection)
    agents.add(connection, name, terms.description, labels)
    audit.record(connection, by.name, "agent add", name, by.address)
    return _token(connection, name, terms, cache_id, by)


def new_token(connection: Connection, name: str, by: Actor) -> Enrolled:
    """Make a further token for an agent. Raises Refusal (404)."""
    agents.find_all(connection, [name])
    return _token(connection, name, Terms(), None, by)


def _token(
    connection: Connection,
    whose: str,
    terms: Terms,
    cache_id: int | None,
    by: Actor,
    most: int | None = None,
) -> Enrolled:
    token_id, secret = tokens.create(
        connection, AGENT, terms.description, terms.days, cache_id, agents=whose, most=most
    )
    detail = f"{token_id} (agent, for agents {whose}) {terms.description}".rstrip()
    audit.record(connection, by.name, "token create", detail, by.address)
    is_for_one = not set("*,") & set(whose)
    return Enrolled(token_id, secret, whose, is_for_one)


def for_each(
    connection: Connection, names: Iterable[str], terms: Terms, by: Actor
) -> list[Enrolled]:
    """Make a token for each of these agents, known or not. Raises Refusal (400 or 404)."""
    cache_id = terms.check(connection)
    enrolled = []
    for name in dict.fromkeys(names):
        upkeep.check_name(name)
        enrolled.append(_token(connection, name, terms, cache_id, by))
    return enrolled


def add_many(
    connection: Connection, patterns: str, count: int | None, terms: Terms, by: Actor
) -> Enrolled:
    """Make an enrolment token for agents whose names fit. Raises Refusal (400 or 404)."""
    if count is not None and not 0 < count <= MOST_AGENTS:
        raise Refusal(400, "the number of agents is 1 or more")
    try:
        checked = tokens.checked_patterns(patterns, "the names")
    except Exception as error:
        raise Refusal(400, str(error)) from None
    if not set("*,") & set(checked):
        raise Refusal(400, f"{checked} is one name: an enrolment token is for several, as web-*")
    return _token(connection, checked, terms, terms.check(connection), by, count)


def arrived(connection: Connection, token_id: int) -> list[str]:
    """The agents that an enrolment token has brought, by name."""
    mine = tables.agents.c.enrolled_by == token_id
    query = select(tables.agents.c.name).where(mine).order_by(tables.agents.c.name)
    return list(connection.execute(query).scalars())
