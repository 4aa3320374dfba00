"""Limits of logs: their size, and until when lines are taken."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import closures
import pytest
from hosts import Host, wait_until
from live import Workspace
from machines import Machine
from sqlalchemy import select, update
from workspace_support import STORE_PATHS, Peer, running

from cachix_protocol import FAILURE_LINE, SUCCESS_LINE, Undecodable, dumps
from cachix_workspace import logs
from cachix_workspace.database import Database, open_database
from cachix_workspace.deployments import DeploymentRow
from cachix_workspace.settings import Settings
from cachix_workspace.tables import deployments, log_chunks

NOTE = "the workspace keeps 0.001 MiB of a log, which this one has reached: the rest is dropped"
OPTION = "--max-log=0.001"  # 1048 bytes


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with running(OPTION) as server:
        yield Peer(server)


def begin(peer: Peer, name: str) -> str:
    """Let an agent connect, and order a deployment of it."""
    peer.registered(name).close()
    deployment = peer.activate({name: STORE_PATHS[0]})[name]
    assert peer.report(name, deployment, "InProgress").status_code == 200
    return deployment


def texts(count: int, first: int = 0) -> list[str]:
    """Lines that take 100 bytes each."""
    return [f"line {number}".ljust(100 - 46, ".") for number in range(first, first + count)]


@contextlib.contextmanager
def opened(peer: Peer) -> Iterator[Database]:
    """The database of a running server."""
    database = open_database(Settings(peer.server.data))
    try:
        yield database
    finally:
        database.close()


def stored(peer: Peer, deployment: str) -> int:
    """The bytes that the database has of a log."""
    mine = log_chunks.c.deployment_id == deployment
    with opened(peer) as database, database.read() as connection:
        bodies = connection.execute(select(log_chunks.c.body).where(mine)).scalars()
        return sum(len(body.encode()) for body in bodies)


def change(peer: Peer, deployment: str, **values: str | None) -> None:
    """Change columns of a deployment."""
    mine = deployments.c.id == deployment
    with opened(peer) as database, database.write() as connection:
        connection.execute(update(deployments).where(mine).values(**values))


def test_the_rest_of_a_large_log_is_dropped_and_then_refused(peer: Peer) -> None:
    deployment = begin(peer, "large")
    assert peer.log("large", deployment, 0, texts(4)).json() == {"next": 4}
    assert peer.log("large", deployment, 4, texts(20, 4)).json() == {"next": 24}
    for offset in (24, 20, 24):
        answer = peer.log("large", deployment, offset, texts(20, offset))
        assert (answer.status_code, answer.json()) == (409, {"next": 24})
    lines = peer.lines(deployment)
    assert lines == [*texts(10), NOTE]
    known = peer.log("large", deployment, 0, texts(24))  # whose answer was lost
    assert (known.status_code, known.json()) == (200, {"next": 24})
    gap = peer.log("large", deployment, 25, ["x"])
    assert (gap.status_code, gap.json()) == (416, {"next": 24})
    end = [*texts(3, 24), f"{FAILURE_LINE} it failed"]
    assert peer.log("large", deployment, 24, end).json() == {"next": 28}
    assert peer.lines(deployment) == [*lines, f"{FAILURE_LINE} it failed"]
    for _ in range(3):  # no way around the limit
        assert peer.log("large", deployment, 28, [SUCCESS_LINE]).status_code == 409
    assert peer.lines(deployment) == [*lines, f"{FAILURE_LINE} it failed"]
    assert stored(peer, deployment) < 1048 + 300
    peer.report("large", deployment, "Failed")
    viewer = peer.view(deployment)
    seen = [viewer.expect_text()["line"] for _ in range(len(lines) + 1)]
    assert seen == peer.lines(deployment) and viewer.expect_close() == 1000


@pytest.mark.parametrize(
    ("end", "closing"), [("Succeeded", SUCCESS_LINE), ("Failed", f"{FAILURE_LINE} it failed")]
)
def test_the_workspace_closes_a_full_log(peer: Peer, end: str, closing: str) -> None:
    deployment = begin(peer, f"full-{end}")
    peer.log(f"full-{end}", deployment, 0, texts(20))
    assert peer.lines(deployment) == [*texts(10), NOTE]
    for _ in range(2):
        peer.report(f"full-{end}", deployment, end, reason="it\nfailed")
        assert peer.lines(deployment) == [*texts(10), NOTE, closing]
    assert peer.log(f"full-{end}", deployment, 20, [closing]).json() == {"next": 21}
    assert peer.log(f"full-{end}", deployment, 21, ["more"]).status_code == 409
    assert peer.lines(deployment) == [*texts(10), NOTE, closing]


def test_the_workspace_closes_a_log_that_is_full_after_the_end(peer: Peer) -> None:
    """The last lines may come after the report of the end."""
    deployment = begin(peer, "late")
    peer.report("late", deployment, "Succeeded")
    assert peer.log("late", deployment, 0, texts(20)).json() == {"next": 20}
    assert peer.lines(deployment) == [*texts(10), NOTE, SUCCESS_LINE]
    for offset in (0, 10, 20):
        answer = peer.log("late", deployment, offset, [*texts(20, offset), SUCCESS_LINE])
        assert (answer.status_code, answer.json()) == (409, {"next": 20})
    assert peer.lines(deployment) == [*texts(10), NOTE, SUCCESS_LINE]


def test_a_closing_line_alone_beyond_the_limit_needs_no_note(peer: Peer) -> None:
    deployment = begin(peer, "exact")
    peer.log("exact", deployment, 0, texts(10))
    assert peer.log("exact", deployment, 10, [SUCCESS_LINE]).json() == {"next": 11}
    assert peer.lines(deployment) == [*texts(10), SUCCESS_LINE]


def test_a_closing_line_may_not_be_of_any_length(peer: Peer) -> None:
    deployment = begin(peer, "long")
    huge = FAILURE_LINE + "x" * (1 << 16)
    assert peer.log("long", deployment, 0, ["a", huge]).json() == {"next": 2}
    assert peer.lines(deployment) == ["a", NOTE]


def test_the_rest_of_a_large_log_of_cachixs_agent_is_dropped(peer: Peer) -> None:
    deployment = begin(peer, "theirs")
    sock = peer.agent("theirs", f"/api/v1/deploy/log/{deployment}")
    for line in [*texts(300), SUCCESS_LINE]:
        sock.send_text({"line": line, "time": "2026-11-24T01:02:03Z"})
    sock.send_frame(9, b"ping")
    assert sock.expect(10) == b"ping"
    wait_until(lambda: peer.lines(deployment)[-1] == SUCCESS_LINE, what="the closing line")
    assert peer.lines(deployment) == [*texts(10), NOTE, SUCCESS_LINE]
    peer.report("theirs", deployment, "Succeeded")
    sock.send_text({"line": "more", "time": "2026-11-24T01:02:03Z"})
    sock.send_frame(9, b"again")
    assert sock.expect(10) == b"again"  # it is not disconnected for that
    assert peer.lines(deployment)[-1] == SUCCESS_LINE


@pytest.mark.parametrize("end", ["Succeeded", "Failed"])
def test_a_log_is_closed_by_its_closing_line(peer: Peer, end: str) -> None:
    name = f"closed-{end}"
    deployment = begin(peer, name)
    peer.log(name, deployment, 0, ["a", SUCCESS_LINE])  # a program may print such a line
    assert peer.log(name, deployment, 2, ["b"]).json() == {"next": 3}
    peer.report(name, deployment, end)
    assert peer.log(name, deployment, 3, ["c"]).json() == {"next": 4}
    assert peer.log(name, deployment, 4, [SUCCESS_LINE]).json() == {"next": 5}
    late = peer.log(name, deployment, 5, ["d"])
    assert (late.status_code, late.json()) == (409, {"next": 5})
    partly = peer.log(name, deployment, 3, ["c", SUCCESS_LINE, "d"])
    assert (partly.status_code, partly.json()) == (409, {"next": 5})
    again = peer.log(name, deployment, 3, ["c", SUCCESS_LINE])  # whose answer was lost
    assert (again.status_code, again.json()) == (200, {"next": 5})
    assert peer.lines(deployment) == ["a", SUCCESS_LINE, "b", "c", SUCCESS_LINE]


def test_lines_are_taken_for_a_day_after_the_end(peer: Peer) -> None:
    """By the clock of the workspace: that of the agent may be wrong by years."""
    deployment = begin(peer, "late")
    peer.report("late", deployment, "Failed", time="1970-01-01T00:00:00Z")
    assert peer.status(deployment)["finishedOn"] == "1970-01-01T00:00:00Z"
    assert peer.log("late", deployment, 0, ["a"]).json() == {"next": 1}
    now = json.loads(peer.server.command("audit", "--json", "--limit=1"))[0]["time"]
    year, rest = now[:4], now[4:]
    change(peer, deployment, ended_on=f"{int(year) - 1}{rest}", finished_on=f"2999{rest}")
    refused = peer.log("late", deployment, 1, ["b"])
    assert (refused.status_code, refused.json()) == (409, {"next": 1})
    assert peer.log("late", deployment, 0, ["a"]).json() == {"next": 1}
    change(peer, deployment, ended_on=None)  # it ended under an earlier release
    assert peer.log("late", deployment, 1, ["b"]).json() == {"next": 2}


@pytest.mark.parametrize("how", ["cancelled", "replaced", "went on"])
def test_every_end_is_noted(peer: Peer, how: str) -> None:
    name = f"end-{how.replace(' ', '-')}"
    peer.registered(name).close()
    deployment = peer.activate({name: STORE_PATHS[0]})[name]
    if how == "cancelled":
        peer.http("POST", f"/api/v1/deploy/deployment/{deployment}/cancel")
    else:
        if how == "went on":
            peer.report(name, deployment, "InProgress")
        newer = peer.activate({name: STORE_PATHS[1]})[name]
        peer.report(name, newer, "InProgress")
    columns = (deployments.c[name] for name in ("status", "ended_on", "finished_on"))
    with opened(peer) as database, database.read() as connection:
        query = select(*columns).where(deployments.c.id == deployment)
        status, ended, finished = connection.execute(query).one()
    assert status in ("Cancelled", "Failed") and ended == finished is not None


def test_nothing_is_read_of_a_log_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """An append must cost the same however large the log is."""

    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(logs, "read", fail)
    row = DeploymentRow(
        *("id", "agent", 1, STORE_PATHS[0], None, "InProgress", None, None, "", None, None, 5),
        log_size=100,
    )
    lines = ['{"line":"a","time":""}']
    assert logs._kept(None, row, lines, 1000) == (lines, False)  # type: ignore[arg-type]
    assert not logs._is_closed(None, row)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.promise(9)
@pytest.mark.long
def test_an_agent_with_a_large_log_neither_stops_nor_loops(
    host: Host, tmp_path: Path, name: str
) -> None:
    workspace = Workspace(tmp_path / "workspace")
    try:
        workspace.serve("--max-log=0.01")
        files = workspace.cache()
        machine = Machine(host, workspace, name)
        outcome = machine.deploy(closures.nixos(files, name, after=closures.lines(5000)))
        assert outcome.status == "Succeeded", outcome
        wait_until(lambda: workspace.log(outcome.id)[-1] == SUCCESS_LINE, what="the closing line")
        lines = workspace.log(outcome.id)
        assert len([line for line in lines if "the rest is dropped" in line]) == 1
        assert sum(map(len, lines)) < 11_000
        progress = host.state / "deployments" / outcome.id / "reported.json"
        wait_until(lambda: json.loads(progress.read_text())["ended"], what="the end")
        assert json.loads(progress.read_text())["logged"]
        second = machine.deploy(closures.nixos(files, f"{name}-2"))
        assert second.status == "Succeeded"
        assert "not reported yet" not in machine.agent.text()
    finally:
        workspace.kill()


USUAL = ["", "a line", 'with "quotes" and \\', "\x1b[31mred\x1b[0m", "\t\b\f\x00\x1f"]
UNUSUAL = ["\x7f", "é", "😀", "a\nb\rc"]


@pytest.mark.parametrize("text", [*USUAL, *UNUSUAL])
def test_usual_lines_are_stored_as_unusual_ones_are(text: str) -> None:
    stored = dumps({"line": text, "time": "T"})
    usual, other = json.dumps({"line": text, "time": "T"}), json.dumps({"time": "T", "line": text})
    for form in (stored, usual, other, f" {usual} ", usual.replace("}", ', "more": [1]}')):
        assert logs.decode(form) == logs.decode(form.encode()) == stored
    assert logs.decode_many(f"{usual}\n{other}\n".encode()) == [stored, stored]
    assert (text in USUAL) <= (logs.USUAL.fullmatch(stored) is not None)


@pytest.mark.parametrize(
    "text",
    ['{"line":"a\tb","time":"T"}', '{"line":"a","time":7}', '{"line":"\\x","time":"T"}', "{}", ""]
    + ['{"line":"a","time":"T"}}', '{"line":"a" "time":"T"}', '{"line":"\\u00g0","time":"T"}'],
)
def test_lines_that_are_none(text: str) -> None:
    with pytest.raises(Undecodable):
        logs.decode(text)
