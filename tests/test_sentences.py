"""The sentences about a deployment."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from cachix_workspace import sentences
from cachix_workspace.agents import AgentRow
from cachix_workspace.deployments import DeploymentRow
from cachix_workspace.fetched import Progress

OLD, PATH = "/nix/store/old", "/nix/store/new"
TIME, LATER = "2020-01-02T14:02:00.5Z", "2020-01-02T14:02:41.000001Z"
AGENT = AgentRow("id", "web", "x86_64-linux", "1", TIME, TIME, True, 1, "0.1.0")
ROW = DeploymentRow(
    "id", "agent", 1, PATH, None, "Pending", None, None, TIME, None, None, 0, before=OLD
)
DAY = "2020-01-02 14:02 UTC"


def told(agent: dict[str, Any], **row: Any) -> str:
    changed = dataclasses.replace(ROW, **row)
    return sentences.tell(changed, dataclasses.replace(AGENT, **agent)).sentence


@pytest.mark.parametrize(
    ("done", "total", "expected"),
    [
        (120_000_000, 300_000_000, "Downloading 120 of 300 MB"),
        (0, 2_100_000, "Downloading 0 of 2 MB"),
        (7_000, 9_700, "Downloading 7 of 10 kB"),
    ],
)
def test_a_download_says_how_much_has_come(done: int, total: int, expected: str) -> None:
    row = dataclasses.replace(ROW, status="InProgress", step="downloading", closure_size=9)
    assert sentences.tell(row, AGENT, progress=Progress(done, total)).sentence == expected


@pytest.mark.parametrize(
    ("agent", "row", "sentence"),
    [
        ({"connected": False}, {}, f"Waiting for web: offline since {DAY}"),
        ({"connected": False, "seen_on": ""}, {}, "Waiting for web: it has never connected"),
        (
            {"paused_on": TIME, "paused_by": "anna"},
            {},
            f"Waiting for web: paused since {DAY} by anna",
        ),
        ({}, {}, "Waiting for web to take it"),
        ({}, {"status": "InProgress"}, "Running on web"),
        ({}, {"status": "InProgress", "step": "checking"}, "Checking on web"),
        (
            {},
            {"status": "InProgress", "step": "downloading", "closure_size": 300_000_000},
            "Downloading 300 MB",
        ),
        (
            {},
            {"status": "InProgress", "cancel_requested": TIME},
            "Cancelling: the agent is asked before it changes anything",
        ),
        (
            {},
            {"status": "Succeeded", "started_on": TIME, "finished_on": LATER},
            "Succeeded in 41 s",
        ),
        ({}, {"status": "Succeeded"}, "Succeeded"),
        (
            {},
            {"status": "Succeeded", "outcome": "reboot-needed"},
            "Succeeded: web needs a reboot",
        ),
        (
            {},
            {"status": "Failed", "outcome": "nothing-changed", "reason": "no space."},
            "Failed, nothing was changed: no space",
        ),
        (
            {},
            {"status": "Failed", "outcome": "rolled-back", "reason": "no ssh\nmore"},
            f"Failed: no ssh. Rolled back to {OLD}, which runs now.",
        ),
        (
            {"running": PATH, "profile": "/profiles/system-7-link"},
            {"status": "Failed", "outcome": "rollback-failed", "reason": "no"},
            f"Rollback failed: no. web runs {PATH}, its profile is /profiles/system-7-link.",
        ),
        ({}, {"status": "Failed"}, "Failed: the agent did not say why"),
        ({}, {"status": "Cancelled", "reason": "cancelled"}, "Cancelled: nothing was changed"),
        ({}, {"status": "Cancelled", "reason": "replaced by deployment 9"}, "Cancelled"),
    ],
)
def test_a_sentence(agent: dict[str, Any], row: dict[str, Any], sentence: str) -> None:
    assert told(agent, **row) == sentence


def test_what_is_lost_and_what_replaced_it() -> None:
    running = dataclasses.replace(ROW, status="InProgress")
    assert sentences.tell(running, AGENT, TIME).sentence == f"Lost: nothing heard since {DAY}"
    replaced = dataclasses.replace(ROW, status="Cancelled", reason="replaced by deployment 9")
    assert sentences.tell(replaced, AGENT).replaced_by == 9


def test_the_step_line_shows_what_was_what_is_and_what_comes() -> None:
    running = dataclasses.replace(ROW, status="InProgress")
    steps = [("received", TIME), ("downloading", LATER)]
    marks = sentences.marks(running, steps)
    assert [(mark.word, mark.state) for mark in marks] == [
        ("received", "done"),
        ("downloading", "now"),
        *[(word, "next") for word in ("activating", "checking", "committing", "done")],
    ]
    assert round(marks[0].seconds or 0, 1) == 40.5
    failed = dataclasses.replace(ROW, status="Failed", finished_on=LATER)
    back = sentences.marks(failed, [*steps, ("rolling-back", LATER), ("rolled-back", LATER)])
    assert [mark.state for mark in back] == ["done", "done", "done", "bad"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (125, "2 min 5 s"), (4800, "1 h 20 min")]
)
def test_a_duration(seconds: float, text: str) -> None:
    assert sentences.lasting(seconds) == text


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("a newer deployment came first", "A newer deployment came first."),
        (None, "It did not come to the reboot."),
    ],
)
def test_a_reboot_that_did_not_come(reason: str | None, advice: str) -> None:
    row = {"status": "Succeeded", "outcome": "reboot-needed", "reboot": "window"}
    telling = sentences.tell(dataclasses.replace(ROW, **row, reason=reason), AGENT)
    assert telling == sentences.Telling("Succeeded: web needs a reboot", advice)
