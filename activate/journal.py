"""The durable record of a deployment. `Journal.enter` is the only way on: it writes before the step's effect."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Optional

from activate.files import write_durably
from activate.process import Error, xdg

VERSION = 1  # a key that is added takes a new one
RECEIVED, DOWNLOADING, READY = "received", "downloading", "ready"
ACTIVATING, CHECKING, COMMITTING, ROLLING_BACK = (
    "activating",
    "checking",
    "committing",
    "rolling-back",
)
SUCCEEDED, ROLLED_BACK, ROLLBACK_FAILED = "succeeded", "rolled-back", "rollback-failed"
FAILED, CANCELLED, SUPERSEDED = "failed", "cancelled", "superseded"
HARMLESS = frozenset({RECEIVED, DOWNLOADING, READY})  # nothing on the machine was changed
FINAL = frozenset({SUCCEEDED, ROLLED_BACK, ROLLBACK_FAILED, FAILED, CANCELLED, SUPERSEDED})
STEPS = HARMLESS | FINAL | {ACTIVATING, CHECKING, COMMITTING, ROLLING_BACK}
SET_ASIDE = ".unreadable-"


class Unreadable(Error):
    """A journal that says nothing that can be relied on."""


@dataclass(frozen=True)
class Record:
    """What a journal says. Paths are absolute, times seconds since 1970, `log_size` is where the log ends, in bytes.

    `attempts` counts those to take the present step, `revision` all that was ever entered.
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
    reason: Optional[str] = None
    detail: Optional[str] = None
    times: dict[str, float] = field(default_factory=dict)
    log_size: Optional[int] = None
    version: int = VERSION
    unknown: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: bytes) -> Record:
        """Known keys are read, whatever version wrote them, unknown ones are kept. Raises Unreadable."""
        try:
            read = json.loads(text)
            names = {f.name for f in dataclasses.fields(cls)} - {"unknown"}
            known = {name: read[name] for name in names if name in read}
            record = cls(**{**known, "rooted": tuple(known.get("rooted", ()))})
            unknown = {name: value for name, value in read.items() if name not in names}
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise Unreadable(f"not a journal ({error})") from None
        texts = (
            record.id,
            record.agent,
            record.host,
            record.store_path,
            record.step,
            record.boot_id,
        )
        optional = (
            record.rollback_script,
            record.profile,
            record.previous_running,
            record.previous_profile,
        )
        valid = all(isinstance(text, str) for text in texts) and all(
            isinstance(t, (str, type(None))) for t in optional
        )
        valid = valid and all(
            type(number) is int for number in (record.index, record.attempts, record.revision)
        )
        lacks = read.get("version") == VERSION and names - set(read)
        if lacks or not valid or record.step not in STEPS or not _times(record.times):
            raise Unreadable("not a journal (a value is of the wrong type, or a key is missing)")
        return dataclasses.replace(record, unknown=unknown)

    def to_json(self) -> bytes:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return json.dumps({**values.pop("unknown"), **values}, indent=1).encode()


def _times(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(moment, (int, float)) for moment in value.values()
    )


class Journal:
    """A deployment's journal, written only by who holds its deployment lock."""

    def __init__(self, directory: str, record: Record) -> None:
        self.directory = directory
        self.record = record

    def path(self, name: str) -> str:
        """A file of this deployment: log, reported.json, a GC root."""
        return os.path.join(self.directory, name)

    def enter(self, step: str, **facts: Any) -> None:
        """Write that `step` begins, and what is known by now; only then may its effect be had. Raises OSError."""
        if step not in self.record.times and step in (ACTIVATING, COMMITTING, ROLLING_BACK):
            facts.setdefault(
                "attempts", 0
            )  # only then: a commit that is checked anew each time is bounded too
        times = {**self.record.times, step: time.time()}
        facts["revision"] = self.record.revision + 1
        self.record = dataclasses.replace(self.record, step=step, times=times, **facts)
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        write_durably(self.path("journal.json"), self.record.to_json())

    def reload(self) -> None:
        """Read what another process has written, unless more is known already than could be written."""
        with contextlib.suppress(Error):
            found = load(self.directory)
            if found is not None and found.record.revision >= self.record.revision:
                self.record = found.record

    def drop_roots(self) -> None:
        """Let the garbage collector have what this deployment kept for itself: by now the profile keeps what counts."""
        with contextlib.suppress(OSError):
            for name in os.listdir(self.directory):
                if os.path.islink(self.path(name)):
                    os.unlink(self.path(name))


def state_directory() -> str:
    """Where state lives: $STATE_DIRECTORY (systemd may name several: the first), root's own place, or the user's."""
    given = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    if given.startswith("/"):
        return given
    if os.geteuid() == 0:
        return "/var/lib/cachix-deploy"
    return os.path.join(xdg("XDG_STATE_HOME", ".local/state"), "cachix-deploy")


def load(directory: str) -> Optional[Journal]:
    """The journal of a deployment's directory; None where there is none.

    Raises Unreadable: what is no journal was set aside then, what could not be looked at stays.
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


def was_set_aside(directory: str) -> bool:
    """Whether a deployment was begun here whose journal is lost."""
    with contextlib.suppress(OSError):
        return any(SET_ASIDE in name for name in os.listdir(directory))
    return False


def load_all(state: str) -> tuple[list[Journal], list[str]]:
    """All journals, oldest first, and a sentence for each that can't be read."""
    journals, problems = [], []
    root = os.path.join(state, "deployments")
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(root)):
            try:
                found = load(os.path.join(root, name))
            except Error as error:
                problems.append(str(error))
                continue
            if found is not None:
                journals.append(found)
    return sorted(journals, key=lambda found: found.record.times.get(RECEIVED, 0.0)), problems


def newest_first(state: str) -> Iterator[Journal]:
    """The journals that can be read, those first that were written last."""
    root = os.path.join(state, "deployments")
    written: list[tuple[float, str]] = []
    with contextlib.suppress(OSError):
        for name in os.listdir(root):
            with contextlib.suppress(OSError):
                written.append((os.stat(os.path.join(root, name, "journal.json")).st_mtime, name))
    for _, name in sorted(written, reverse=True):
        with contextlib.suppress(Error):
            found = load(os.path.join(root, name))
            if found is not None:
                yield found
