"""Claims of deployments, before they are sent: no other node sends them too."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Connection, select, tuple_, update

from cachix_workspace.deployments import DeploymentRow
from cachix_workspace.tables import agents, deployments


def claim(
    connection: Connection, node_id: str, numbers: Collection[int], rows: Collection[DeploymentRow]
) -> set[str]:
    """Claim deployments for the connections that their agents have to this node; the ids of those
    that may be sent.

    Others have ended or begun meanwhile, or their agents are connected elsewhere.
    """
    here = (agents.c.node_id == node_id) & agents.c.connection.in_(numbers)
    in_order = select(agents.c.id).where(here).order_by(agents.c.name)
    connection.execute(in_order.with_for_update(key_share=True))
    number = select(agents.c.connection).where(agents.c.id == deployments.c.agent_id)
    known = [(row.id, row.status) for row in rows]
    unchanged = tuple_(deployments.c.id, deployments.c.status).in_(known)
    theirs = deployments.c.agent_id.in_(select(agents.c.id).where(here))
    query = update(deployments).where(unchanged & theirs)
    query = query.values(sent_to=number.scalar_subquery())
    return set(connection.execute(query.returning(deployments.c.id)).scalars())
