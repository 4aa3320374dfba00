"""The output of `activate`: text for people, with groups for CI, or JSON for programs."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Mapping
from typing import Any

from activate.text import MOST_LINE, clean
from cachix_console import Screen, align
from cachix_follow import ROLL_BACK, Follower
from cachix_summary import Report, markdown, record, summarize

NAME_COLOURS = ("36", "33", "35", "34", "96", "93", "95", "94")
MOST_KEPT = 10_000  # lines of a log that are kept for its group


class Display:
    """Text for people. Its methods may be called by several threads."""

    def __init__(self, screen: Screen) -> None:
        self.screen, self.count = screen, 0

    @property
    def broken(self) -> bool:
        """Whether nobody reads stdout any more."""
        return self.screen.broken

    def run(self, number: int, url: str) -> None:
        """Name the run that a workspace of ours has begun."""
        self.screen.print(f"Run {number}: {url}")

    def batch(self, number: int, count: int, agents: list[str]) -> None:
        """Begin a batch, one of `count`."""
        if count > 1:
            agent = "agent" if len(agents) == 1 else "agents"
            self.screen.print(f"Batch {number} of {count}, {len(agents)} {agent}")

    def started(self, host: str, followers: list[Follower]) -> None:
        """Print a line for each new deployment: its agent, URL and store path."""
        back = followers[0].action == ROLL_BACK if followers else False
        self.screen.print(f"{'Taking back' if back else 'Deploying'} by {host}:")
        rows = [[each.agent, each.url, each.store_path] for each in followers]
        for follower, row in zip(followers, align(rows)):
            row[0] = self.screen.paint(row[0], NAME_COLOURS[self.count % len(NAME_COLOURS)])
            self.count += 1
            follower.label = row[0]
            self.screen.print("  ".join(row).rstrip())

    def line(self, follower: Follower, text: str) -> None:
        """Show a line of a log."""
        self.screen.print(f"{follower.label} | {text}".rstrip(" "))

    def ended(self, follower: Follower) -> None:
        """A deployment has ended; lines of its log may follow."""

    def complete(self, follower: Follower) -> None:
        """No line of this log follows. May be called twice."""

    def summary(self, report: Report, status: int) -> None:
        """Show how the run has gone."""
        summarize(self.screen, report)


class GroupedDisplay(Display):
    """Text for the log of a CI job, with a group that can be folded for each agent's log.

    Groups can't be nested, nor grow side by side: a log is shown when it is complete. That of an
    agent that is alone in its batch is shown as it grows.
    """

    def __init__(self, screen: Screen, marks: Marks) -> None:
        super().__init__(screen)
        self.marks, self.lock = marks, threading.RLock()
        self.logs: dict[str, list[str]] = {}  # by the ids of the deployments
        self.overflow: dict[str, int] = {}
        self.live = ""  # the id of the deployment whose log is shown as it grows
        self.is_open = False

    def started(self, host: str, followers: list[Follower]) -> None:
        super().started(host, followers)
        self.logs.update({each.id: [] for each in followers})
        self.live = followers[0].id if len(followers) == 1 else ""
        self.is_open = False

    def line(self, follower: Follower, text: str) -> None:
        with self.lock:
            lines = self.logs.get(follower.id)
            if lines is not None and self.live == follower.id:
                self.begin(follower, follower.agent)
                super().line(follower, text)
            elif lines is None:
                super().line(follower, text)
            elif len(lines) < MOST_KEPT:
                lines.append(text)
            else:
                self.overflow[follower.id] = self.overflow.get(follower.id, 0) + 1

    def begin(self, follower: Follower, title: str) -> None:
        """Begin a group, unless it has begun."""
        if not self.is_open:
            self.is_open = True
            self.screen.write(self.marks.begin(title, follower.id))

    def complete(self, follower: Follower) -> None:
        with self.lock:
            lines = self.logs.pop(follower.id, None)
            if lines is None:
                return
            self.begin(follower, f"{follower.agent}: {follower.state.result(follower.agent)}")
            for text in lines:
                super().line(follower, text)
            if count := self.overflow.get(follower.id):
                super().line(follower, f"... and {count} lines more: {follower.url}")
            self.screen.write(self.marks.end(follower.id))
            self.is_open = False


class Marks:
    """GitHub's marks around a group of lines."""

    def begin(self, title: str, id: str) -> str:
        """The line before a group."""
        title = clean(title).replace("%", "%25")
        return f"::group::{title}"

    def end(self, id: str) -> str:
        """The line after a group."""
        return "::endgroup::"


class SectionMarks(Marks):
    """GitLab's marks around a group of lines."""

    def begin(self, title: str, id: str) -> str:
        start = f"section_start:{int(time.time())}:deploy_{id}[collapsed=true]"
        return f"\x1b[0K{start}\r\x1b[0K{clean(title)}"

    def end(self, id: str) -> str:
        return f"\x1b[0Ksection_end:{int(time.time())}:deploy_{id}\r\x1b[0K"


class JsonDisplay(Display):
    """A JSON object a line for each event: docs/activate-json.rst describes them."""

    def event(self, event: str, **facts: Any) -> None:
        """Print an event. GitHub's runner finds no command in it."""
        text = json.dumps({"event": event, **facts}, separators=(",", ":"))
        self.screen.write(text.replace("##[", "\\u0023#["))

    def run(self, number: int, url: str) -> None:
        self.event("run", run=number, url=url)

    def batch(self, number: int, count: int, agents: list[str]) -> None:
        self.event("batch", batch=number, of=count, agents=agents)

    def started(self, host: str, followers: list[Follower]) -> None:
        for each in followers:
            facts = {"agent": each.agent, "id": each.id or None, "url": each.url}
            self.event("started", action=each.action, storePath=each.store_path, **facts)

    def line(self, follower: Follower, text: str) -> None:
        line = clean(text, most=MOST_LINE)
        self.event("line", agent=follower.agent, id=follower.id, line=line)

    def ended(self, follower: Follower) -> None:
        self.event("ended", **record(follower))

    def summary(self, report: Report, status: int) -> None:
        self.event("summary", **report.to_json(status))


def create(is_json: bool, environment: Mapping[str, str]) -> Display:
    """The display for whoever reads stdout: a program, a CI system, a person."""
    screen = Screen()
    if is_json:
        return JsonDisplay(screen)
    if environment.get("GITHUB_ACTIONS"):
        return GroupedDisplay(screen, Marks())
    if environment.get("GITLAB_CI"):
        return GroupedDisplay(screen, SectionMarks())
    return Display(screen)


def add_step_summary(report: Report, environment: Mapping[str, str]) -> None:
    """Add a table to the page of GitHub's job, where that takes one."""
    path = environment.get("GITHUB_STEP_SUMMARY")
    if path:
        text = markdown(report)
        with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
            file.write(text)
