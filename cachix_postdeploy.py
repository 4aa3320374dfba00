"""The post-deployment command of an agent: run once for each result, whatever that is.

A file beside the journal, made durably before the command starts, says that it has begun: so it is
not repeated, also where a crash has ended it. A result without that file is one that it is still to
run for, also by the next agent.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from typing import Any, Callable, Optional

from activate import files, history, journal, leftovers, outcomes, process
from cachix_protocol import Error

NOTE, OUTPUT = "post-deploy.json", "post-deploy.log"  # in a deployment's directory
MARK = "post-deploy.mark"  # of the process, see `leftovers`
TIMEOUT = 300.0  # seconds; the next deployment waits for it
PREFIX = "CACHIX_DEPLOY_"


class PostDeploy:
    """Runs the command `path` of the agent `name` for the results in `state`."""

    def __init__(
        self, path: Optional[str], state: str, name: str, tell: Callable[[str], None]
    ) -> None:
        self.path, self.state, self.name, self.tell = path, state, name, tell
        self.stop, self.timeout = threading.Event(), TIMEOUT
        self.since: Optional[int] = None  # the first of the results that count

    def begin(self) -> None:
        """Note from which result on it runs: not for those from before it was given."""
        file = os.path.join(self.state, f"post-deploy-{self.name}.json")
        if self.path is None:
            with contextlib.suppress(OSError):
                os.unlink(file)
            return
        self.since = _load(file).get("since")
        if not isinstance(self.since, int):
            self.since = history.next_sequence(history.load_all(self.state)[0])
            _write(file, {"since": self.since})
        self.end_interrupted()

    def run_due(self) -> None:
        """Run it for each result that it has not begun for."""
        if self.path is None or self.since is None:
            return
        for entry in history.load_all(self.state)[0]:
            record = entry.record
            is_mine = record.agent == self.name and record.sequence >= self.since
            if is_mine and record.step in journal.FINAL and not self.stop.is_set():
                self.run(entry)

    def end_interrupted(self) -> None:
        """End commands that a killed agent has left running: nobody limits their time."""
        for entry in history.load_all(self.state)[0]:
            note = _load(entry.path(NOTE))
            if entry.record.agent == self.name and "begun" in note and "ended" not in note:
                self.tell(
                    f"{outcomes.title(entry.record)}: its post-deployment command was cut off"
                )
                with contextlib.suppress(OSError), open(entry.path(MARK), "rb") as mark:
                    leftovers.end_marked(mark.fileno(), _open(entry.path(OUTPUT)), self.timeout)
                _write(entry.path(NOTE), {**note, "ended": time.time(), "status": None})

    def run(self, entry: journal.Journal) -> None:
        """Run it for a result, unless it has begun for that."""
        if not _claim(entry.path(NOTE)):
            return
        title, began = outcomes.title(entry.record), time.time()
        log, mark = _open(entry.path(OUTPUT)), _open(entry.path(MARK), os.O_RDWR | os.O_CREAT)
        try:
            argv = ["env", *variables(entry.record), str(self.path)]
            status = process.run(argv, log, self.timeout, before=leftovers.marker(mark))
            problem = f"ended with status {status}" if status else ""
        except Error as error:
            status, problem = -1, f"failed: {str(error)[-300:]}"
        finally:
            os.close(log)
            os.close(mark)
        if problem:
            self.tell(
                f"{title}: the post-deployment command {problem}; its output: {entry.path(OUTPUT)}"
            )
        _write(entry.path(NOTE), {"begun": began, "ended": time.time(), "status": status})


def variables(record: journal.Record) -> list[str]:
    """What the command learns of a result, as NAME=VALUE."""
    facts = {
        "OUTCOME": outcomes.of(record) or record.step,
        "STEP": record.step,
        "AGENT": record.agent,
        "DEPLOYMENT": record.id,
        "INDEX": str(record.index or ""),
        "BY_HAND": record.by_hand,
        "WORKSPACE": record.host,
        "KIND": record.kind,
        "PROFILE": record.profile,
        "OPERATION": record.operation,
        "STORE_PATH": record.store_path,
        "PREVIOUS_PATH": record.previous_running,
        "REASON": outcomes.reason_of(record),
    }
    return [f"{PREFIX}{name}={value or ''}" for name, value in facts.items()]


def _claim(path: str) -> bool:
    """Whether this process is the one that begins. Without a durable note nobody begins."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError:
        return False
    try:
        os.write(fd, json.dumps({"begun": time.time()}).encode())
        os.fsync(fd)
        files.sync_directory(os.path.dirname(path))
        return True
    except OSError:  # the disk is full: another try comes
        with contextlib.suppress(OSError):
            os.unlink(path)
        return False
    finally:
        os.close(fd)


def _write(path: str, content: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        files.write_durably(path, json.dumps(content).encode())


def _open(path: str, flags: int = os.O_WRONLY | os.O_CREAT | os.O_APPEND) -> int:
    """Open a file that only this user can read, or /dev/null if that fails."""
    try:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)


def _load(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read(1 << 12))
            return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}
