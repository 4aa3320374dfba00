"""The durable record of a deployment.

`Journal.enter` is the only way from step to step: it writes before the step has any effect.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from dataclasses import dataclass, field
from typing import Any, Optional

from activate.environment import given_state, state_home
from activate.files import write_durably
from activate.process import Error

VERSION = 2  # increase it with every new key
NEVER = 1 << 30  # for a key that may be missing
# the version that brought a key; all others are as old as VERSION 1
ADDED = {"sequence": 2, "outcome": NEVER, "confirmed": NEVER, "signature": NEVER}
RECEIVED, DOWNLOADING, READY = "received", "downloading", "ready"
ACTIVATING, CHECKING, COMMITTING = "activating", "checking", "committing"
ROLLING_BACK, ROLLED_BACK, ROLLBACK_FAILED = "rolling-back", "rolled-back", "rollback-failed"
SUCCEEDED, FAILED, CANCELLED, SUPERSEDED = "succeeded", "failed", "cancelled", "superseded"
HARMLESS = frozenset({RECEIVED, DOWNLOADING, READY})  # nothing on the machine was changed
EFFECTS = frozenset({ACTIVATING, COMMITTING, ROLLING_BACK})  # they change the machine
FINAL = frozenset({SUCCEEDED, ROLLED_BACK, ROLLBACK_FAILED, FAILED, CANCELLED, SUPERSEDED})
STEPS = HARMLESS | EFFECTS | FINAL | {CHECKING}
SET_ASIDE = ".unreadable-"


class Unreadable(Error):
    """A journal with nothing in it that can be relied on."""


@dataclass(frozen=True)
class Record:
    """The content of a journal.

    Paths are absolute, `times` has the seconds since 1970 at which each step was entered,
    `log_size` is the end of the log in bytes. `attempts` counts the attempts at the present step,
    `revision` all entries ever made. `sequence` orders the deployments, see `history`; it is 0 in
    a journal of VERSION 1. `outcome` is set where the step alone does not tell it. `confirmed` is
    the deployment that was the last to be confirmed before this one, see `holder`.
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
    times: dict[str, float] = field(default_factory=dict)
    log_size: Optional[int] = None
    version: int = VERSION
    unknown: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: bytes) -> Record:
        """Read a journal of any version. Unknown keys are kept. Raises Unreadable."""
        try:
            values = json.loads(text)
            names = {f.name for f in dataclasses.fields(cls)} - {"unknown"}
            known = {name: values[name] for name in names if name in values}
            record = cls(**{**known, "rooted": tuple(known.get("rooted", ()))})
            unknown = {name: value for name, value in values.items() if name not in names}
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise Unreadable(f"not a journal ({error})") from None
        version = record.version if "version" in values else 0
        if not record.is_valid():
            raise Unreadable("not a journal (a value is of the wrong type)")
        needed = {name for name in names if ADDED.get(name, 1) <= version <= VERSION}
        if needed - set(values):
            raise Unreadable("not a journal (a key is missing)")
        return dataclasses.replace(record, unknown=unknown)

    def is_valid(self) -> bool:
        """Whether the values are of the right types, and the step is known."""
        texts = (self.id, self.agent, self.host, self.store_path, self.step, self.boot_id)
        paths = (self.rollback_script, self.profile, self.previous_running, self.previous_profile)
        numbers = (self.index, self.attempts, self.revision, self.sequence, self.version)
        optional = (*paths, self.outcome, self.confirmed)
        return (
            all(isinstance(text, str) for text in texts)
            and all(text is None or isinstance(text, str) for text in optional)
            and all(type(number) is int for number in numbers)
            and self.step in STEPS
            and isinstance(self.times, dict)
            and all(isinstance(moment, (int, float)) for moment in self.times.values())
        )

    def to_json(self) -> bytes:
        """The content of the file."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return json.dumps({**values.pop("unknown"), **values}, indent=1).encode()


class Journal:
    """A deployment's journal. Only the holder of its deployment lock writes it."""

    def __init__(self, directory: str, record: Record) -> None:
        self.directory = directory
        self.record = record

    @property
    def state(self) -> str:
        """The state directory that this deployment is in."""
        return os.path.dirname(os.path.dirname(self.directory))

    def path(self, name: str) -> str:
        """A file of this deployment: its log, reported.json, a GC root."""
        return os.path.join(self.directory, name)

    def enter(self, step: str, **facts: Any) -> None:
        """Record that `step` is starting. Callers must not act before this returns. Raises OSError.

        The first time in a step with effects starts a new count of attempts. Only the first time:
        otherwise a commit that is checked again each time would have no limit.
        """
        if step not in self.record.times and step in EFFECTS:
            facts.setdefault("attempts", 0)
        times = {**self.record.times, step: time.time()}
        facts["revision"] = self.record.revision + 1
        self.record = dataclasses.replace(self.record, step=step, times=times, **facts)
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        write_durably(self.path("journal.json"), self.record.to_json())

    def reload(self) -> None:
        """Read the record of another process, unless this one knows more than it could write.

        An end is final, however much this process has written before it knew of that.
        """
        with contextlib.suppress(Error):
            on_disk = load(self.directory)
            if on_disk is None:
                return
            has_ended = on_disk.record.step in FINAL and self.record.step not in FINAL
            if has_ended or on_disk.record.revision >= self.record.revision:
                self.record = on_disk.record

    def drop_roots(self) -> None:
        """Remove the GC roots of a deployment that has ended.

        After a failed rollback they are still needed; otherwise the profile keeps what is needed.
        """
        if self.record.step == ROLLBACK_FAILED:
            return
        with contextlib.suppress(OSError):
            for name in os.listdir(self.directory):
                if os.path.islink(self.path(name)):
                    os.unlink(self.path(name))


def load(directory: str) -> Optional[Journal]:
    """The journal in a deployment's directory; None if there is none.

    Raises Unreadable. A file that is not a journal is set aside before; one that can't be opened
    stays.
    """
    path = os.path.join(directory, "journal.json")
    try:
        with open(path, "rb") as file:
            return Journal(directory, Record.from_json(file.read(1 << 22)))
    except FileNotFoundError:
        return None
    except (IsADirectoryError, Unreadable) as error:
        with contextlib.suppress(OSError):
            os.rename(path, f"{path}{SET_ASIDE}{time.time_ns()}")
        raise Unreadable(f"{path} can't be read and was set aside: {error}") from None
    except OSError as error:
        raise Unreadable(f"{path} can't be read: {error}") from None


def state_directory() -> str:
    """The directory for state: $STATE_DIRECTORY, or root's own, or below $XDG_STATE_HOME."""
    if given_state():
        return given_state()
    if os.geteuid() == 0:
        return "/var/lib/cachix-deploy"
    return os.path.join(state_home(), "cachix-deploy")
