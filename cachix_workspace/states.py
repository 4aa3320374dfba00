"""How agents and deployments stand, in the words, colours and shapes that pages show. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cachix_protocol import CANCELLED, FAILED, IN_PROGRESS, PENDING, SUCCEEDED


@dataclass(frozen=True)
class State:
    """A state: its key in URLs and JSON, its word, the shape of its icon, and its colour.

    States are listed in the order in which agents are: what needs a look comes first.
    """

    key: str
    word: str
    icon: str
    tone: str  # bad, warn, busy, idle or good

    @property
    def rank(self) -> int:
        """Its place among the states of agents."""
        return RANKS[self.key]


ROLLBACK_FAILED = State("rollback-failed", "rollback failed", "octagon", "bad")
LOST = State("lost", "lost", "question", "bad")
FAILED_STATE = State("failed", "failed", "cross", "bad")
UNDER_WAY = State("under-way", "under way", "half", "busy")
OFFLINE = State("offline", "offline", "ring", "idle")
NEVER = State("never", "never connected", "dashes", "idle")
BY_HAND = State("by-hand", "changed by hand", "hand", "warn")
TESTED = State("tested", "runs a test", "half", "warn")
REBOOT = State("reboot-needed", "reboot needed", "turn", "warn")
WELL = State("well", "well", "check", "good")
AGENT_STATES = (
    *(
        ROLLBACK_FAILED,
        LOST,
        FAILED_STATE,
        UNDER_WAY,
        OFFLINE,
        NEVER,
        BY_HAND,
        TESTED,
        REBOOT,
        WELL,
    ),
)
RANKS = {state.key: rank for rank, state in enumerate(AGENT_STATES)}

WAITING = State("waiting", "waiting", "ring", "idle")
SUCCEEDED_STATE = State("succeeded", "succeeded", "check", "good")
ROLLED_BACK = State("rolled-back", "failed, rolled back", "cross", "bad")
UNCHANGED = State("nothing-changed", "failed, nothing changed", "cross", "bad")
DRY_RUN = State("dry-run", "dry run", "check", "idle")
TESTED_STATE = State("tested", "tested", "check", "good")
CANCELLED_STATE = State("cancelled", "cancelled", "bar", "idle")
DEPLOYMENT_STATES = (
    *(ROLLBACK_FAILED, LOST, FAILED_STATE, ROLLED_BACK, UNCHANGED, UNDER_WAY, WAITING),
    *(REBOOT, SUCCEEDED_STATE, TESTED_STATE, DRY_RUN, CANCELLED_STATE),
)
OUTCOMES = {  # the state of an ended deployment, by its status and outcome; by status otherwise
    (FAILED, "rollback-failed"): ROLLBACK_FAILED,
    (FAILED, "rolled-back"): ROLLED_BACK,
    (FAILED, "nothing-changed"): UNCHANGED,
    (SUCCEEDED, "reboot-needed"): REBOOT,
    (SUCCEEDED, "dry-run"): DRY_RUN,
    (SUCCEEDED, "tested"): TESTED_STATE,
}
HANDS = {"rollback": "rolled back by hand", "activation": "activated by hand"}
BY_STATUS = {
    PENDING: WAITING,
    IN_PROGRESS: UNDER_WAY,
    SUCCEEDED: SUCCEEDED_STATE,
    FAILED: FAILED_STATE,
    CANCELLED: CANCELLED_STATE,
}


def of_deployment(status: str, outcome: str | None, is_lost: bool = False) -> State:
    """The state of a deployment."""
    if is_lost and status == IN_PROGRESS:
        return LOST
    return OUTCOMES.get((status, outcome or ""), BY_STATUS[status])


@dataclass(frozen=True)
class Facts:
    """The facts that the state of an agent follows from.

    `open` is the status of the deployment that has not ended; `ended` and `outcome` are of the last
    one that succeeded or failed.
    """

    has_connected: bool
    connected: bool
    paused: bool = False
    open: str | None = None
    is_lost: bool = False
    ended: str | None = None
    outcome: str | None = None
    running: str | None = None
    deployed: str | None = None
    needs_reboot: bool = False
    by_hand: str | None = None  # a key of HANDS, if what runs was run at the machine
    runs_test: bool = False


def of_agent(facts: Facts) -> State:
    """The state of an agent: what is most in need of a look.

    A deployment that is under way counts more than how the former one ended.
    """
    if facts.open == IN_PROGRESS:
        return LOST if facts.is_lost else UNDER_WAY
    if facts.ended == FAILED:
        is_broken = facts.outcome == "rollback-failed"
        is_retried = facts.open is not None and facts.connected and not facts.paused
        return UNDER_WAY if is_retried else ROLLBACK_FAILED if is_broken else FAILED_STATE
    if not facts.connected:
        return OFFLINE if facts.has_connected else NEVER
    if facts.open is not None and not facts.paused:
        return UNDER_WAY
    if facts.runs_test:
        return TESTED
    waits_for_boot = facts.needs_reboot and facts.outcome in (REBOOT.key, DRY_RUN.key)
    if facts.running and facts.deployed and facts.running != facts.deployed and not waits_for_boot:
        return replace(BY_HAND, word=HANDS.get(facts.by_hand or "", BY_HAND.word))
    return REBOOT if facts.needs_reboot else WELL
