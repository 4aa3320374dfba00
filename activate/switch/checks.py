"""Checks of a new system: the rollback script, its units, the workspace, an agent."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
from typing import Optional, Protocol

from activate import cancellation, lock, machine
from activate.kinds import verdict
from activate.pipe import Reach
from activate.process import CommandFailed, Error, Log, Run, ask, say
from activate.switch.progress import Progress

ATTEMPT = 20.0  # seconds for one look at the workspace
PAUSE = 1.0  # seconds between two looks


class Network(Protocol):
    """Looks at the workspace, see cachix_switch.py."""

    def load(self) -> None:
        """Load all that `reach` needs."""

    def look_ahead(self, timeout: float) -> None:
        """Begin to look once, as `reach` will."""

    def reach(self, timeout: float) -> None:
        """Look once. Raises Error."""


def run_script(script: Optional[str], run: Run) -> None:
    """Run the rollback script, which checks that the machine works. Raises Error if it fails."""
    if script is not None and (status := run([script])):
        raise Error(f"the rollback script {script} ended with status {status}")


def units_recovered(names: list[str], pause: float, stop: threading.Event, log: Log) -> bool:
    """Whether failed units have recovered after a pause, in which systemd may restart them."""
    say(log, f"some units failed, looking again in {pause:.0f} s: {' '.join(names)}")
    stop.wait(pause)
    with contextlib.suppress(CommandFailed):
        states = ask(["systemctl", "is-active", *names], 30)[1].split() if names else []
        say(log, f"they are now: {' '.join(states)}")
        return verdict.recovered(names, states)
    return False


def confirm(progress: Progress, reach: Reach, since: float) -> None:
    """Check that the workspace can be reached, and that a lost agent has come back. Raises Error.

    By hand, there may be no workspace, and no agent comes back. `since` is the start of the
    activation, in seconds since 1970.
    """
    record = progress.journal.record
    if not record.needs_workspace:
        return
    deadline = time.monotonic() + progress.policy.confirm_timeout
    _wait_for_workspace(progress, reach, deadline)
    if not record.by_hand and not progress.stop.is_set() and progress.agent.was_lost():
        _wait_for_agent(progress, since, deadline)


def confirm_boot(progress: Progress, reach: Reach) -> None:
    """Check that the workspace can be reached after a reboot. Raises Error."""
    if progress.journal.record.needs_workspace:
        deadline = time.monotonic() + progress.policy.confirm_timeout
        _wait_for_workspace(progress, reach, deadline, "reboot")


def patience(policy: verdict.Policy) -> float:
    """Seconds for one look at the workspace: there is time for at least four."""
    return min(ATTEMPT, policy.confirm_timeout / 4)


def _wait_for_workspace(
    progress: Progress, reach: Reach, deadline: float, event: str = "activation"
) -> None:
    """Look at the workspace until it can be reached. Raises Error at the deadline."""
    timeout, problem = progress.policy.confirm_timeout, ""
    while not progress.stop.is_set():
        cancellation.check(progress.journal)
        left = deadline - time.monotonic()
        if left <= 0:
            duration = f"{timeout:.0f} s after the {event}"
            raise Error(f"the workspace could not be reached for {duration}: {problem}")
        last = problem
        problem = _look(reach, min(patience(progress.policy), left))
        if not problem:
            return
        if problem != last:
            say(progress.log, f"the workspace can't be reached: {problem}")
        progress.stop.wait(min(PAUSE, max(0.0, deadline - time.monotonic())))


def _look(reach: Reach, timeout: float) -> str:
    """Look once; the problem, if any. In a thread, because a name look-up has no deadline."""
    problems: list[str] = []

    def look() -> None:
        try:
            reach(timeout)
            problems.append("")
        except Exception as error:  # the network may have any problem, and recover from it
            problems.append(str(error) or type(error).__name__)

    thread = threading.Thread(target=look, name="reach", daemon=True)
    thread.start()
    thread.join(timeout + 1)
    return problems[0] if problems else f"no answer within {timeout:.0f} s"


def _wait_for_agent(progress: Progress, since: float, deadline: float) -> None:
    """Wait until an agent has registered. Raises Error at the deadline."""
    entry, boot, lost = progress.journal, machine.boot_id(), progress.agent.pid
    say(progress.log, "the agent ended during the activation, waiting for one to register")
    while not registered_since(entry.state, since, boot, lost) and not progress.stop.is_set():
        if time.monotonic() > deadline:
            if lock.held(lock.shared_path("agent", entry.record.agent)):
                return  # held by Cachix's own agent, which leaves no other trace
            timeout = f"{progress.policy.confirm_timeout:.0f} s"
            raise Error(f"no agent came back within {timeout} after the activation")
        cancellation.check(progress.journal)
        progress.stop.wait(0.2)


def registered_since(state: str, moment: float, boot: str, lost: int) -> bool:
    """Whether an agent of this state directory has registered after `moment`, in this boot.

    `lost` is the PID of the agent that does not count.
    """
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = [name for name in os.listdir(state) if re.fullmatch(r"registered-.*\.json", name)]
    for name in names:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            with open(os.path.join(state, name), encoding="utf-8") as file:
                mark = json.load(file)
            if mark["time"] >= moment and mark["boot_id"] == boot and mark["pid"] != lost:
                return True
    return False
