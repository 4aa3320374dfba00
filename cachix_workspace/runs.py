"""Runs: the deployments of one order, or of all batches of a roll-out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, func, insert, select

from cachix_protocol import Undecodable, dumps, loads, utc_now
from cachix_workspace.deployments import DeploymentRow
from cachix_workspace.refusal import Refusal
from cachix_workspace.tables import agents, deployments, runs

DEPLOY, RETRY, ROLL_BACK = "deploy", "retry", "roll-back"
MAX_WORDS = 300  # characters of each thing that CI says about itself
LINK = re.compile(r"https?://[^\s\x00-\x1f\"'<>]{1,1000}")


@dataclass(frozen=True)
class Source:
    """The source of an order, by CI: docs/protocol.rst has the fields. Links are http or https."""

    commit: str = ""
    branch: str = ""
    title: str = ""
    url: str = ""  # of the commit
    job: str = ""  # URL of the CI job
    actor: str = ""  # whom CI acts for

    @classmethod
    def from_json(cls, record: Any) -> Source | None:
        """The `source` of an order, None without one. Raises Undecodable.

        Names that are unknown are left out, and so are links that a page must not have.
        """
        if record is None:
            return None
        if not isinstance(record, dict):
            raise Undecodable("`source` must be an object")
        words = {}
        for name in ("commit", "branch", "title", "url", "job", "actor"):
            value = record.get(name, "")
            if not isinstance(value, str):
                raise Undecodable(f"`source` must have a text for `{name}`")
            text = " ".join(value.encode("utf-8", "replace").decode().replace("\0", "").split())
            is_link = name in ("url", "job")
            words[name] = (text if LINK.fullmatch(text) else "") if is_link else text[:MAX_WORDS]
        return cls(**words)

    @property
    def short(self) -> str:
        """Branch and commit in a word, such as main@a1b2c3; empty if neither is known."""
        return "@".join(filter(None, (self.branch, self.commit[:7])))


@dataclass(frozen=True)
class RunRow:
    """A run as the database has it."""

    id: int
    created_on: str
    actor: str
    action: str
    source: str | None
    of_run: int | None

    @property
    def origin(self) -> Source:
        """The words of CI about itself."""
        return Source(**loads(self.source)) if self.source else Source()


@dataclass(frozen=True)
class Member:
    """A deployment of a run, and its agent."""

    name: str
    connected: bool
    seen_on: str
    paused_on: str | None
    row: DeploymentRow


def create(
    connection: Connection, actor: str, action: str, source: Source | None, of_run: int | None
) -> int:
    """Create a run; its number."""
    text = None if source is None else dumps(asdict(source))
    values = {"created_on": utc_now(), "actor": actor, "action": action, "source": text}
    query = insert(runs).values(**values, of_run=of_run).returning(runs.c.id)
    return int(connection.execute(query).scalar_one())


def go_on(connection: Connection, run_id: int, actor: str) -> int:
    """The run that a later order of the same actor belongs to; its number. Raises Refusal."""
    run = get(connection, run_id)
    if (run.actor, run.action) != (actor, DEPLOY):
        raise Refusal(403, f"run {run_id} is another one's: an order goes on with a run of its own")
    return run.id


def get(connection: Connection, run_id: int) -> RunRow:
    """The run of this number. Raises Refusal (404)."""
    row = None
    if 0 < run_id < 1 << 31:
        row = connection.execute(select(runs).where(runs.c.id == run_id)).one_or_none()
    if row is None:
        raise Refusal(404, f"there is no run {run_id}")
    return RunRow(**row._mapping)


def list_some(
    connection: Connection,
    limit: int,
    before: int | None = None,
    offset: int = 0,
    agent_ids: Collection[str] | None = None,
) -> list[RunRow]:
    """The newest runs but for `offset` of them, those before a number if it is given.

    Only runs with a deployment of one of these agents, if they are given.
    """
    query = select(runs) if before is None else select(runs).where(runs.c.id < before)
    if agent_ids is not None:
        theirs = select(deployments.c.run_id).where(deployments.c.agent_id.in_(agent_ids))
        query = query.where(runs.c.id.in_(theirs))
    rows = connection.execute(query.order_by(runs.c.id.desc()).limit(limit).offset(offset))
    return [RunRow(**row._mapping) for row in rows]


def members(connection: Connection, run_id: int) -> list[Member]:
    """The deployments of a run, by the agents' names."""
    facts = (agents.c.name, agents.c.connected, agents.c.seen_on, agents.c.paused_on)
    query = select(*(fact.label(f"agent_{fact.name}") for fact in facts), deployments)
    query = query.join(agents).where(deployments.c.run_id == run_id)
    query = query.order_by(agents.c.name, deployments.c.index)
    rows = []
    for row in connection.execute(query):
        values = dict(row._mapping)
        about = [values.pop(f"agent_{fact.name}") for fact in facts]
        rows.append(Member(about[0], about[1], about[2], about[3], DeploymentRow(**values)))
    return rows


def counts(
    connection: Connection, run_ids: list[int], agent_ids: Collection[str] | None = None
) -> dict[int, Counter[tuple[str, str]]]:
    """How many deployments of each run, perhaps of some agents only, have which status and outcome.

    The outcome is empty where there is none.
    """
    what = (deployments.c.run_id, deployments.c.status, deployments.c.outcome)
    query = select(*what, func.count()).where(deployments.c.run_id.in_(run_ids)).group_by(*what)
    if agent_ids is not None:
        query = query.where(deployments.c.agent_id.in_(agent_ids))
    by_run: dict[int, Counter[tuple[str, str]]] = {run_id: Counter() for run_id in run_ids}
    for run_id, status, outcome, count in connection.execute(query):
        by_run[run_id][status, outcome or ""] += count
    return by_run
