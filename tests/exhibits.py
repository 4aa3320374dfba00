"""Workspaces to look at: agents in all states, with runs, logs, tokens, people and a cache.

All is written into the tables as the workspace itself would, so that thousands of agents are there
within seconds. Nothing is random, and times are relative to the present.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caches import Files, Key, base32
from flask import Flask
from sqlalchemy import Connection, insert
from werkzeug.serving import WSGIRequestHandler, make_server

from cachix_protocol import __version__
from cachix_workspace import audit, cache, freeze, people, tokens
from cachix_workspace.app import create_app
from cachix_workspace.context import Workspace, workspace_of
from cachix_workspace.database import put_meta
from cachix_workspace.life import Sign
from cachix_workspace.pages.access import ROLES as PAGES
from cachix_workspace.people import ADMINISTRATOR
from cachix_workspace.settings import Settings
from cachix_workspace.tables import (
    agents,
    deployments,
    log_chunks,
    runs,
    webhook_messages,
    webhooks,
)

ROLES = ("web", "db", "build", "mail")
PACKAGES = ("linux", "openssl", "nginx", "postgresql", "systemd", "openssh", "glibc", "curl")
# Each agent's story, by its state; a small workspace has one of each, a large one is mostly well.
PLOTS = (
    *("well", "under-way", "failed", "rollback-failed", "lost", "offline", "never", "by-hand"),
    *("reboot-needed", "paused", "nothing-changed", "waiting"),
)
RARE = {71: "failed", 31: "under-way", 43: "offline", 61: "by-hand", 83: "reboot-needed"}
RARE |= {97: "lost", 113: "rollback-failed", 127: "paused", 139: "never", 149: "waiting"}
LONG = "a-rather-long-name-of-a-machine-in-the-basement-of-the-third-building-on-the-left-"
HOSTILE = '<script>alert(1)</script><b>"bold"</b> \u202eback\u202c \x1b[31mred\x1b[0m \x07{{ 7*7 }}'
REASONS = {
    "failed": "the health check ended with status 1: curl: (7) Failed to connect to port 443",
    "nothing-changed": "the download failed: no signature by a trusted key",
    "rollback-failed": "the former system could not be activated: switch-to-configuration ended "
    "with status 4",
}
LOG = (
    "copying path '/nix/store/...-nginx-1.28.0' from 'https://deploy.example.org/cache/main'",
    "$ /nix/store/...-nixos-system-web/bin/switch-to-configuration switch",
    "\x1b[32mactivating the configuration...\x1b[0m",
    "setting up /etc...",
    "reloading user units for root...",
    "starting the following units: \x1b[1mnginx.service\x1b[0m",
    "error: \x1b[31mcurl: (7) Failed to connect to web port 443\x1b[0m",
    "warning: the following units failed: nginx.service",
)
HOSTILE_LOG = (*LOG, HOSTILE, "a line without an end " + "x" * 5000)


def stamp(ago: float = 0.0) -> str:
    """A time as the tables have it, so many seconds ago."""
    moment = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(seconds=ago)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def number_id(*words: object) -> str:
    """An id that follows from words."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(map(str, words))))


def plot_of(index: int, count: int) -> str:
    """The story of an agent, by its number among `count` of them."""
    if count <= len(PLOTS):
        return PLOTS[index]
    if index < len(PLOTS):
        return PLOTS[index]
    return next((plot for step, plot in RARE.items() if index % step == 0), "well")


def name_of(index: int) -> str:
    """The name of an agent."""
    if index in (20, 21):
        return f"{LONG}{index}"
    return f"{ROLES[index % len(ROLES)]}-{index // len(ROLES) + 1}"


@dataclass
class Paths:
    """The store path of each role, generation by generation; with `files` they are in a cache."""

    files: Files | None = None
    known: dict[tuple[str, int], str] = field(default_factory=dict)

    def get(self, role: str, generation: int) -> str:
        """The path of a generation."""
        key = (role, generation)
        if key not in self.known:
            self.known[key] = self._make(role, generation)
        return self.known[key]

    def _make(self, role: str, generation: int) -> str:
        name = f"nixos-system-{role}-25.11.{generation:04}"
        if self.files is None:
            digest = uuid.uuid5(uuid.NAMESPACE_URL, name).bytes + b"1234"
            return f"/nix/store/{base32(digest)}-{name}"
        parts = [
            self.files.add(f"{package}-{number}.{generation // (number + 1)}", f"{package}\n" * 99)
            for number, package in enumerate(PACKAGES)
        ]
        return self.files.add(name, {"nixos-version": "25.11", "parts": "\n".join(parts)})


@dataclass
class Story:
    """An agent and its past: rows for the tables."""

    index: int
    count: int
    history: int
    paths: Paths
    is_hostile: bool = True

    def __post_init__(self) -> None:
        self.plot = plot_of(self.index, self.count)
        self.name, self.role = name_of(self.index), ROLES[self.index % len(ROLES)]
        self.id = number_id("agent", self.name)

    def agent(self) -> dict[str, Any]:
        """The row of the agent."""
        plot, last = self.plot, self.paths.get(self.role, self.history - 1)
        never = plot == "never"
        connected = plot not in ("offline", "never", "waiting", "lost")
        hand = self.paths.get(self.role, self.history + 7) if plot == "by-hand" else last
        is_ours = self.index % 9 != 8  # or Cachix's agent, which says nothing of itself
        says = is_ours and not never
        seen = stamp(60.0 * (7 + self.index % 50)) if connected else stamp(3 * 86400)
        paused = plot == "paused"
        return {
            **{"id": self.id, "name": self.name, "system": "" if never else "x86_64-linux"},
            **{"version": "1.7.9", "created_on": stamp(90 * 86400), "connected": connected},
            **{"seen_on": "" if never else seen},
            **{"last_index": 0 if never else self.history + (plot in OPEN)},
            "client": None if not is_ours else "0.0.9" if self.index % 11 == 5 else __version__,
            "description": f"in rack {self.index % 40}" if self.index % 3 else None,
            "labels": f",{'prod' if self.index % 2 else 'test'},{self.role},",
            **{"paused_on": stamp(7200) if paused else None},
            **{"paused_by": "anna" if paused else None},
            **{"deployed": None if never else last, "deployed_on": None if never else stamp(7000)},
            **{"state_on": stamp(6900) if says else None, "running": hand if says else None},
            **{"running_since": stamp(7000) if says else None},
            **{"profile": last if says else None, "kind": "nixos" if says else None},
            "reboot_since": stamp(86400) if plot == "reboot-needed" else None,
        }

    def deployments(self) -> Iterator[dict[str, Any]]:
        """The rows of its deployments."""
        if self.plot == "never":
            return
        for index in range(1, self.history + 1):
            ago = 3600.0 * (1 + (self.history - index) * 26) - 37.0 * (self.index % 80)
            yield self._deployment(index, ago, *self._end(index == self.history))
        if self.plot in OPEN:
            status, step = OPEN[self.plot]
            yield self._deployment(self.history + 1, 500.0, status, step)

    def _end(self, is_last: bool) -> tuple[str, str | None, str | None]:
        plot = self.plot
        if is_last and plot in REASONS:
            outcome = "rolled-back" if plot == "failed" else plot
            return "Failed", "failed" if outcome == "nothing-changed" else outcome, outcome
        if is_last and plot == "reboot-needed":
            return "Succeeded", "succeeded", plot
        return "Succeeded", "succeeded", "succeeded"

    def _deployment(
        self, index: int, ago: float, status: str, step: str | None, outcome: str | None = None
    ) -> dict[str, Any]:
        is_open = status in ("Pending", "InProgress")
        started = None if status == "Pending" else stamp(ago - 2)
        way = ["received", "downloading", "activating", "checking", "committing"]
        way = way[:2] if is_open or outcome == "nothing-changed" else way
        if outcome in ("rolled-back", "rollback-failed"):
            way[-1] = "rolling-back"
        last = [] if is_open else [[step, stamp(ago - 41)]]
        steps = [[word, stamp(ago - 2 - 7 * number)] for number, word in enumerate(way)] + last
        reason = REASONS.get(self.plot) if status == "Failed" else None
        if self.is_hostile and self.index == 14 and status == "Failed":
            reason = f"{HOSTILE}\nand a second line {'long' * 400}"
        return {
            **{"id": number_id(self.name, index), "agent_id": self.id, "index": index},
            **{"store_path": self.paths.get(self.role, index - 1), "status": status},
            **{"rollback_script": None, "reason": reason, "closure_size": 734_003_200},
            **{"created_on": stamp(ago), "started_on": started},
            **{"finished_on": None if is_open else stamp(ago - 41)},
            **{"log_next": 0, "step": step, "outcome": outcome},
            **{"run_id": index, "actor": "CI (token 2, main@a1b2c3d)"},
            **{"before": self.paths.get(self.role, index - 2) if index > 1 else None},
            **{"steps": None if status == "Pending" else json.dumps(steps)},
        }


OPEN = {
    "under-way": ("InProgress", "downloading"),
    "lost": ("InProgress", "downloading"),
    "paused": ("Pending", None),
    "waiting": ("Pending", None),
}


def fill(
    connection: Connection,
    count: int,
    history: int = 3,
    paths: Paths | None = None,
    is_hostile: bool = True,
) -> None:
    """Write `count` agents with so many ended deployments each, and the runs that ordered them.

    Some texts are hostile, unless it shall be nice.
    """
    paths = paths or Paths()
    stories = [Story(index, count, history, paths, is_hostile) for index in range(count)]
    connection.execute(insert(agents), [story.agent() for story in stories])
    numbers = range(1, history + 2)
    connection.execute(insert(runs), [_run(number, history, is_hostile) for number in numbers])
    rows = [row for story in stories for row in story.deployments()]
    for start in range(0, len(rows), 20_000):
        connection.execute(insert(deployments), rows[start : start + 20_000])
    for row in rows[:: max(1, len(rows) // 60)] if count < 1000 else []:
        _log(connection, row["id"], HOSTILE_LOG if is_hostile else LOG)


def _run(number: int, history: int, is_hostile: bool) -> dict[str, Any]:
    title = ["Renew the certificates", "Update nixpkgs", "Open port 8443 for the new proxy"]
    commit = number_id("commit", number).replace("-", "")
    source = {
        **{"commit": commit, "branch": "main", "title": title[number % 3]},
        **{"url": f"https://github.com/example/machines/commit/{commit}"},
        **{"job": f"https://github.com/example/machines/actions/runs/{number}"},
    }
    if number == 2 and is_hostile:
        source |= {"title": HOSTILE + " long" * 50, "branch": "a-branch-with-a-name-" * 5}
    ago = 3600.0 * (1 + (history - number) * 26)
    is_last = number > history
    return {
        **{"id": number, "created_on": stamp(500.0 if is_last else ago), "action": "deploy"},
        **{"actor": "CI (token 2, main@a1b2c3d)", "source": json.dumps(source), "of_run": None},
    }


def _log(connection: Connection, deployment_id: str, lines: tuple[str, ...]) -> None:
    records = [json.dumps({"line": line, "time": stamp(3000)}) for line in lines]
    body = {"first": 0, "count": len(records), "body": "\n".join(records)}
    connection.execute(insert(log_chunks).values(deployment_id=deployment_id, **body))
    size = sum(map(len, records))
    mine = deployments.c.id == deployment_id
    values = {"log_next": len(records), "log_size": size}
    connection.execute(deployments.update().where(mine).values(**values))


def furnish(connection: Connection) -> None:
    """Write tokens, people, webhooks and audit entries."""
    put_meta(connection, "name", "Example machines")
    tokens.create(connection, "admin", "anna's laptop")
    tokens.create(connection, "activate", "GitHub", expires_in=9, agents="web-*,db-*")
    tokens.create(connection, "agent", "autumn <b>batch</b>", agents="build-*", most=40)
    tokens.create(connection, "agent", "", agents="web-1")
    tokens.create(connection, "activate", "the old one", expires_in=1e-9)
    for name, role in (("anna", "admin"), ("boris@example.org", "operator"), ("chie", "viewer")):
        people.begin(
            connection,
            "2001:db8::17",
            "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 Chrome/156.0 Safari/537.36",
            person_id=people.add(connection, name, role).id,
        )
    hook = {"format": "slack", "events": "failed,rollback-failed,offline,back", "label": "prod"}
    where = {"url": f"https://hooks.slack.example/services/{'T0123/' * 9}", "key": "k" * 43}
    query = insert(webhooks).values(**where, **hook, created_on=stamp(9 * 86400))
    hook_id = connection.execute(query.returning(webhooks.c.id)).scalar_one()
    sent = {"created_on": stamp(4000), "body": "[]", "tries": 1, "answer": "200 ok"}
    connection.execute(
        insert(webhook_messages).values(webhook_id=hook_id, **sent, delivered_on=stamp(3999))
    )
    for number in range(70):
        audit.record(connection, "anna", "deploy", f"web-{number}: {HOSTILE}", "192.0.2.7")


@dataclass(frozen=True)
class Gallery:
    """A workspace that is served by this process."""

    url: str
    app: Flask
    workspace: Workspace
    is_hostile: bool

    def cookie(self, role: str = ADMINISTRATOR) -> str:
        """The cookie of a new session of somebody with this role."""
        with self.workspace.database.write() as connection:
            name = f"the-{role}" if self.is_hostile else "anna"
            person = people.find(connection, name) or people.add(connection, name, role)
            return people.begin(connection, "127.0.0.1", "tests", person_id=person.id)

    def freeze(self, reason: str) -> None:
        """Freeze the workspace."""
        with self.workspace.database.write() as connection:
            freeze.freeze(connection, reason, "anna")
        self.workspace.feed.publish("all")


NO_PAGES = ("events.", "overview.get_static", "overview.get_icon", "get_text", "get_lines")
NO_PAGES += ("get_program", "get_hash")
# what stands for the variables of a page's address
FILLED = {"name": "build-1", "index": "3", "run_id": "3", "what": "rename", "number": "4"}
FILLED |= {"secret": "no-link"}
MORE = (
    *(f"/agents/{name}" for name in ("web-1", "web-2", "build-2", "mail-1", "mail-2", "db-3")),
    *("/agents/build-1/move", "/agents/build-1/remove", "/runs/2", "/runs/4", "/caches/none"),
    *("/?q=nobody-has-this", "/?state=failed&label=test", "/sign-in?next=/runs", "/nowhere"),
    *("/start?label=prod", "/agents/nobody", "/agents/mail-1/deployments/3?q=nginx"),
    *("/agents/db-1/deployments/4", "/agents/web-2/deployments/4", "/agents/db-3/deployments/4"),
    *("/add/arrived?token=3", "/audit?q=anna", "/deployments?status=Failed", "/api/v1/docs"),
    *("/start/confirm?name=web-1&path=/nix/store/" + "a" * 32 + "-x", "/runs/999"),
)


def pages(app: Flask) -> list[str]:
    """The addresses of all pages that are got, with what is in a workspace of 12 agents."""
    paths = list(MORE)
    for rule in app.url_map.iter_rules():
        is_page = rule.endpoint in PAGES and "GET" in (rule.methods or ())
        if is_page and not any(word in rule.endpoint for word in NO_PAGES):
            names = "main" if rule.rule.startswith("/caches/") else FILLED["name"]
            filled = {**FILLED, "name": names}
            text = re.sub(r"<([^>:]*:)?(\w+)>", r"{\2}", rule.rule)
            paths.append(text.format(**filled))
    return sorted(set(paths))


class Quiet(WSGIRequestHandler):
    """Logs nothing."""

    def log(self, *_: Any, **__: Any) -> None:
        """Do not log."""


@contextlib.contextmanager
def gallery(
    data: Path,
    count: int,
    history: int = 3,
    url: str = "",
    with_cache: bool = True,
    is_hostile: bool = True,
) -> Iterator[Gallery]:
    """Serve a workspace with `count` agents; with none it is as it is after `init`."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(64)
        own = f"http://127.0.0.1:{sock.getsockname()[1]}"
        app = create_app(Settings(data, public_url=url or own))
        workspace = workspace_of(app)
        workspace.news.start(workspace.hear, lambda _: None)  # as `start_threads` does
        if count:
            with workspace.database.write() as connection:
                furnish(connection)
                paths = Paths(_files(connection, workspace)) if with_cache else None
                fill(connection, count, history, paths, is_hostile)
                let_pass(connection, workspace)
        port = sock.getsockname()[1]
        server = make_server(
            "127.0.0.1", port, app, threaded=True, request_handler=Quiet, fd=sock.fileno()
        )
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield Gallery(own, app, workspace, is_hostile)
        finally:
            workspace.feed.close()
            server.shutdown()
            thread.join(10)
            workspace.database.close()


def _files(connection: Connection, workspace: Workspace) -> Files:
    _, secret = cache.create(connection, "main", True, workspace.settings)
    return Files(workspace.settings.data / "cache" / "main", Key.parse(secret))


def let_pass(connection: Connection, workspace: Workspace) -> None:
    """Make it seem that the server runs for an hour: what gave no sign of life is lost by now."""
    now, hour = time.monotonic(), 3600.0
    workspace.signs._start = Sign(now - hour, stamp(hour))
    query = deployments.join(agents).select().where(agents.c.connected)
    ids = [row[0] for row in connection.execute(query.with_only_columns(deployments.c.id))]
    alive = Sign(now + hour, stamp())
    workspace.signs._last.update(dict.fromkeys(ids, alive))
