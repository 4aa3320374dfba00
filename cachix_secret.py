"""The token of its own that an agent keeps, in place of one that many agents share."""

from __future__ import annotations

import json
import os
import re
from typing import Callable, Optional

from activate import files
from activate.text import hide
from cachix_connection import Peer
from cachix_errors import Refused

SECRET = re.compile(r"[\x21-\x7e]{1,512}")


class OwnToken:
    """The token that an agent uses: its own, which the workspace has sent it, or the given one.

    The workspace may have lost its own, with a database from a backup. Then both are tried in turn.
    """

    def __init__(self, state: str, peer: Peer, keeps: bool, tell: Callable[[str], None]) -> None:
        """`peer` gets the token. Without `keeps` no new one is kept: the agent does not stay."""
        self.path = os.path.join(state, f"secret-{peer.name}.json")
        self.peer, self.keeps, self.tell = peer, keeps, tell
        self.given = peer.token
        self.own = self._load()
        hide(self.own or self.given)
        peer.token = self.own or self.given

    def _load(self) -> Optional[str]:
        """The token that was kept for this workspace. A file that can't be read is none."""
        try:
            with open(self.path, "rb") as file:
                content = json.loads(file.read(1 << 16))
            token = content["token"] if content["host"] == self.peer.host else ""
            return token if SECRET.fullmatch(token) else None
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None

    def keep(self, token: Optional[str]) -> bool:
        """Keep a token that the workspace sent, and use it from now on; whether that was done.

        One that can't be kept is not used: it would be lost with this process, and the name with
        it. Nor is another one than the first that comes in place of the given token.
        """
        if token is None or not self.keeps or self.peer.token != self.given:
            return False
        if not SECRET.fullmatch(token):
            return False
        hide(token)
        content = {"host": self.peer.host, "token": token}
        try:
            files.write_durably(self.path, json.dumps(content).encode())
        except OSError as error:
            self.tell(f"{self.path} can't be written ({error.strerror}): the given token stays")
            return False
        self.own = self.peer.token = token
        self.tell("this agent has a token of its own now, and its name is bound to it")
        return True

    def try_other(self, error: Refused) -> bool:
        """Change to the other token after a refusal; whether it has not been tried in this turn.

        Only an unknown token is given up: an operator who moves the name to another machine wants
        this one to stay away, and not to enrol again.
        """
        is_own = self.peer.token == self.own
        if self.own is None or (is_own and not error.is_unknown):
            return False
        self.peer.token = self.given if is_own else self.own
        return is_own
