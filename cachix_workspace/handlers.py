"""Handlers of websockets: what all kinds share.

Sockets of a kind that have something to do at a moment are handled together. A handler's state is
its own: one thread at a time has it.
"""

from __future__ import annotations

import logging
import math
import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from cachix_protocol import Error
from cachix_workspace.context import Workspace
from cachix_workspace.database import reason_of
from cachix_workspace.refusal import Refusal
from cachix_workspace.turns import Guest
from cachix_workspace.websocket import INTERNAL_ERROR, REVOKED, UNAVAILABLE, Socket

logger = logging.getLogger(__name__)

IDLE = 60.0  # seconds after which a handler looks around without being woken
WAIT = 2.0  # seconds until a visit that failed for want of the database is made again
TOGETHER = 5.0  # seconds: those looks are put off to a multiple of this, so that many are one

Messages = list[str | bytes]
Kind = TypeVar("Kind", bound="Handler")


def by_name(handler: Any) -> str:
    """The agent's name. Transactions that lock many agents do so in its order, or they deadlock."""
    return str(handler.name)


class Handler(Guest):
    """Handles a socket until it ends."""

    __slots__ = ("has_left", "sock", "workspace")
    path = ""  # of the request, for messages
    may_wait = False  # whether nothing is lost if a visit fails and is made again

    def __init__(self, workspace: Workspace, sock: Socket) -> None:
        super().__init__()
        self.workspace, self.sock, self.has_left = workspace, sock, False
        sock.guest = self

    @classmethod
    @abstractmethod
    def handle(cls, visits: Sequence[tuple[Any, Messages]]) -> None:
        """Handle the messages that have come, and look around. May raise anything."""

    @classmethod
    def leave(cls, handlers: Sequence[Any]) -> None:
        """These sockets have ended. May raise SQLAlchemyError or Error."""

    @classmethod
    def visit(cls, guests: Sequence[Any]) -> None:
        """Handle what has happened to these sockets. Never raises."""
        visits, over = [], []
        for handler in guests:
            is_open = handler.sock.open  # asked first: no messages come after that
            messages = handler.sock.take()
            if is_open or messages:
                visits.append((handler, messages))
            elif not handler.has_left:
                handler.has_left = True
                over.append(handler)
            if messages and not is_open:
                handler.sock.wake()  # to leave
        if visits:
            cls._attempt(visits)
        if over:
            cls._part(over)

    def look_again(self, pause: float | None = None) -> None:
        """Be visited in so many seconds, or after a long while."""
        now = time.monotonic()
        late = math.ceil((now + IDLE) / TOGETHER) * TOGETHER
        self.workspace.turns.call_at(late if pause is None else min(late, now + pause), self)

    @classmethod
    def _attempt(cls, visits: list[tuple[Any, Messages]]) -> None:
        """Handle; a failure ends the sockets that it concerns."""
        try:
            cls.handle(visits)
        except Exception as error:
            is_common = isinstance(error, (OperationalError, InterfaceError, PoolTimeout))
            if len(visits) > 1 and not is_common:
                for visit in visits:
                    cls._attempt([visit])
                return
            handlers = [handler for handler, _ in visits]
            if is_common and cls.may_wait and handlers[0].workspace.news.is_shared:
                for handler in handlers:  # the node closes all if this lasts
                    handler.look_again(WAIT)
            else:
                cls._end(handlers, error)

    @classmethod
    def _end(cls, handlers: list[Any], error: Exception) -> None:
        if isinstance(error, Refusal):  # another agent was faster after the handshake
            code, reason = REVOKED[0], str(error)
        elif isinstance(error, (SQLAlchemyError, Error)):
            count = f"{len(handlers)} websockets" if len(handlers) > 1 else "the websocket"
            verb = "end" if len(handlers) > 1 else "ends"
            logger.error("%s %s %s: %s", count, cls.path, verb, reason_of(error))
            code, reason = UNAVAILABLE
        else:
            logger.error("the handler of %s failed", cls.path, exc_info=error)
            code, reason = INTERNAL_ERROR
        for handler in handlers:
            handler.sock.end(code, reason)

    @classmethod
    def _part(cls, handlers: list[Any]) -> None:
        try:
            cls.leave(handlers)
        except Exception as error:
            logger.error("the end of %s could not be noted: %s", cls.path, reason_of(error))
        for handler in handlers:
            handler.workspace.hub.remove(handler.sock)
