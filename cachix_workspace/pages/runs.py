"""Runs: what one order did, agent by agent; retry of what failed, and the way back."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from flask import Blueprint, Response, request
from sqlalchemy import Connection

from cachix_protocol import FAILED, SUCCEEDED
from cachix_workspace import orders, runs, sentences, states
from cachix_workspace.admission import query_number
from cachix_workspace.context import Workspace, current_workspace
from cachix_workspace.deployments import DeploymentRow
from cachix_workspace.pages import show
from cachix_workspace.pages.access import actor, page, to
from cachix_workspace.people import OPERATOR
from cachix_workspace.runs import Member, RunRow
from cachix_workspace.states import DEPLOYMENT_STATES, State

run_pages = Blueprint("run_pages", __name__)

LISTED = 30  # runs on a page
ACTIONS = {runs.DEPLOY: "Deploy", runs.RETRY: "Retry", runs.ROLL_BACK: "Roll back"}


@dataclass(frozen=True)
class Share:
    """A part of the bar of a run: its state, how many, and where it lies from 0 to 100."""

    state: State
    count: int
    start: float
    width: float


@dataclass(frozen=True)
class Listed:
    """A run with its counts."""

    run: RunRow
    shares: list[Share]
    total: int

    @property
    def state(self) -> State | None:
        """The deployments in order of need: failed ones first."""
        return self.shares[0].state if self.shares else None


@dataclass(frozen=True)
class One:
    """A deployment of a run, and how it stands."""

    member: Member
    state: State
    telling: str


def shares_of(counts: Counter[State]) -> list[Share]:
    """The bar of a run, what needs a look first."""
    total, start, shares = sum(counts.values()), 0.0, []
    for state in DEPLOYMENT_STATES:
        if counts[state]:
            width = 100 * counts[state] / total
            shares.append(Share(state, counts[state], round(start, 2), round(width, 2)))
            start += width
    return shares


@page(run_pages, "/runs")
def get_runs() -> Response:
    """All runs, the newest first."""
    before = query_number("before", 0, 10**9 - 1)
    with current_workspace().database.read() as connection:
        rows = runs.list_some(connection, LISTED + 1, before or None)
        counts = runs.counts(connection, [row.id for row in rows])
    entries = [_listed(row, counts[row.id]) for row in rows[:LISTED]]
    older = rows[LISTED - 1].id if len(rows) > LISTED else 0
    return show.page("runs.html", topics="runs", runs=entries, older=older, actions=ACTIONS)


def _listed(row: RunRow, counts: Counter[tuple[str, str]]) -> Listed:
    by_state: Counter[State] = Counter()
    for (status, outcome), count in counts.items():
        by_state[states.of_deployment(status, outcome)] += count
    return Listed(row, shares_of(by_state), sum(by_state.values()))


@page(run_pages, "/runs/<int:run_id>")
def get_run(run_id: int) -> Response:
    """A run: what failed first, each with its reason on one line."""
    workspace = current_workspace()
    with workspace.database.read() as connection:
        run = runs.get(connection, run_id)
        ones = [_one(workspace, connection, each) for each in runs.members(connection, run_id)]
    ones.sort(key=lambda one: (DEPLOYMENT_STATES.index(one.state), one.member.name))
    counts = Counter(one.state for one in ones)
    failed = sum(one.member.row.status == FAILED for one in ones)
    return show.page(
        "run.html",
        topics=f"run:{run_id} agents",
        run=run,
        ones=ones,
        shares=shares_of(counts),
        failed=failed,
        backable=any(one.member.row.before for one in ones),
        action=ACTIONS[run.action],
    )


def _one(workspace: Workspace, connection: Connection, member: Member) -> One:
    row = member.row
    lost = workspace.signs.lost_since(row, workspace.settings.lost_after)
    state = states.of_deployment(row.status, row.outcome, lost is not None)
    telling = sentences.first_line(row.reason)
    if state is states.WAITING:
        telling = _why_it_waits(member)
    elif state is states.LOST:
        telling = f"nothing heard since {sentences.clock(lost)}"
    elif state is states.UNDER_WAY:
        telling = sentences.STEPS.get(row.step or "", "")
    elif row.status == SUCCEEDED:
        took = sentences.seconds_between(row.started_on, row.finished_on)
        telling = "" if took is None else f"in {sentences.lasting(took)}"
    return One(member, state, telling)


def _why_it_waits(member: Member) -> str:
    if member.paused_on:
        return f"paused since {sentences.clock(member.paused_on)}"
    if not member.seen_on:
        return "the agent has never connected"
    return "" if member.connected else f"offline since {sentences.clock(member.seen_on)}"


# --- retry and roll back --------------------------------------------------------------------------


def _rows(
    connection: Connection, run_id: int, status: str | None = None
) -> dict[str, DeploymentRow]:
    """The deployments of a run, by the agents' names."""
    runs.get(connection, run_id)
    rows = {each.name: each.row for each in runs.members(connection, run_id)}
    return {name: row for name, row in rows.items() if status in (None, row.status)}


@page(run_pages, "/runs/<int:run_id>/retry", role=OPERATOR, methods=("POST",))
def post_retry(run_id: int) -> Response:
    """Order what failed in this run once more."""
    workspace = current_workspace()
    with workspace.database.write() as connection:
        rows = orders.retryable(connection, _rows(connection, run_id, FAILED))
        order = orders.retry(connection, rows, actor(), run_id)
    workspace.note_order(order)
    return to(f"/runs/{order.run_id}")


@page(run_pages, "/runs/<int:run_id>/roll-back", role=OPERATOR)
def get_roll_back(run_id: int) -> Response:
    """The page that shows the plan of a roll-back, and asks."""
    with current_workspace().database.read() as connection:
        run = runs.get(connection, run_id)
        plan = orders.plan_back(connection, _rows(connection, run_id))
        signed = orders.signed_only(connection, [back.name for back in plan if back.then])
    return show.page("roll_back.html", run=run, plan=plan, signed=signed)


@page(run_pages, "/runs/<int:run_id>/roll-back", role=OPERATOR, methods=("POST",))
def post_roll_back(run_id: int) -> Response:
    """Order what ran before this run."""
    workspace, chosen = current_workspace(), request.form.getlist("name")
    with workspace.database.write() as connection:
        rows = _rows(connection, run_id)
        wanted = {name: row for name, row in rows.items() if name in chosen}
        order = orders.roll_back(connection, wanted, actor(), run_id)
    workspace.note_order(order)
    return to(f"/runs/{order.run_id}")
