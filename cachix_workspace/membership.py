"""This server as a node: it says that it lives, and serves nobody while it has no database.

Alone, with SQLite, it does neither: then no other node takes its agents, and the disk is its own.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from typing import Any

import flask

from cachix_workspace import agents, nodes
from cachix_workspace.context import Workspace, workspace_of
from cachix_workspace.database import Lock, reason_of
from cachix_workspace.feed import ALL
from cachix_workspace.notify import ALIVE, PostgreSQL
from cachix_workspace.refusal import Refusal
from cachix_workspace.settings import Settings

logger = logging.getLogger(__name__)

WATCH_INTERVAL = 1.0  # seconds between two looks at how long the database was silent
CUT_INTERVAL = 5.0  # seconds between two cuts of connections on which somebody waits
LOST = "this node can't reach its database: try again later"


def prepare(app: flask.Flask) -> None:
    """Refuse requests while the node has no database: they would wait for it."""

    def check() -> None:
        if workspace_of(app).node.is_lost:
            raise Refusal(503, LOST)

    app.before_request(check)


def start(workspace: Workspace) -> None:
    """Hear the news, and live as a node if there may be others."""
    workspace.node.heard = time.monotonic()
    workspace.news.start(workspace.hear, lambda were_lost: look(workspace, were_lost))
    if workspace.news.is_shared:
        for name, target in (("node", _live), ("watchdog", _watch)):
            threading.Thread(target=target, args=(workspace,), name=name, daemon=True).start()


def leads(workspace: Workspace, task: str, seconds: float) -> bool:
    """Whether this node does a task for all, now and for so many seconds."""
    if not workspace.news.is_shared:
        return True
    with workspace.database.write(Lock.ROWS) as connection:
        return nodes.leads(connection, task, workspace.node.id, seconds)


def look(workspace: Workspace, were_lost: bool) -> None:
    """Look for what news that were lost would have told. Pages do if some were."""
    mine = sorted(workspace.hub.agent_ids())
    with workspace.database.read() as connection:
        due = agents.with_orders(connection, workspace.node.id)
        due += agents.moved(connection, workspace.node.id, mine)
    workspace.hub.wake_agent(*due)
    workspace.hub.wake_all_viewers()
    if were_lost:
        workspace.feed.publish(ALL)


# --- the node lives -------------------------------------------------------------------------------


def _live(workspace: Workspace) -> None:
    """Say that this node lives, until another one has its place (a thread)."""
    pause, is_told = threading.Event(), False
    while not pause.wait(workspace.settings.beat_interval):
        began = time.monotonic()
        try:
            is_here, gone = _beat(workspace)
        except Exception as error:  # this thread is the only one that beats: it must go on
            if not is_told:
                logger.warning("the database does not answer: %s", reason_of(error))
            is_told = True
            continue
        is_told = False
        if not is_here:
            _give_way(workspace)
            return
        _answered(workspace, began)
        if gone:
            workspace.note_agents(*gone)
        workspace.news.tell(ALIVE, workspace.signs.take_news())


def _beat(workspace: Workspace) -> tuple[bool, list[str]]:
    """Say that this node lives; whether it does, and the agents whose nodes do not."""
    node, settings = workspace.node, workspace.settings
    with workspace.database.write(Lock.ROWS) as connection:
        is_here = nodes.beat(connection, settings, node.id, node.start)
        return is_here, nodes.bury(connection, settings) if is_here else []


def _answered(workspace: Workspace, began: float) -> None:
    """The database has answered: serve again, if it was lost.

    A process that was stopped for so long was given up by others too.
    """
    node, patience = workspace.node, workspace.settings.database_patience
    if not node.is_lost and began - node.heard > patience:
        _lose(workspace)
    node.heard = time.monotonic()
    if node.is_lost:
        logger.warning("the database answers again")
        node.is_lost = False
        workspace.hub.open()
        workspace.feed.publish(ALL)


def _give_way(workspace: Workspace) -> None:
    """End, as another server has this node's data directory."""
    data = workspace.settings.data
    hint = f"if {data} was copied, remove {nodes.FILE} from the copy"
    logger.error("another server has started as this node: this one ends; %s", hint)
    workspace.hub.stop()
    os.kill(os.getppid(), signal.SIGTERM)  # of the supervisor, which would start another


# --- the database is watched ----------------------------------------------------------------------


def _watch(workspace: Workspace) -> None:
    """Serve nobody once the database has been silent for too long (a thread)."""
    pause, node, cut = threading.Event(), workspace.node, 0.0
    while not pause.wait(WATCH_INTERVAL):
        now = time.monotonic()
        if now - node.heard <= workspace.settings.database_patience:
            continue
        if not node.is_lost:
            _lose(workspace)
        if now > cut + CUT_INTERVAL:
            cut = now
            workspace.database.cut()


def _lose(workspace: Workspace) -> None:
    seconds = workspace.settings.database_patience
    logger.error("no answer of the database for %.0f s: this node closes its websockets", seconds)
    workspace.node.is_lost = True
    workspace.hub.shut(LOST)


def leave(workspace: Workspace) -> None:
    """Tell the others that this node ends, if they can be told."""
    node = workspace.node
    workspace.news.close()
    if not workspace.news.is_shared or node.is_lost:
        return
    try:
        with workspace.database.write(Lock.ROWS) as connection:
            nodes.leave(connection, node.id, node.start)
            nodes.resign(connection, node.id)
    except Exception as error:
        logger.warning("the end of this node could not be noted: %s", reason_of(error))


def notifier_of(database: Any, node_id: str, settings: Settings) -> PostgreSQL:
    """The notifier of nodes that share this database."""
    return PostgreSQL(database.connect_apart, node_id, settings.look_interval)
