"""All agents with what they do: the rows of the overview, filtered, sorted and paged.

Thousands of agents are read with three queries, and without an object for each column.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select
from sqlalchemy.engine import Row

from cachix_protocol import FAILED, IN_PROGRESS, PENDING, SUCCEEDED
from cachix_workspace import life, states
from cachix_workspace.agents import labels_of
from cachix_workspace.feed import Feed
from cachix_workspace.life import Signs
from cachix_workspace.reports import TESTED
from cachix_workspace.states import Facts, State
from cachix_workspace.tables import agents, deployments

ENDED = (SUCCEEDED, FAILED)
PAGE = 100  # agents on a page of the overview
FRESH = 1.0  # seconds: commands beside the server, and silence, change agents without a word


@dataclass(frozen=True)
class Latest:
    """A deployment of an agent, in short."""

    id: str
    index: int
    status: str
    outcome: str | None
    step: str | None
    store_path: str
    time: str  # when it ended, else when it was ordered
    state: State


@dataclass(frozen=True)
class Brief:
    """An agent in short, as a row of the overview has it."""

    id: str
    name: str
    system: str
    created_on: str
    version: str  # the header of its connection
    client: str | None  # its version of cachix-deploy; None for any other agent
    kind: str | None
    labels: tuple[str, ...]
    connected: bool
    seen_on: str
    paused_on: str | None
    running: str | None  # the store path that it runs
    is_reported: bool  # whether it says so itself; else it is what was deployed last
    state: State
    open: Latest | None  # its deployment that has not ended
    ended: Latest | None  # the last one that succeeded or failed


@dataclass(frozen=True)
class Filter:
    """Select agents: those with all words in name or system, the label, the state's key."""

    text: str = ""
    label: str = ""
    state: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether all agents are wanted."""
        return not (self.text or self.label or self.state)

    def matches(self, brief: Brief) -> bool:
        """Whether an agent is wanted."""
        keys = {brief.state.key, "paused" if brief.paused_on else ""}
        if self.state and self.state not in keys:
            return False
        if self.label and self.label not in brief.labels:
            return False
        hay = f"{brief.name} {brief.system} {' '.join(brief.labels)}".lower()
        return all(word in hay for word in self.text.lower().split())


@dataclass(frozen=True)
class Overview:
    """A page of the agents that match, how many do, and how many there are of each state."""

    briefs: list[Brief]
    matching: int
    total: int
    counts: Counter[str]  # by the key of the state; also `paused`
    labels: Counter[str]


def brief_of_all(
    connection: Connection, signs: Signs, lost_after: float, names: Collection[str] | None = None
) -> list[Brief]:
    """All agents, or those of some names, sorted: what needs a look first, then by name."""
    rows = _agents(connection, names)
    waiting = _others(connection, _open(names))
    ended = _others(connection, _ended(names))
    briefs = []
    for row in rows:
        now = waiting.get(row.id)
        last = ended.get(row.id)
        lost = now is not None and _is_lost(signs, now, row.id, lost_after)
        briefs.append(_brief(row, _latest(now, lost), _latest(last, False), lost))
    return sorted(briefs, key=lambda brief: (brief.state.rank, brief.name))


def overview(briefs: list[Brief], wanted: Filter, page: int) -> Overview:
    """A page of the overview of these agents; pages count from 1."""
    counts = Counter(brief.state.key for brief in briefs)
    counts["paused"] = sum(brief.paused_on is not None for brief in briefs)
    labels = Counter(label for brief in briefs for label in brief.labels)
    matching = briefs if wanted.is_empty else [each for each in briefs if wanted.matches(each)]
    page_of_briefs = matching[(page - 1) * PAGE : page * PAGE]
    return Overview(page_of_briefs, len(matching), len(briefs), counts, labels)


class Shared:
    """All agents as they were read last. Pages that refresh at the same time share one reading."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._change, self._moment = -1, 0.0
        self._briefs: list[Brief] = []

    def get(self, feed: Feed, read: Callable[[], list[Brief]]) -> list[Brief]:
        """The value of `read`, or its last one within FRESH seconds if nothing has changed since.

        Nobody may change the list.
        """
        wanted = feed.last
        with self._lock:
            if self._change < wanted or time.monotonic() > self._moment + FRESH:
                change, moment = feed.last, time.monotonic()
                self._briefs = read()
                self._change, self._moment = change, moment
            return self._briefs


def _agents(connection: Connection, names: Collection[str] | None) -> Iterable[Row[Any]]:
    columns = (
        "id",
        "name",
        "created_on",
        "system",
        "version",
        "client",
        "kind",
        "labels",
        "connected",
        "seen_on",
    )
    more = ("paused_on", "running", "deployed", "reboot_since", "state_on", "by_hand")
    query = select(*(agents.c[name] for name in (*columns, *more)))
    return connection.execute(_only(query, names)).all()


def _only(query: Any, names: Collection[str] | None) -> Any:
    return query if names is None else query.where(agents.c.name.in_(names))


SHORT = ("agent_id", "id", "index", "status", "outcome", "step", "store_path", "created_on")
COLUMNS = [*(deployments.c[name] for name in SHORT), deployments.c.finished_on]


def _open(names: Collection[str] | None) -> Any:
    """The deployments that have not ended; the one that runs last, as that counts."""
    query = select(*COLUMNS).where(deployments.c.status.in_([PENDING, IN_PROGRESS]))
    query = query if names is None else _only(query.join(agents), names)
    return query.order_by(deployments.c.status.desc(), deployments.c.index)


def _ended(names: Collection[str] | None) -> Any:
    """The last deployment of each agent that succeeded or failed.

    It is looked for from each agent's newest one on, however many there were before.
    """
    mine = deployments.alias()
    last = (
        select(mine.c.id)
        .where(mine.c.agent_id == agents.c.id, mine.c.status.in_(ENDED))
        .order_by(mine.c.index.desc())
        .limit(1)
        .correlate(agents)
        .scalar_subquery()
    )
    newest = _only(select(last).select_from(agents), names)
    return select(*COLUMNS).where(deployments.c.id.in_(newest))


def _others(connection: Connection, query: Any) -> dict[str, Row[Any]]:
    return {row.agent_id: row for row in connection.execute(query)}


def _is_lost(signs: Signs, row: Row[Any], agent_id: str, lost_after: float) -> bool:
    patience = life.patience_for(row.step, lost_after)
    return row.status == IN_PROGRESS and signs.silence(row.id, agent_id) >= patience


def _latest(row: Row[Any] | None, is_lost: bool) -> Latest | None:
    if row is None:
        return None
    state = states.of_deployment(row.status, row.outcome, is_lost)
    time = row.finished_on or row.created_on
    index = row._mapping["index"]  # a row's attribute of this name is a method
    facts = (row.id, index, row.status, row.outcome, row.step, row.store_path)
    return Latest(*facts, time, state)


def _brief(row: Row[Any], now: Latest | None, last: Latest | None, is_lost: bool) -> Brief:
    facts = Facts(
        has_connected=bool(row.seen_on),
        connected=row.connected,
        paused=row.paused_on is not None,
        open=None if now is None else now.status,
        is_lost=is_lost,
        ended=None if last is None else last.status,
        outcome=None if last is None else last.outcome,
        running=row.running,
        deployed=row.deployed,
        needs_reboot=row.reboot_since is not None,
        by_hand=row.by_hand,
        runs_test=last is not None and (last.outcome, last.store_path) == (TESTED, row.running),
    )
    return Brief(
        id=row.id,
        name=row.name,
        system=row.system,
        created_on=row.created_on,
        version=row.version,
        client=row.client,
        kind=row.kind,
        labels=labels_of(row.labels),
        connected=row.connected,
        seen_on=row.seen_on,
        paused_on=row.paused_on,
        running=row.running or row.deployed,
        is_reported=row.running is not None,
        state=states.of_agent(facts),
        open=now,
        ended=last,
    )
