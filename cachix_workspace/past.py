"""The past of agents: the newest deployment of each, and the paths that it may be sent back to."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Connection, select

from cachix_protocol import SUCCEEDED
from cachix_workspace.deployments import DeploymentRow
from cachix_workspace.reports import DRY_RUN, TESTED
from cachix_workspace.tables import agents, deployments

MOST_FORMER = 20  # paths that an agent may be sent back to by hand


def newest(connection: Connection, names: Collection[str]) -> dict[str, DeploymentRow]:
    """The newest deployment of each of these agents that has had one, by name."""
    wanted = agents.c.name.in_(names) & (deployments.c.index == agents.c.last_index)
    query = select(agents.c.name.label("agent_name"), deployments).join(agents).where(wanted)
    by_agent = {}
    for row in connection.execute(query):
        values = dict(row._mapping)
        name = str(values.pop("agent_name"))
        by_agent[name] = DeploymentRow(**values)
    return by_agent


def succeeded_paths(connection: Connection, agent_id: str) -> list[str]:
    """The store paths that an agent has succeeded with, the last one first."""
    mine = (deployments.c.agent_id == agent_id) & (deployments.c.status == SUCCEEDED)
    mine &= deployments.c.outcome.is_(None) | deployments.c.outcome.not_in([DRY_RUN, TESTED])
    query = select(deployments.c.store_path).where(mine).order_by(deployments.c.index.desc())
    return list(dict.fromkeys(connection.execute(query.limit(200)).scalars()))[:MOST_FORMER]
