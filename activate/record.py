"""The content of a journal: the steps of a deployment, and its facts."""

from __future__ import annotations

import json
from typing import Any, Optional

from activate.operation import DRY_ACTIVATE, LASTING, NEVER, OPERATIONS, REBOOTS, SWITCH
from activate.process import Error
from activate.values import dataclass, field, names, replace

VERSION = 2  # increase it with every new key
OPTIONAL = 1 << 30  # for a key that may be missing
# the version that brought a key; all others are as old as VERSION 1
ADDED = {"sequence": 2}
ADDED.update(dict.fromkeys(("operation", "reboot", "reboots"), OPTIONAL))
ADDED.update(
    dict.fromkeys(("outcome", "confirmed", "signature", "by_hand", "needs_workspace"), OPTIONAL)
)
RECEIVED, DOWNLOADING, READY = "received", "downloading", "ready"
ACTIVATING, CHECKING, COMMITTING = "activating", "checking", "committing"
AWAITING_REBOOT, REBOOTING = (
    "awaiting-reboot",
    "rebooting",
)  # after the commit, if a reboot is wanted
ROLLING_BACK, ROLLED_BACK, ROLLBACK_FAILED = "rolling-back", "rolled-back", "rollback-failed"
SUCCEEDED, FAILED, CANCELLED, SUPERSEDED = "succeeded", "failed", "cancelled", "superseded"
HARMLESS = frozenset({RECEIVED, DOWNLOADING, READY})  # nothing on the machine was changed
EFFECTS = frozenset({ACTIVATING, COMMITTING, REBOOTING, ROLLING_BACK})  # they change the machine
FINAL = frozenset({SUCCEEDED, ROLLED_BACK, ROLLBACK_FAILED, FAILED, CANCELLED, SUPERSEDED})
STEPS = HARMLESS | EFFECTS | FINAL | {CHECKING, AWAITING_REBOOT}
SET_ASIDE = ".unreadable-"
HIDDEN_ROOTS = "rooted-for-an-operation"  # in place of `rooted`
ROLLBACK, ACTIVATION = "rollback", "activation"  # by hand


class Unreadable(Error):
    """A journal with nothing in it that can be relied on."""


@dataclass(frozen=True)
class Record:
    """The content of a journal.

    Paths are absolute, `times` has the seconds since 1970 at which each step was entered,
    `log_size` is the end of the log in bytes. `attempts` counts the attempts at the present step,
    `revision` all entries ever made. `sequence` orders the deployments, see `history`; it is 0 in
    a journal of VERSION 1. `outcome` is set where the step alone does not tell it. `confirmed` is
    the deployment that was the last to be confirmed before this one, see `holder`. `by_hand` is
    ROLLBACK or ACTIVATION if no workspace ordered it: then `host` is empty. `reboots` counts those
    that were asked for: the first to the new system, the second back.
    """

    id: str
    index: int
    agent: str
    host: str
    store_path: str
    rollback_script: Optional[str] = None
    profile_name: Optional[str] = None
    kind: Optional[str] = None
    profile: Optional[str] = None
    previous_running: Optional[str] = None
    previous_profile: Optional[str] = None
    previous_generation: Optional[int] = None
    rooted: tuple[str, ...] = ()
    boot_id: str = ""
    step: str = RECEIVED
    attempts: int = 0
    revision: int = 0
    sequence: int = 0
    reason: Optional[str] = None
    detail: Optional[str] = None
    outcome: Optional[str] = None
    confirmed: Optional[str] = None
    signature: Any = None  # as it was received: see cachix_gate
    by_hand: Optional[str] = None
    needs_workspace: bool = True
    operation: str = SWITCH
    reboot: str = NEVER
    reboots: int = 0
    times: dict[str, float] = field(default_factory=dict)
    log_size: Optional[int] = None
    version: int = VERSION
    unknown: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: bytes) -> Record:
        """Read a journal of any version. Unknown keys are kept. Raises Unreadable."""
        try:
            values = dict(json.loads(text))
            own = set(names(cls)) - {"unknown"}
            known = {name: values[name] for name in own if name in values}
            roots = values.pop(HIDDEN_ROOTS, known.get("rooted", ()))
            record = cls(**{**known, "rooted": tuple(roots)})
            unknown = {name: value for name, value in values.items() if name not in own}
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise Unreadable(f"not a journal ({error})") from None
        version = record.version if "version" in values else 0
        if not record.is_valid():
            raise Unreadable("not a journal (a value is of the wrong type)")
        needed = {name for name in own if ADDED.get(name, 1) <= version <= VERSION}
        if needed - set(values):
            raise Unreadable("not a journal (a key is missing)")
        return replace(record, unknown=unknown)

    def is_valid(self) -> bool:
        """Whether the values are of the right types, and the step is known."""
        texts = (self.id, self.agent, self.host, self.store_path, self.step, self.boot_id)
        paths = (self.rollback_script, self.profile, self.previous_running, self.previous_profile)
        numbers = [self.index, self.attempts, self.revision, self.sequence, self.version]
        numbers.append(self.reboots)
        optional = (*paths, self.outcome, self.confirmed, self.by_hand)
        return (
            all(isinstance(text, str) for text in texts)
            and all(text is None or isinstance(text, str) for text in optional)
            and all(type(number) is int for number in numbers)
            and self.step in STEPS
            and type(self.needs_workspace) is bool
            and self.operation in OPERATIONS
            and self.reboot in REBOOTS
            and isinstance(self.times, dict)
            and all(isinstance(moment, (int, float)) for moment in self.times.values())
        )

    @property
    def is_confirmed(self) -> bool:
        """Whether its path passed all checks and is the one that boots."""
        return self.step == SUCCEEDED and self.operation in LASTING

    @property
    def settles(self) -> bool:
        """Whether it has left the machine on a system that passed, if only until the next boot."""
        return self.step == SUCCEEDED and self.operation != DRY_ACTIVATE

    def to_json(self) -> bytes:
        """The content of the file."""
        values = {name: getattr(self, name) for name in names(type(self))}
        is_plain = (self.operation, self.reboot) == (SWITCH, NEVER)
        if self.step in HARMLESS and not is_plain:  # an older agent would switch: it reads nothing
            values[HIDDEN_ROOTS], values["rooted"] = values["rooted"], None
        return json.dumps({**values.pop("unknown"), **values}, indent=1).encode()
