"""Agents' reports on their machines: the running path, since when, and a needed reboot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, update

from cachix_protocol import Undecodable, checked_field, is_store_path, utc_now
from cachix_workspace import audit
from cachix_workspace.agents import AgentRow
from cachix_workspace.deployments import TIME
from cachix_workspace.states import HANDS
from cachix_workspace.tables import agents

KINDS = ("nixos", "darwin", "home-manager", "profile")
MAX_PROFILE = 300  # characters
MINUTE = len("2026-11-27T18:52")


@dataclass(frozen=True)
class MachineState:
    """The report of an agent on its machine; None is for facts that are not known.

    `by_hand` is the key of HANDS if the path was run at the machine itself.
    """

    running: str | None
    since: str | None
    profile: str | None
    kind: str | None
    needs_reboot: bool
    by_hand: str | None = None

    @classmethod
    def from_json(cls, record: Any) -> MachineState:
        """Check what an agent has put. Raises Undecodable, with a sentence that names the value."""
        running = checked_field(record, "running", str, optional=True)
        profile = checked_field(record, "profile", str, optional=True)
        kind = checked_field(record, "kind", str, optional=True)
        since = checked_field(record, "runningSince", str, optional=True)
        checked_field(record, "agentVersion", str, optional=True)  # its header says that too
        if running is not None and not is_store_path(running):
            raise Undecodable("`running` is not a store path (/nix/store/HASH-NAME)")
        if profile is not None and not _is_file(profile):
            raise Undecodable(f"`profile` must be a path of at most {MAX_PROFILE} characters")
        if kind is not None and kind not in KINDS:
            raise Undecodable(f"`kind` must be one of {', '.join(KINDS)}")
        needs_reboot = checked_field(record, "rebootNeeded", bool)
        is_time = since is not None and TIME.fullmatch(since) is not None
        by_hand = checked_field(record, "byHand", dict, optional=True) or {}
        action = str(by_hand.get("action"))
        facts = (profile, kind, needs_reboot, action if action in HANDS else None)
        return cls(running, since if is_time else None, *facts)


def _is_file(path: str) -> bool:
    return path.startswith("/") and len(path) <= MAX_PROFILE and path.isprintable()


def note(connection: Connection, agent: AgentRow, state: MachineState) -> bool:
    """Note what an agent says of its machine; whether that is new. A repetition costs no write."""
    now = utc_now()
    changes = {
        "running": state.running,
        "running_since": _running_since(agent, state, now),
        "profile": state.profile,
        "kind": state.kind,
        "by_hand": state.by_hand,
        "reboot_since": (agent.reboot_since or now) if state.needs_reboot else None,
    }
    is_new = any(getattr(agent, name) != value for name, value in changes.items())
    if is_new or (agent.state_on or "")[:MINUTE] != now[:MINUTE]:
        mine = agents.c.id == agent.id
        connection.execute(update(agents).where(mine).values(**changes, state_on=now))
    if state.by_hand is not None and state.running != agent.running:
        words = HANDS[state.by_hand]
        audit.record(connection, f"agent {agent.name}", words, str(state.running))
    return is_new


def _running_since(agent: AgentRow, state: MachineState, now: str) -> str | None:
    """Since when the path runs: as it was noted first, as the agent said then unless it can't be.

    Its clock may be wrong.
    """
    if state.running is None or state.running == agent.running:
        return agent.running_since if state.running else None
    return state.since if state.since is not None and state.since <= now else now
