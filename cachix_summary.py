"""The summary of `activate`: for a terminal, for GitHub's page of the job, and as JSON."""

from __future__ import annotations

import datetime
import re
from typing import Any

from activate.text import brief, clean, format_size
from activate.values import dataclass, field
from cachix_console import Screen, align
from cachix_follow import Follower
from cachix_protocol import CANCELLED, FAILED, SUCCEEDED

STATUS_COLOURS = {SUCCEEDED: "32", FAILED: "31", CANCELLED: "33"}
MANY = 15  # agents; where there are more, those that succeeded are only counted
MOST_FAILED = 10  # of many agents that are named with their reasons
MOST_NAMES = 70  # characters of names in a line
MOST_REASON = 120  # characters of a reason in a line
MOST_ROWS = 500  # of GitHub's table, whose page takes 1 MiB
LINK = re.compile(r"https?://[0-9A-Za-z.:/_~%-]+")


@dataclass
class Report:
    """How a run has gone. `back` are the roll-backs of agents that had succeeded."""

    run_url: str = ""
    stopped: str = ""
    followers: list[Follower] = field(default_factory=list)
    back: list[Follower] = field(default_factory=list)
    staying: list[str] = field(default_factory=list)  # succeeded, and can't be taken back
    unposted: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    offline: list[str] = field(default_factory=list)

    @property
    def others(self) -> list[tuple[str, list[str]]]:
        """Agents with no line of their own, and why; those that are offline come last."""
        return [
            ("not taken back", self.staying),
            ("not posted", self.unposted),
            ("ran the path already", self.unchanged),
            ("unknown to the workspace, left out", self.unknown),
            ("offline, deployed when they connect", self.offline),
        ]

    def to_json(self, status: int) -> dict[str, Any]:
        """The summary for programs."""
        return {
            "status": status,
            "url": self.run_url or None,
            "stopped": self.stopped or None,
            "succeeded": [each.agent for each in self.followers if _succeeded(each)],
            "failed": [each.agent for each in self.followers if not _succeeded(each)],
            "rolledBack": [each.agent for each in self.back if _succeeded(each)],
            "rollBackFailed": [each.agent for each in self.back if not _succeeded(each)],
            "notRolledBack": self.staying,
            "notPosted": self.unposted,
            "unchanged": self.unchanged,
            "unknown": self.unknown,
            "offline": self.offline,
        }


def record(follower: Follower) -> dict[str, Any]:
    """A deployment that has ended, for programs."""
    state = follower.state
    return {
        "agent": follower.agent,
        "id": follower.id,
        "action": follower.action,
        "status": clean(state.status),
        "outcome": None if state.outcome is None else clean(state.outcome),
        "reason": "\n".join(state.reasons()) or None,
        "seconds": round(follower.duration, 3),
        "closureSize": state.closure_size,
    }


def _succeeded(follower: Follower) -> bool:
    return follower.state.status == SUCCEEDED


def format_seconds(seconds: float) -> str:
    """A duration for people, such as 1.5 s or 0:01:30; a dash for none."""
    if seconds >= 60:
        return str(datetime.timedelta(seconds=round(seconds)))
    return f"{seconds:.1f} s" if seconds else "-"


def few(names: list[str], most: int = MOST_NAMES) -> str:
    """As many names as a line takes, and how many more there are."""
    first: list[str] = []
    for name in names:
        if first and len(", ".join([*first, name])) > most:
            return f"{', '.join(first)} and {len(names) - len(first)} more"
        first.append(brief(name)[:most])
    return ", ".join(first)


# --- a terminal -----------------------------------------------------------------------------------


def summarize(screen: Screen, report: Report) -> None:
    """Print how the run has gone, on a screen at most."""
    for title, followers in (("", report.followers), ("Taken back:", report.back)):
        if followers:
            screen.print(title)
            show = _fold if len(report.followers) + len(report.back) > MANY else _list
            show(screen, followers)
    for words, names in report.others:
        if names:
            screen.print(f"{len(names)} {words}: {few(names)}")


def _list(screen: Screen, followers: list[Follower]) -> None:
    """A line for each agent: result, duration, the closure's size, URL. Then the reasons."""
    rows = []
    for follower in followers:
        size = follower.state.closure_size
        size_text = "-" if size is None else format_size(size)
        result, duration = follower.state.result(follower.agent), format_seconds(follower.duration)
        rows.append([follower.agent, result, duration, size_text, follower.url])
    for row, follower in zip(align(rows), followers):
        row[1] = screen.paint(row[1], STATUS_COLOURS.get(follower.state.status))
        screen.print("  ".join(row).rstrip())
    for follower in followers:
        for line in follower.state.reasons():
            screen.print(f"{follower.agent}: {line}")


def failures(followers: list[Follower]) -> list[Follower]:
    """Those that did not succeed; what needs somebody comes first."""
    bad = [follower for follower in followers if not _succeeded(follower)]
    return sorted(bad, key=lambda each: (each.state.outcome != "rollback-failed", each.agent))


def _fold(screen: Screen, followers: list[Follower]) -> None:
    """A line for each failure with its reason, then how many succeeded."""
    bad = failures(followers)
    rows = [
        [each.agent, each.state.result(each.agent), format_seconds(each.duration), reason(each)]
        for each in bad[:MOST_FAILED]
    ]
    for row, follower in zip(align(rows), bad):
        row[1] = screen.paint(row[1], STATUS_COLOURS.get(follower.state.status))
        screen.print("  ".join(row).rstrip())
    if more := [each.agent for each in bad[MOST_FAILED:]]:
        screen.print(f"and {len(more)} more did not succeed: {few(more)}")
    good = [follower for follower in followers if _succeeded(follower)]
    if good:
        slowest = max(good, key=lambda each: each.duration)
        times = f", the slowest ({slowest.agent}) in {format_seconds(slowest.duration)}"
        screen.print(screen.paint(f"{len(good)} succeeded", STATUS_COLOURS[SUCCEEDED]) + times)


def reason(follower: Follower) -> str:
    """Why a deployment ended so, in a part of a line."""
    text = brief(" ".join(follower.state.reasons()))
    return text if len(text) <= MOST_REASON else text[: MOST_REASON - 3] + "..."


# --- GitHub's page of the job ---------------------------------------------------------------------


def escape(text: str) -> str:
    """A text of others as Markdown and HTML that show it as it is."""
    return re.sub(r"[^0-9A-Za-z ,-]", lambda match: f"&#{ord(match[0])};", brief(text))


def markdown(report: Report) -> str:
    """A table of all agents, failures first, and the lines below."""
    lines = ["### Deployment", ""]
    if LINK.fullmatch(report.run_url):
        lines = [f"### [Deployment]({report.run_url})", ""]
    lines += [f"**{escape(report.stopped)}**", ""] if report.stopped else []
    for title, followers in (("", report.followers), ("Taken back:", report.back)):
        if followers:
            lines += [title, "", "| Agent | Result | Duration | Reason |", "|---|---|---|---|"]
            lines += _rows(followers) + [""]
    lines += [
        f"- {len(names)} {words}: {escape(few(names))}" for words, names in report.others if names
    ]
    return "\n".join(lines).encode("ascii", "replace").decode() + "\n"


def _rows(followers: list[Follower]) -> list[str]:
    bad = failures(followers)
    ordered = [*bad, *(each for each in followers if _succeeded(each))]
    rows = []
    for each in ordered[:MOST_ROWS]:
        name = escape(each.agent)
        name = f"[{name}]({each.url})" if LINK.fullmatch(each.url) else name
        result = escape(each.state.result(each.agent))
        cells = (name, result, format_seconds(each.duration), escape(reason(each)))
        rows.append(f"| {' | '.join(cells)} |")
    if len(ordered) > MOST_ROWS:
        rows.append(f"| and {len(ordered) - MOST_ROWS} more | | | |")
    return rows
