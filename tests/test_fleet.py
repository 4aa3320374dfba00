"""The list of all agents: how each stands, and that viewers share a reading of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import exhibits
import pytest
from sqlalchemy import Connection

from cachix_workspace import fleet
from cachix_workspace.context import Workspace
from cachix_workspace.database import Database, open_database
from cachix_workspace.feed import Feed
from cachix_workspace.fleet import Filter
from cachix_workspace.hub import Hub
from cachix_workspace.life import Signs
from cachix_workspace.settings import Settings

COUNT, HISTORY = len(exhibits.PLOTS), 4
STATES = {
    "paused": "well",  # that is told beside the state
    "nothing-changed": "failed",
    "waiting": "offline",
    "lost": "lost",
    "under-way": "under-way",
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    settings = Settings(tmp_path_factory.mktemp("fleet") / "data")
    database = open_database(settings, create=True)
    workspace = Workspace(settings, database, Hub(9), Signs())
    with database.write() as connection:
        exhibits.fill(connection, COUNT, HISTORY)
        exhibits.let_pass(connection, workspace)
    yield workspace
    database.close()


def test_each_agent_stands_as_its_story_says(workspace: Workspace) -> None:
    by_name = {brief.name: brief for brief in workspace.briefs()}
    for index, plot in enumerate(exhibits.PLOTS):
        brief = by_name[exhibits.name_of(index)]
        assert brief.state.key == STATES.get(plot, plot), brief
        assert (brief.open is not None) == (plot in exhibits.OPEN)
        assert (brief.paused_on is not None) == (plot == "paused")
        ended = brief.ended
        assert (ended is None) == (plot == "never")
        assert ended is None or ended.index == HISTORY, "not the last one that ended"
    ranks = [brief.state.rank for brief in workspace.briefs()]
    assert ranks == sorted(ranks)


def test_some_agents(workspace: Workspace) -> None:
    names = [exhibits.name_of(index) for index in (2, 5, 6)]
    with workspace.database.read() as connection:
        briefs = fleet.brief_of_all(connection, workspace.signs, 60.0, [*names, "nobody"])
    whole = {brief.name: brief for brief in workspace.briefs()}
    assert briefs == [whole[brief.name] for brief in briefs] and len(briefs) == len(names)


def test_the_last_that_ended_counts_and_not_those_cancelled_since(
    workspace: Workspace, tmp_path: Path
) -> None:
    database: Database = open_database(Settings(tmp_path / "data"), create=True)
    with database.write() as connection:
        exhibits.fill(connection, 3, HISTORY)
        _cancel(connection, exhibits.name_of(0), above=2)
        briefs = fleet.brief_of_all(connection, Signs(), 60.0)
    database.close()
    ended = next(brief.ended for brief in briefs if brief.name == exhibits.name_of(0))
    assert ended is not None and ended.index == 2


def _cancel(connection: Connection, name: str, above: int) -> None:
    table = exhibits.deployments
    mine = (table.c.agent_id == exhibits.number_id("agent", name)) & (table.c.index > above)
    connection.execute(table.update().where(mine).values(status="Cancelled"))


def test_pages(workspace: Workspace) -> None:
    briefs = workspace.briefs() * 20
    first, last = (fleet.overview(briefs, Filter(), page) for page in (1, 3))
    assert (len(first.briefs), len(last.briefs)) == (fleet.PAGE, len(briefs) - 2 * fleet.PAGE)
    assert first.total == first.matching == sum(last.counts.values()) - last.counts["paused"]
    some = fleet.overview(briefs, Filter("MAIL x86", "prod", "rollback-failed"), 1)
    assert some.matching == 20 and some.total == len(briefs)
    assert {brief.name for brief in some.briefs} == {exhibits.name_of(3)}
    assert fleet.overview(briefs, Filter("mail", "test"), 1).matching == 0


def test_viewers_share_a_reading_until_something_changes() -> None:
    feed, shared, readings = Feed(), fleet.Shared(), list[int]()

    def read() -> list[fleet.Brief]:
        readings.append(feed.last)
        return []

    for _ in range(5):
        shared.get(feed, read)
    feed.publish("agents")
    for _ in range(5):
        shared.get(feed, read)
    assert readings == [feed.last - 1, feed.last]


def test_what_changes_without_a_word_is_read_within_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    feed, shared, readings = Feed(), fleet.Shared(), list[int]()
    monkeypatch.setattr("cachix_workspace.fleet.time.monotonic", lambda: moment)

    def read() -> list[fleet.Brief]:
        readings.append(1)
        return []

    for moment in (1000.0, 1000.9, 1001.1, 1001.9):  # noqa: B007 - `time.monotonic` returns it
        shared.get(feed, read)
    assert len(readings) == 2


def test_a_change_during_a_reading_is_not_missed() -> None:
    feed, shared, readings = Feed(), fleet.Shared(), list[int]()

    def read() -> list[fleet.Brief]:
        readings.append(1)
        if len(readings) == 1:
            feed.publish("agents")  # after this reading has seen the tables
        return []

    shared.get(feed, read)
    shared.get(feed, read)
    assert len(readings) == 2
