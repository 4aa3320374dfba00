"""The agent as its switch process sees it: the two ends of a pipe, and whether it is still there in the end."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import select
import threading
import time
from typing import Callable, Optional

from activate import journal, lock, machine, verdict
from activate.process import CommandFailed, Error, Run, ask, say

LOOK, BEGIN = "look", "begin"  # what the agent is asked: reach the workspace; is the deployment still wanted
START_TIMEOUT = 12 * 3600.0  # seconds from the start of the process to "go": the longest download and more
LINE_BYTES = 4000  # less than what a pipe takes in one piece
ATTEMPT = 20.0
PAUSE = 1.0
Reach = Callable[[float], None]  # raises an exception where the workspace can't be reached within so many seconds


class Agent:
    """The agent that started this process. It writes lines: settings, "go", and "bye" before it ends at will."""

    def __init__(self, reads: int, writes: int) -> None:
        self.reads, self.writes, self.pid = reads, writes, os.getppid()
        self.text = b""
        self.ended = self.left = False  # its end of the pipe is closed; it has said that it leaves
        self.asked = 0
        self.answers: dict[str, str] = {}

    def line(self, timeout: float) -> Optional[str]:
        """The next line; None where the agent has ended, or says nothing for `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self.text and not self.ended:
            if not select.select([self.reads], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            said = os.read(self.reads, 1 << 16)
            self.text += said
            self.ended = not said
        line, newline, rest = self.text.partition(b"\n")
        if not newline:
            return None
        self.text = rest
        return line.decode()

    def tell(self, what: str) -> None:
        """Say what happens; nobody has to listen."""
        with contextlib.suppress(OSError):
            os.write(self.writes, what.encode("utf-8", "replace")[:LINE_BYTES] + b"\n")

    def hear(self, timeout: float) -> bool:
        """Whether the agent said something within `timeout` seconds: an answer to `asks`, or that it leaves."""
        said = self.line(timeout)
        if said == "bye":
            self.left = True
        elif said is not None:
            number, _, problem = said.partition(" ")
            self.answers[number] = problem
        return said is not None

    def asks(self, what: str, timeout: float) -> Optional[str]:
        """What the agent answers; None where it has ended or leaves. Raises Error where it says nothing in time."""
        self.asked += 1
        number, deadline = str(self.asked), time.monotonic() + timeout
        self.tell(f"ask {number} {what}")
        while number not in self.answers and not self.left:
            if not self.hear(max(0.0, deadline - time.monotonic())):
                if self.ended:
                    return None
                raise Error(f"the agent found out nothing within {timeout:.0f} s")
        return self.answers.get(number)

    def is_there(self) -> bool:
        """Whether the agent has not ended."""
        while self.hear(0):
            pass
        return not self.ended

    def was_lost(self) -> bool:
        """Whether the agent has ended, and not by its own will."""
        return not self.is_there() and not self.left


def registered_since(state: str, moment: float, boot: str, lost: int) -> bool:
    """Whether an agent of this state directory other than the lost one has registered after `moment`, in this boot."""
    for path in glob.glob(os.path.join(glob.escape(state), "registered-*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            with open(path, encoding="utf-8") as file:
                said = json.load(file)
            if said["time"] >= moment and said["boot_id"] == boot and said["pid"] != lost:
                return True
    return False


def run_script(script: Optional[str], run: Run) -> None:
    """Let the rollback script look whether the machine is well. Raises Error where it is not."""
    if script is not None and (status := run([script])):
        raise Error(f"the rollback script {script} ended with status {status}")


def units_recovered(names: list[str], pause: float, stop: threading.Event, log: int) -> bool:
    """Look at failed units once more, after a while: a restart may have brought them up."""
    say(log, f"some units failed, looking again in {pause:.0f} s: {' '.join(names)}")
    stop.wait(pause)
    with contextlib.suppress(CommandFailed):
        states = ask(["systemctl", "is-active", *names], 30)[1].split() if names else []
        say(log, f"they are now: {' '.join(states)}")
        return verdict.recovered(names, states)
    return False


def attempt(reach: Reach, timeout: float) -> Optional[str]:
    """Try `reach`; what was wrong, or None. In a thread of its own, as a name look-up can't be told to hurry."""
    said: list[Optional[str]] = []

    def look() -> None:
        try:
            reach(timeout)
            said.append(None)
        except Exception as error:  # whatever is wrong with the network, the next attempt may succeed
            said.append(str(error) or type(error).__name__)

    thread = threading.Thread(target=look, name="reach", daemon=True)
    thread.start()
    thread.join(timeout + 1)
    return said[0] if said else f"no answer within {timeout:.0f} s"


def confirm(
    entry: journal.Journal, agent: Agent, reach: Reach, timeout: float, stop: threading.Event, log: int, since: float
) -> None:
    """See that the workspace can be reached from here, and that an agent is back where it was lost.

    `since` is when the activation began, in seconds since 1970. Raises Error.
    """
    deadline = time.monotonic() + timeout
    problem: Optional[str] = ""
    while problem is not None and not stop.is_set():
        left = deadline - time.monotonic()
        if left <= 0:
            raise Error(f"the workspace could not be reached for {timeout:.0f} s after the activation: {problem}")
        said = attempt(reach, min(ATTEMPT, timeout / 4, left))  # one lost connection must not cost all of the time
        if said is not None and said != problem:
            say(log, f"the workspace can't be reached: {said}")
        problem = said
        if problem is not None:
            stop.wait(min(PAUSE, max(0.0, deadline - time.monotonic())))
    state, boot = os.path.dirname(os.path.dirname(entry.directory)), machine.boot_id()
    if stop.is_set() or not agent.was_lost():
        return
    say(log, "the agent ended during the activation, waiting for one to register")
    while not registered_since(state, since, boot, agent.pid) and not stop.is_set():
        if time.monotonic() > deadline:
            if lock.held(lock.shared_path("agent", entry.record.agent)):
                return  # another program holds the agent's lock: Cachix's own agent leaves no other trace
            raise Error(f"no agent came back within {timeout:.0f} s after the activation")
        stop.wait(0.2)
