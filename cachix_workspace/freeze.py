"""A frozen workspace takes no orders: nobody deploys, whoever he is, until it is thawed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from sqlalchemy import Connection

from cachix_protocol import utc_now
from cachix_workspace.database import delete_meta, get_meta, put_meta
from cachix_workspace.refusal import Refusal

KEY = "frozen"  # in the meta table
MAX_REASON = 500  # characters
LOCKED = 423  # the HTTP status of an order that is refused by it


@dataclass(frozen=True)
class Frozen:
    """Why nobody may deploy, since when, and who said so."""

    reason: str
    since: str
    by: str

    @property
    def sentence(self) -> str:
        """The sentence that refuses an order."""
        return f"the workspace is frozen since {self.since[:16]}Z by {self.by}: {self.reason}"


def get(connection: Connection) -> Frozen | None:
    """The freeze; None while orders are taken."""
    text = get_meta(connection, KEY)
    return None if text is None else Frozen(**json.loads(text))


def freeze(connection: Connection, reason: str, by: str) -> Frozen:
    """Take no more orders. Raises Refusal (400) without a reason. The first one counts."""
    reason = " ".join(reason.split())[:MAX_REASON]
    if not reason:
        raise Refusal(400, "say why the workspace is frozen: whoever wants to deploy reads it")
    frozen = get(connection) or Frozen(reason, utc_now(), by)
    put_meta(connection, KEY, json.dumps(asdict(frozen)))
    return frozen


def thaw(connection: Connection) -> bool:
    """Take orders again; False if the workspace was not frozen."""
    was_frozen = get(connection) is not None
    delete_meta(connection, KEY)
    return was_frozen


def check(connection: Connection) -> None:
    """Raises Refusal (423) if the workspace is frozen."""
    frozen = get(connection)
    if frozen is not None:
        raise Refusal(LOCKED, frozen.sentence)
