"""/ws-deployment and the log sockets of Cachix's agent, which reports and writes its log there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection

from cachix_protocol import (
    FAILED,
    IN_PROGRESS,
    SUCCEEDED,
    DeploymentStarted,
    FromAgent,
    Undecodable,
    decode_from_agent,
)
from cachix_workspace import deployments, logs
from cachix_workspace.context import Workspace
from cachix_workspace.database import Lock
from cachix_workspace.deployments import DeploymentRow
from cachix_workspace.handlers import Handler, Messages, by_name
from cachix_workspace.refusal import Refusal
from cachix_workspace.reports import Report
from cachix_workspace.websocket import Socket

logger = logging.getLogger(__name__)


class _SignOfLife(Handler):
    """A socket that gives signs of life of a deployment, or an agent, while it is open."""

    __slots__ = ("_entered", "name", "sign")

    def __init__(self, workspace: Workspace, sock: Socket, name: str, sign: str) -> None:
        super().__init__(workspace, sock)
        self.name, self.sign, self._entered = name, sign, False

    def enter(self) -> None:
        """Give signs from now on."""
        if not self._entered:
            self._entered = True
            self.workspace.signs.enter(self.sign)

    @classmethod
    def leave(cls, handlers: Sequence[Any]) -> None:
        """Give no more signs."""
        for handler in handlers:
            if handler._entered:
                handler.workspace.signs.leave(handler.sign)


class ReportHandler(_SignOfLife):
    """Applies the reports of Cachix's agent. Ours sends none: it checks whether it gets through."""

    __slots__ = ()
    path = "/ws-deployment"

    @classmethod
    def handle(cls, visits: Sequence[tuple[Any, Messages]]) -> None:
        """Apply what has come, in one transaction."""
        commands = []
        for handler, messages in sorted(visits, key=lambda visit: by_name(visit[0])):
            handler.enter()
            for message in messages:
                try:
                    commands.append((handler.name, decode_from_agent(message)))
                except Undecodable as error:
                    _skip(handler.name, error)
        if not commands:
            return
        workspace: Workspace = visits[0][0].workspace
        rows = []
        with workspace.database.write(Lock.ROWS) as connection:
            for name, command in commands:
                try:
                    with connection.begin_nested():
                        rows.append(_apply(connection, name, command))
                except (Undecodable, Refusal) as error:
                    _skip(name, error)
        for row in rows:
            workspace.note_report(row)


def _skip(name: str, error: Exception) -> None:
    text = "skipped a message of agent %s on /ws-deployment: %s"
    logger.warning(text, name, error)


def _apply(connection: Connection, name: str, command: FromAgent) -> DeploymentRow:
    """Apply a report. Raises Undecodable or Refusal."""
    facts: dict[str, Any] = {"time": command.time}
    if isinstance(command, DeploymentStarted):
        facts.update(status=IN_PROGRESS, closureSize=command.closure_size)
    else:
        facts.update(status=SUCCEEDED if command.has_succeeded else FAILED)
    report = Report.from_json(facts)
    row = deployments.find_own(connection, name, command.id)
    row, accepted = deployments.apply_report(connection, row, report)
    if not accepted:
        reported = f"{report.status} for a deployment that is {row.status}"
        logger.warning("agent %s reports %s", name, reported)
    return row


class LogHandler(_SignOfLife):
    """Appends the lines of Cachix's agent, which sends a message for each."""

    __slots__ = ()
    path = "/api/v1/deploy/log"

    @classmethod
    def handle(cls, visits: Sequence[tuple[Any, Messages]]) -> None:
        """Append what has come to all these logs, in one transaction."""
        batches = []
        for handler, messages in sorted(visits, key=lambda visit: by_name(visit[0])):
            handler.enter()
            if lines := _decoded(handler.sign, messages):
                batches.append((handler, lines))
        if not batches:
            return
        workspace: Workspace = visits[0][0].workspace
        with workspace.database.write(Lock.ROWS) as connection:
            for handler, lines in batches:
                _guarded(handler, _append, connection, handler, lines)
        for handler, _ in batches:
            workspace.note_log(handler.sign)


def _decoded(deployment_id: str, messages: Messages) -> list[str]:
    lines = []
    for message in messages:
        try:
            lines.append(logs.decode(message))
        except Undecodable as error:
            logger.warning("skipped a line of deployment %s: %s", deployment_id, error)
    return lines


def _guarded(handler: LogHandler, function: Callable[..., None], *arguments: Any) -> None:
    """Call; what is refused ends this socket only."""
    try:
        function(*arguments)
    except Refusal as refusal:
        LogHandler._end([handler], refusal)


def _append(connection: Connection, handler: LogHandler, lines: list[str]) -> None:
    """Append lines; a log that is closed takes none. Raises Refusal."""
    row = deployments.find_own(connection, handler.name, handler.sign)
    try:
        logs.append(connection, row, None, lines, handler.workspace.settings.max_log)
    except logs.Closed:
        logger.debug("the log of %s is closed", handler.sign)
