"""The pipe between an agent and its switch process: both ends, and every word on it.

to the switch process   CONFIG (JSON), "go ACTION JOURNAL" (JSON), "NUMBER PROBLEM", "bye",
                        "leaving"
to the agent            "ready", "ask NUMBER look SECONDS", "ask NUMBER begin", "STEP REASON"
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import time
from typing import IO, Any, Callable, Optional, Union

from activate import journal
from activate.process import Error
from activate.text import one_line
from activate.values import dataclass

START_TIMEOUT = 12 * 3600.0  # seconds until "go": more than the longest download
LINE_BYTES = 4000  # a pipe takes this much in one piece
READY, GO, BYE, LEAVING, ASK = "ready", "go", "bye", "leaving", "ask"
LOOK, BEGIN = "look", "begin"  # questions: can the workspace be reached; is it still wanted

File = Union[IO[bytes], io.FileIO]
Reach = Callable[[float], None]  # raises if the workspace can't be reached in so many seconds


@dataclass(frozen=True)
class Question:
    """A question of the switch process. The answer is a problem, or empty for yes."""

    number: str
    word: str
    timeout: float  # seconds


@dataclass(frozen=True)
class Entered:
    """The switch process has entered a step."""

    step: str
    reason: str


class Pipe:
    """Lines in both directions over two files, with a deadline for each line that is awaited."""

    def __init__(self, source: File, sink: File) -> None:
        self.source, self.sink = source, sink
        self.buffer = b""
        self.at_end = False  # the other side has closed its end

    def send(self, line: str) -> None:
        """Write a line. Raises OSError if either side has closed its end."""
        try:
            os.write(self.sink.fileno(), line.encode("utf-8", "replace") + b"\n")
        except ValueError:  # closed by another thread
            raise BrokenPipeError("closed") from None

    def receive(self, timeout: float) -> Optional[str]:
        """The next line; None if the other side has ended, or is silent for `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self.buffer and not self.at_end:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self.source], [], [], left)[0]:
                return None
            data = os.read(self.source.fileno(), 1 << 16)
            self.buffer += data
            self.at_end = not data
        line, newline, rest = self.buffer.partition(b"\n")
        if not newline:
            return None
        self.buffer = rest
        return line.decode()


class AgentEnd(Pipe):
    """The agent's end."""

    def is_ready(self, timeout: float) -> bool:
        """Whether the switch process is ready within `timeout` seconds."""
        return self.receive(timeout) == READY

    def configure(self, config: dict[str, Any]) -> None:
        """Hand over the token and the settings. Raises OSError."""
        self.send(json.dumps(config))

    def go(self, action: str, record: journal.Record) -> None:
        """Let the switch process begin, with the content of the journal. Raises OSError."""
        self.send(f"{GO} {action} {record.to_json().decode().replace(chr(10), '')}")

    def answer(self, question: Question, problem: str) -> None:
        """Answer a question, unless the switch process has ended."""
        with contextlib.suppress(OSError):
            self.send(f"{question.number} {problem}")

    def say_goodbye(self) -> None:
        """Announce that the agent exits on purpose, so that nobody waits for it to come back."""
        with contextlib.suppress(OSError):
            self.send(BYE)

    def say_leaving(self) -> None:
        """Announce that the agent exits, maybe because of the deployment: it reports no end."""
        with contextlib.suppress(OSError):
            self.send(LEAVING)

    def listen(self, timeout: float) -> Union[Question, Entered, None]:
        """The next message; None if the process has ended, or is silent for `timeout` seconds."""
        line = self.receive(timeout)
        if line is None:
            return None
        first, _, rest = line.partition(" ")
        if first != ASK:
            return Entered(first, rest)
        number, word, *seconds = rest.split()
        return Question(number, word, float(seconds[0]) if seconds else 0.0)


class SwitchEnd(Pipe):
    """The switch process' end. `pid` is that of the agent."""

    def __init__(self, source: File, sink: File) -> None:
        super().__init__(source, sink)
        self.pid = os.getppid()
        self.has_left = False  # the agent has said goodbye
        self.is_leaving = False  # the agent exits, for whatever reason
        self.questions, self.early = 0, ""  # an early question is one that was sent in advance
        self.answers: dict[str, str] = {}

    def wait_for_config(self) -> Optional[dict[str, Any]]:
        """The token and the settings; None if the agent has ended."""
        line = self.receive(START_TIMEOUT)
        return None if line is None else dict(json.loads(line))

    def wait_for_go(self) -> Optional[tuple[str, journal.Record]]:
        """The action and the journal to begin with; None if the agent has ended."""
        line = self.receive(START_TIMEOUT)
        if line is None or not line.startswith(f"{GO} "):
            return None
        _, action, record = line.split(" ", 2)
        return action, journal.Record.from_json(record.encode())

    def report(self, word: str, reason: str = "") -> None:
        """Report that this process is ready, or has entered a step. Nobody has to listen."""
        line = f"{word} {one_line(reason)}".rstrip().encode("utf-8", "replace")[:LINE_BYTES]
        with contextlib.suppress(OSError):
            self.send(line.decode("utf-8", "ignore"))

    def ask(self, question: str, timeout: float) -> Optional[str]:
        """The agent's answer; None if the agent ends. Raises Error after `timeout` seconds."""
        if question != self.early:
            self.begin_to_ask(question)
        self.early = ""
        number, deadline = str(self.questions), time.monotonic() + timeout
        while number not in self.answers and not self.has_left:
            if not self._hear(max(0.0, deadline - time.monotonic())):
                if self.at_end:
                    return None
                raise Error(f"the agent did not answer within {timeout:.0f} s")
        return self.answers.get(number)

    def begin_to_ask(self, question: str) -> None:
        """Send a question in advance: `ask` takes its answer, if it is for the same question."""
        self.questions, self.early = self.questions + 1, question
        self.report(f"{ASK} {self.questions} {question}")

    def _hear(self, timeout: float) -> bool:
        """Take in an answer or a goodbye. False if neither comes within `timeout` seconds."""
        line = self.receive(timeout)
        if line in (BYE, LEAVING):
            self.is_leaving = True
            self.has_left = self.has_left or line == BYE
        elif line is not None:
            number, _, problem = line.partition(" ")
            self.answers[number] = problem
        return line is not None

    def is_alive(self) -> bool:
        """Whether the agent has not ended."""
        while self._hear(0):
            pass
        return not self.at_end

    def stays(self) -> bool:
        """Whether the agent is alive and not about to exit, so that it reports the end."""
        return self.is_alive() and not self.is_leaving

    def has_no_word(self, timeout: float) -> bool:
        """Whether the agent is silent for `timeout` seconds."""
        return not self.buffer and not select.select([self.source], [], [], timeout)[0]

    def was_lost(self) -> bool:
        """Whether the agent has ended without a goodbye."""
        return not self.is_alive() and not self.has_left
