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

from activate import journal, lock
from activate.process import Error, say

START_TIMEOUT = 12 * 3600.0  # seconds from the start of the process to "go": the longest download and more
ATTEMPT = 20.0
PAUSE = 1.0
Reach = Callable[[float], None]  # raises an exception where the workspace can't be reached within so many seconds


class Agent:
    """The agent that started this process. It writes lines: settings, "go", and "bye" before it ends at will."""

    def __init__(self, reads: int, writes: int) -> None:
        self.reads, self.writes = reads, writes
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

    def tell(self, step: str) -> None:
        """Say what happens; nobody has to listen."""
        with contextlib.suppress(OSError):
            os.write(self.writes, f"{step}\n".encode())

    def hear(self, timeout: float) -> bool:
        """Whether the agent said something within `timeout` seconds: an answer to `looks`, or that it leaves."""
        said = self.line(timeout)
        if said == "bye":
            self.left = True
        elif said is not None:
            number, _, problem = said.partition(" ")
            self.answers[number] = problem
        return said is not None

    def looks(self, timeout: float) -> bool:
        """Let the agent look at the workspace; False where there is no agent any more. Raises Error."""
        self.asked += 1
        number, deadline = str(self.asked), time.monotonic() + timeout
        self.tell(f"look {number} {timeout}")
        while number not in self.answers and not self.left:
            if not self.hear(max(0.0, deadline - time.monotonic())):
                if self.ended:
                    return False
                raise Error(f"the agent found out nothing within {timeout:.0f} s")
        if self.answers.get(number):
            raise Error(self.answers[number])
        return number in self.answers

    def was_lost(self) -> bool:
        """Whether the agent has ended, and not by its own will."""
        while self.hear(0):
            pass
        return self.ended and not self.left


def registered_since(state: str, moment: float, boot: str) -> bool:
    """Whether an agent of this state directory has registered after `moment`, in this boot."""
    for path in glob.glob(os.path.join(glob.escape(state), "registered-*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            with open(path, encoding="utf-8") as file:
                said = json.load(file)
            if said["time"] >= moment and said["boot_id"] == boot:
                return True
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
    entry: journal.Journal, agent: Agent, reach: Reach, timeout: float, stop: threading.Event, log: int
) -> None:
    """See that the workspace can be reached from here, and that an agent is back where it was lost. Raises Error."""
    deadline = time.monotonic() + timeout
    problem: Optional[str] = ""
    while problem is not None and not stop.is_set():
        left = deadline - time.monotonic()
        if left <= 0:
            raise Error(f"the workspace could not be reached for {timeout:.0f} s after the activation: {problem}")
        said = attempt(reach, min(ATTEMPT, left))
        if said is not None and said != problem:
            say(log, f"the workspace can't be reached: {said}")
        problem = said
        if problem is not None:
            stop.wait(min(PAUSE, max(0.0, deadline - time.monotonic())))
    state = os.path.dirname(os.path.dirname(entry.directory))
    record = entry.record
    if stop.is_set() or not agent.was_lost():
        return
    say(log, "the agent ended during the activation, waiting for one to register")
    while not registered_since(state, record.times[journal.ACTIVATING], record.boot_id) and not stop.is_set():
        if time.monotonic() > deadline:
            if lock.held(lock.shared_path("agent", record.agent)):
                return  # another program holds the agent's lock: Cachix's own agent leaves no other trace
            raise Error(f"no agent came back within {timeout:.0f} s after the activation")
        stop.wait(0.2)
