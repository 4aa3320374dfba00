"""Decisions of a roll-out: which agents, in which batches, and whether it goes on. All pure."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, Optional

from activate.text import brief
from activate.values import dataclass, field
from cachix_protocol import CANCELLED, SUCCEEDED, UsageError, checked_field, listed

WAIT, SKIP, FAIL = "wait", "skip", "fail"
GLOB = re.compile(r"[*?\[]")
MAX_REASON = 200  # characters of a reason within a sentence


@dataclass(frozen=True)
class Rollout:
    """How a fleet is deployed. By default all agents at once, whatever becomes of any of them.

    `batch` is a number of agents, or a share of them such as 10%. `pause` is in seconds.
    """

    canary: tuple[str, ...] = ()
    batch: str = ""
    max_failures: int = 0
    pause: float = 0.0
    rolls_back: bool = False
    offline: str = WAIT
    unknown: str = FAIL
    on: tuple[str, ...] = ()
    force: bool = False

    @property
    def in_batches(self) -> bool:
        """Whether there may be several batches."""
        return bool(self.canary or self.batch)

    @property
    def needs_fleet(self) -> str:
        """The option that only a workspace that describes its agents can serve; empty if none."""
        if self.rolls_back:
            return "--rollback-succeeded"
        if self.offline != WAIT:
            return f"--offline={self.offline}"
        return f"--unknown={self.unknown}" if self.unknown != FAIL else ""


@dataclass(frozen=True)
class Fact:
    """An agent as its workspace describes it. `last_path` is that of its last deployment's end."""

    online: bool = True
    labels: tuple[str, ...] = ()
    running: Optional[str] = None
    last_path: Optional[str] = None
    last_state: Optional[str] = None
    under_way: bool = False

    @classmethod
    def from_json(cls, record: Any) -> Fact:
        """Raises Undecodable."""
        labels = checked_field(record, "labels", list, optional=True) or []
        return cls(
            online=checked_field(record, "connected", bool),
            labels=tuple(label for label in labels if isinstance(label, str)),
            running=checked_field(record, "running", str, optional=True),
            last_path=checked_field(record, "lastStorePath", str, optional=True),
            last_state=checked_field(record, "lastState", str, optional=True),
            under_way=checked_field(record, "deployment", int, optional=True) is not None,
        )

    def has(self, path: str) -> bool:
        """Whether the agent was deployed this path last, with success, and still runs it."""
        is_it = self.running == self.last_path == path
        return is_it and self.last_state == "succeeded" and not self.under_way


@dataclass(frozen=True)
class Plan:
    """The batches, and the agents that are in none. `missing` are the canaries among these."""

    batches: list[list[str]]
    missing: list[str] = field(default_factory=list)  # canaries
    unknown: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    offline: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many agents the batches have."""
        return sum(map(len, self.batches))


def selection(
    words: Collection[str], names: Collection[str], fleet: Optional[Mapping[str, Fact]] = None
) -> list[str]:
    """Those of the names that a word selects: as a name, by a glob, else by a label.

    Raises UsageError for a word that selects none.
    """
    choice: set[str] = set()
    for word in words:
        matches = {name for name in names if name == word}
        if not matches and GLOB.search(word):
            matches = {name for name in names if fnmatch.fnmatchcase(name, word)}
        if not matches and fleet is not None:
            matches = {name for name in names if name in fleet and word in fleet[name].labels}
        if not matches:
            kinds = "name or glob" if fleet is None else "name, glob or label"
            hint = "; labels need a workspace of yours" if fleet is None else ""
            what = f"no {kinds} of an agent that is to be deployed{hint}"
            raise UsageError(f"{brief(word)!r} is {what}")
        choice |= matches
    return [name for name in names if name in choice]


def wants_labels(words: Collection[str], names: Collection[str]) -> bool:
    """Whether a word can only be a label."""
    return any(word not in names and not GLOB.search(word) for word in words)


def size(batch: str, count: int) -> int:
    """How many agents a batch has, of `count`: 10% or a number, at least one. Raises UsageError."""
    match = re.fullmatch(r"([0-9]{1,9})(%?)", batch)
    if match is None or not int(match[1]) or (match[2] and int(match[1]) > 100):
        hint = "a number of agents, or a share from 1% to 100%"
        raise UsageError(f"--batch must be {hint}, not {batch[:40]!r}")
    return max(1, math.ceil(int(match[1]) * count / 100)) if match[2] else int(match[1])


def batches(names: list[str], canary: Collection[str], batch: str) -> list[list[str]]:
    """The canaries first, as a batch of their own, then the others. Raises UsageError."""
    first = [name for name in names if name in canary]
    rest = [name for name in names if name not in canary]
    step = size(batch, len(names)) if batch else max(1, len(rest))
    parts = [rest[start : start + step] for start in range(0, len(rest), step)]
    return [first, *parts] if first else parts


def plan(rollout: Rollout, agents: Mapping[str, str], fleet: Optional[Mapping[str, Fact]]) -> Plan:
    """Split agents, given with their paths, into batches and those in none. Raises UsageError.

    Without a fleet nothing is known of any agent, and all are deployed.
    """
    names = selection(rollout.on, list(agents), fleet) if rollout.on else list(agents)
    canary = selection(rollout.canary, names, fleet)
    if fleet is None:
        return Plan(batches(names, canary, rollout.batch))
    unknown = [name for name in names if name not in fleet]
    rest = [name for name in names if name in fleet]
    leaves_out = rollout.in_batches and not rollout.force
    unchanged = [name for name in rest if leaves_out and fleet[name].has(agents[name])]
    rest = [name for name in rest if name not in unchanged]
    offline = [name for name in rest if not fleet[name].online and rollout.offline != WAIT]
    rest = [name for name in rest if name not in offline]
    missing = [name for name in canary if name in unknown or name in offline]
    parts = batches(rest, canary, rollout.batch)
    return Plan(parts, missing, unknown, unchanged, offline)


def refusal(rollout: Rollout, plan: Plan) -> str:
    """Why nothing of a plan is deployed; empty if it is."""
    if plan.unknown and rollout.unknown == FAIL:
        hint = "an agent is known once it has connected, or was added, and the token must be for it"
        return f"unknown agents: {listed(plan.unknown)}: {hint}; --unknown=skip leaves them out"
    if plan.offline and rollout.offline == FAIL:
        return f"nothing was deployed, as agents are offline: {listed(plan.offline)}"
    if plan.missing:
        return f"nothing was deployed, as canaries are offline or unknown: {listed(plan.missing)}"
    return ""


@dataclass(frozen=True)
class End:
    """How the deployment of an agent has ended."""

    agent: str
    status: str
    reason: str = ""

    @property
    def succeeded(self) -> bool:
        """Whether the agent runs the new path."""
        return self.status == SUCCEEDED

    @property
    def sentence(self) -> str:
        """For people: that it failed, and why."""
        word = "was cancelled" if self.status == CANCELLED else "failed"
        reason = brief(self.reason)
        if len(reason) > MAX_REASON:
            reason = reason[: MAX_REASON - 3] + "..."
        return f"{self.agent} {word}" + (f": {reason}" if reason else "")


def verdict(ends: list[End], most: int, total: int) -> str:
    """Why a roll-out does not go on after these ends; empty if it does."""
    failures = [end for end in ends if not end.succeeded]
    if len(failures) <= most:
        return ""
    more = f", and {len(failures) - 1} more failed" if len(failures) > 1 else ""
    return f"stopped after {len(ends)} of {total}: {failures[0].sentence}{more}"
