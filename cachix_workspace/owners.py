"""Whose name it is: the token of its own that an agent gets, and successors of tokens.

An agent of ours that comes with an enrolment token is sent a secret, keeps it, and comes again with
that. This first use binds its name: nobody else can use the name until an operator moves it. A
secret that was not used, because it got lost on the way, binds nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import Connection, delete, func, select, update

from cachix_protocol import IN_PROGRESS, PENDING, utc_now
from cachix_workspace import agents as all_agents
from cachix_workspace import tokens as all_tokens
from cachix_workspace.agents import AgentRow
from cachix_workspace.refusal import Refusal
from cachix_workspace.tables import agents, deployments, tokens
from cachix_workspace.tokens import Token


def check(connection: Connection, token: Token, name: str) -> None:
    """Raises Refusal (403) if an agent of this name can't connect with the token."""
    agent = all_agents.find_known(connection, name)
    if not token.is_unbound:
        token.check_agent(name)
    problem = _problem(connection, agent, token, name)
    if problem:
        raise Refusal(403, problem)
    _check_count(connection, agent, token)


def is_simple(token: Token) -> bool:
    """Whether nothing is to be decided when a new agent comes with the token: see `admit`."""
    is_shared = not (token.is_unbound or token.is_enrolment)
    return is_shared and token.most is None and token.issued_by is None


def check_report(
    connection: Connection, token: Token, name: str, deployment_id: str | None = None
) -> None:
    """Raises Refusal (403) if an agent of this name can't report with the token.

    A deployment that was ordered before the agent had its present token may still be reported with
    the former one: its processes have no other. Without an id any such deployment counts.
    """
    token.check_agent(name)
    agent = all_agents.find_known(connection, name)
    problem = _problem(connection, agent, token, name)
    if problem and (agent is None or not _is_older(connection, agent, deployment_id)):
        raise Refusal(403, problem)


def _problem(connection: Connection, agent: AgentRow | None, token: Token, name: str) -> str:
    """Why the name is not the token's; empty if it is."""
    if agent is None or agent.token_id == token.id:
        return ""
    if token.is_unbound and agent.token_id is not None:
        hint = f"`cachix-workspace token create agent --name={name}` makes another"
        return f"{name} has a token, and this one is for an agent that is new: {hint}"
    if agent.owner_id not in (None, token.id):
        move = f"if it was reinstalled: `cachix-workspace agent move {name}`"
        return f"{name} belongs to another machine; {move}"
    present = all_tokens.get(connection, agent.token_id) if agent.token_id else None
    if present is not None and present.replaces == token.id:
        return f"this token was replaced by token {present.id}, which {name} uses already"
    return ""


def _is_older(connection: Connection, agent: AgentRow, deployment_id: str | None) -> bool:
    """Whether the deployment, or one that has not ended, is older than the agent's token."""
    one = deployments.c.id == (deployment_id or "").lower()
    which = one if deployment_id else deployments.c.status.in_([PENDING, IN_PROGRESS])
    older = deployments.c.created_on < (agent.token_since or "")
    query = select(deployments.c.id).where((deployments.c.agent_id == agent.id) & which & older)
    return connection.execute(query.limit(1)).one_or_none() is not None


def _check_count(connection: Connection, agent: AgentRow | None, token: Token) -> None:
    """Raises Refusal (403) if an enrolment token has had as many agents as it is for."""
    if token.most is None or (agent is not None and agent.enrolled_by == token.id):
        return
    query = select(func.count()).where(agents.c.enrolled_by == token.id)
    if connection.execute(query).scalar_one() >= token.most:
        raise Refusal(403, f"this token was for {token.most} agents, and has had them")


def admit(connection: Connection, token: Token, agent: AgentRow) -> str | None:
    """Note that an agent has connected; the secret of its own that it is to be sent.

    Raises Refusal, as `check` does: another agent may have been faster.
    """
    problem = _problem(connection, agent, token, agent.name)
    if problem:
        raise Refusal(403, problem)
    if token.most is not None:
        all_tokens.lock(connection, token.id)  # agents that enrol now are counted one by one
    _check_count(connection, agent, token)
    if token.is_unbound:
        all_tokens.bind(connection, token, agent.name)
        (all_tokens.get(connection, token.id) or token).check_agent(agent.name)
    changes: dict[str, int | str | None] = {}
    if agent.token_id != token.id:
        changes = {"token_id": token.id, "token_since": utc_now()}
    if token.issued_by is not None and agent.owner_id is None:
        changes["owner_id"] = token.id
    counted = token.issued_by or token.id
    if (token.is_enrolment or token.issued_by) and agent.enrolled_by != counted:
        changes["enrolled_by"] = counted
    if changes:
        connection.execute(update(agents).where(agents.c.id == agent.id).values(**changes))
    if token.is_enrolment and agent.is_ours and agent.owner_id is None:
        return _issue(connection, token, agent)
    return None


def _issue(connection: Connection, token: Token, agent: AgentRow) -> str:
    """A new secret in place of one that the agent never came with."""
    mine = (tokens.c.agents == agent.name) & (tokens.c.issued_by == token.id)
    bound = select(agents.c.owner_id).where(agents.c.owner_id.is_not(None))
    connection.execute(delete(tokens).where(mine & tokens.c.id.not_in(bound)))
    description = f"of the agent itself, by token {token.id}"
    _, secret = all_tokens.create(
        connection,
        all_tokens.AGENT,
        description,
        cache_id=token.cache_id,
        agents=agent.name,
        issued_by=token.id,
    )
    return secret


def move(connection: Connection, name: str) -> bool:
    """Let another machine have a name; False if it was not bound. Raises Refusal if it is unknown.

    The token of its own that the former machine has is revoked.
    """
    agent = all_agents.find(connection, name)
    if agent.owner_id is None:
        return False
    all_tokens.revoke(connection, agent.owner_id)
    free = {"owner_id": None, "token_id": None, "token_since": None, "enrolled_by": None}
    connection.execute(update(agents).where(agents.c.id == agent.id).values(**free))
    return True


def users(connection: Connection, token_id: int) -> list[str]:
    """The agents that connected with this token last, by name."""
    query = select(agents.c.name).where(agents.c.token_id == token_id).order_by(agents.c.name)
    return list(connection.execute(query).scalars())


@dataclass(frozen=True)
class Binding:
    """Whether a name is for one machine alone: by a token that its agent keeps, or one made for it.

    `token_id` is the token that the agent connected with last.
    """

    is_bound: bool
    has_own_token: bool
    token_id: int | None


def bindings(connection: Connection, names: Collection[str]) -> dict[str, Binding]:
    """The bindings of agents, by their names."""
    present = tokens.c.id == agents.c.token_id
    query = select(agents.c.name, agents.c.owner_id, agents.c.token_id, tokens.c.agents)
    query = query.outerjoin(tokens, present).where(agents.c.name.in_(names))
    by_name = {}
    for row in connection.execute(query):
        has_own = row.owner_id is not None
        by_name[row.name] = Binding(has_own or row.agents == row.name, has_own, row.token_id)
    return by_name


def users_of(connection: Connection, token_ids: Collection[int]) -> dict[int, list[str]]:
    """The agents that connected with each of these tokens last, by name."""
    query = select(agents.c.token_id, agents.c.name).where(agents.c.token_id.in_(token_ids))
    names: dict[int, list[str]] = {}
    for row in connection.execute(query.order_by(agents.c.name)):
        names.setdefault(row.token_id, []).append(row.name)
    return names
