"""Reports of deployments: their starts, logs, sizes and ends, retried until they are delivered.

The files of the deployments are the queue: memory stays bounded, and a restart loses nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
import time
from collections.abc import Collection
from typing import Any, Callable, Optional

from activate import journal, lock, logfile, outcomes
from activate.text import MOST_MESSAGE, clean, printable
from activate.values import replace
from cachix_channels import Channel, HttpChannel, LogClosed, SocketChannel
from cachix_connection import Peer, Waits, backoff
from cachix_console import complain, debug, tell
from cachix_protocol import (
    FAILED,
    FAILURE_LINE,
    IN_PROGRESS,
    SUCCEEDED,
    SUCCESS_LINE,
    AgentRegistered,
    Error,
    Gone,
    Refused,
    Unreachable,
    utc_now,
)
from cachix_repeats import Repeats
from cachix_reported import Reported, prune

BATCH_LINES = 2000  # lines of a log in one report
LOG_SECONDS = 5.0  # for which a log is sent before other reports have their turn
STALL_SECONDS = 0.25  # for which the other reports wait for the answer to lines of a log
HEAD_START = 0.01  # seconds in which a deployment begins to download before it is reported
HURRY_SECONDS = 0.05  # between two looks whether an end is to be reported meanwhile
LONG_STEPS = (journal.AWAITING_REBOOT, journal.REBOOTING)  # each has a report of its own
LOCK_SECONDS = 5.0  # between two attempts to take over a report from another agent


class Lines:
    """A call that sends lines of a log, made by a thread of its own, so that nobody has to wait."""

    def __init__(
        self, channel: Channel, index: int, lines: list[str], offset: int, closing: bool
    ) -> None:
        """The first line has this index, and the log's byte `offset` comes after the last."""
        self.channel, self.index, self.lines = channel, index, lines
        self.offset, self.closing = offset, closing
        self.begun = time.monotonic()
        self.done = threading.Event()
        self.expected = 0
        self.problem: Optional[Exception] = None

    def run(self) -> None:
        """Make the call."""
        try:
            self.expected = self.channel.lines(self.index, self.lines)
        except Exception as error:
            self.problem = error
        self.done.set()

    def wait(self, is_late: Callable[[], bool]) -> bool:
        """Whether the call has an answer, or gets it in the time that the others can wait."""
        until = self.begun + STALL_SECONDS
        while (left := until - time.monotonic()) > 0 and not is_late():
            if self.done.wait(min(left, HURRY_SECONDS)):
                break
        return self.done.is_set()


class Delivery:
    """One deployment on its way to the workspace: its start, its log, its size, its end."""

    def __init__(
        self,
        entry: journal.Journal,
        lock_: lock.Lock,
        sizes: dict[str, int],
        send: Callable[[Lines], None] = Lines.run,
        begun: Collection[str] = (),
    ) -> None:
        """`send` makes a call, or lets another thread make it. `begun`: ids, see `is_cancelled`."""
        self.entry, self.lock, self.sizes, self.send = entry, lock_, sizes, send
        self.begun = begun
        self.sending: Optional[Lines] = None  # the call that is being made
        self.reported = Reported.load(entry.path("reported.json"))
        self.channel: Optional[Channel] = None
        self.failures, self.not_before = 0, 0.0
        self.shipped = float("-inf")  # when `ship` was called last
        self.log_failed, self.hurried, self.batch = False, False, BATCH_LINES
        self.counted = False  # we have asked how many lines of a lost log the workspace has
        self.final = False  # `has_ended` when `ship` began: an end after that waits for its log

    @property
    def has_ended(self) -> bool:
        """Whether the deployment is over, as far as this process knows."""
        return self.entry.record.step in journal.FINAL

    def note(self, **facts: Any) -> None:
        """Save the progress, in memory alone if the disk refuses."""
        self.reported = replace(self.reported, time=utc_now(), **facts)
        path = self.entry.path("reported.json")
        with contextlib.suppress(OSError):
            with open(path + ".new", "w", encoding="utf-8", opener=logfile.private) as file:
                file.write(json.dumps(vars(self.reported)))
            os.rename(path + ".new", path)

    def ship(self, channel: Channel) -> None:
        """Send whatever is new. Raises the first Error; a failing log does not delay the rest."""
        self.channel, self.final = channel, self.has_ended
        steps = [self.ship_start, self.ship_step, self.ship_log, self.ship_size, self.ship_end]
        if self.log_failed or self.sending is not None:
            steps = [self.ship_start, self.ship_step, self.ship_size, self.ship_end, self.ship_log]
        problems = []
        for step in steps:
            try:
                step(channel)
            except Error as error:
                problems.append(error)
                if getattr(error, "retry_after", 0.0) and step != self.ship_log:
                    break  # the workspace asked to be left alone
        if problems:
            raise problems[0]

    def ship_start(self, channel: Channel) -> None:
        """Report once that the deployment is in progress. Raises Error."""
        if self.reported.started or self.reported.ended:
            return
        if self.entry.record.id not in self.begun:
            channel.status(IN_PROGRESS, None, step=self.step())
        self.note(started=True)

    def ship_step(self, channel: Channel) -> None:
        """Report a step that may last for days. Raises Error."""
        step = self.step()
        if step in LONG_STEPS and step != self.reported.step and isinstance(channel, HttpChannel):
            channel.status(IN_PROGRESS, self.reported.size, step=step)
            self.note(step=step)

    def step(self) -> Optional[str]:
        """The step of a deployment that goes on."""
        step = self.entry.record.step
        return None if step in journal.FINAL else step

    def ship_size(self, channel: Channel) -> None:
        """Report the closure's size once it is known. Raises Error."""
        if self.reported.size is None and self.entry.record.id in self.sizes:
            self.note(size=self.sizes[self.entry.record.id])
        if self.final and isinstance(channel, HttpChannel):
            return  # the final status has it
        if self.reported.size is not None and not (self.reported.sized or self.reported.ended):
            channel.status(IN_PROGRESS, self.reported.size, step=self.step())
            self.note(sized=True)

    def ship_end(self, channel: Channel) -> None:
        """Report the end, with its reason. Raises Error."""
        if self.final and not self.reported.ended:
            record = self.entry.record
            channel.status(
                SUCCEEDED if record.step == journal.SUCCEEDED else FAILED,
                self.reported.size,
                outcomes.reason_of(record),
                record.step,
                outcomes.of(record),
            )
            self.note(ended=True)

    def ship_log(self, channel: Channel) -> None:
        """Send the new lines, for at most LOG_SECONDS. Raises Error.

        An answer that does not come soon is looked for again later: the end never waits for it.
        """
        deadline = time.monotonic() + LOG_SECONDS
        while not self.reported.logged and time.monotonic() < deadline:
            if self.sending is None:
                self.sending = self.next_lines(channel)
                if self.sending is None:
                    break
                self.send(self.sending)
            if not self.sending.wait(lambda: self.has_ended and not self.final):
                break
            sent, self.sending = self.sending, None
            self.take_answer(sent)

    def next_lines(self, channel: Channel) -> Optional[Lines]:
        """The next call; None if there is nothing to send. No lines: to ask what arrived."""
        if self.log_failed:  # the link may be too slow for so many lines
            self.batch = max(1, self.batch // 8)
        lines, offset = logfile.lines_from(self.entry, self.reported.offset, self.batch)
        closing = self.final and offset >= logfile.end(self.entry) and len(lines) < self.batch
        if closing and not self.counted and logfile.is_lost(self.entry, self.reported.offset):
            # the closing line goes after all lines that the workspace has
            return Lines(channel, self.reported.line, [], self.reported.offset, False)
        if closing:
            lines.append(closing_line(self.entry.record))
        call = Lines(channel, self.reported.line, lines, offset, closing)
        return call if lines else None

    def take_answer(self, sent: Lines) -> None:
        """Go on by the answer to a call. Raises Error."""
        self.log_failed = True
        if isinstance(sent.problem, LogClosed):
            self.note(logged=True)
        elif sent.problem is not None:
            raise sent.problem
        elif sent.lines:
            self.acknowledge(sent.expected, len(sent.lines), sent.offset, sent.closing)
            self.batch = min(BATCH_LINES, 2 * self.batch)
        else:
            self.note(line=sent.expected)
            self.counted = True
        self.log_failed = False

    def acknowledge(self, expected: int, sent: int, offset: int, closing: bool) -> None:
        """Go on at the line that the workspace expects next. Raises Unreachable if it took none."""
        following = self.reported.line + sent
        lost = closing and expected > following  # the workspace has lines that are lost here
        if expected >= following:
            line = expected if lost else following
            self.note(line=line, offset=offset, logged=closing and not lost)
        elif expected == self.reported.line:
            raise Unreachable(f"the workspace took none of the {sent} lines that were sent")
        else:
            line, offset, lines = 0, 0, [""]
            while lines and line < expected:
                lines, offset = logfile.lines_from(self.entry, offset, expected - line)
                line += len(lines)
            self.note(line=line, offset=offset)


def closing_line(record: journal.Record) -> str:
    """The last line of a log, from which Cachix's `activate` knows that the log is complete."""
    if record.step == journal.SUCCEEDED:
        return SUCCESS_LINE
    text = " ".join(f"{FAILURE_LINE} {record.reason or ''}".splitlines()).rstrip()
    return printable(clean(text, most=MOST_MESSAGE).encode("utf-8", "replace"))


class Reporter(threading.Thread):
    """The thread that delivers the reports. It sleeps while no deployment is in progress."""

    def __init__(self, peer: Peer, waits: Waits) -> None:
        super().__init__(name="reporter", daemon=True)
        self.peer, self.waits = peer, waits
        self.wake = threading.Event()
        self.idle = threading.Event()
        self.registered: Optional[AgentRegistered] = None
        self.added: queue.SimpleQueue[journal.Journal] = queue.SimpleQueue()
        self.deliveries: list[Delivery] = []
        self.sizes: dict[str, int] = {}
        self.begun: set[str] = set()  # of whose begin the workspace knows by `is_cancelled`
        self.calls: queue.SimpleQueue[Lines] = queue.SimpleQueue()
        self.repeats = Repeats(tell)
        self.idle.set()

    def add(self, entry: journal.Journal) -> None:
        """Report this deployment from now on."""
        self.idle.clear()
        self.added.put(entry)
        self.wake.set()

    def register(self, registered: AgentRegistered) -> None:
        """Use the channel that the workspace asks for, from now on."""
        self.registered = registered
        self.wake.set()

    def measured(self, entry: journal.Journal, size: int) -> None:
        """Send the closure's size, in bytes, with the next report."""
        self.sizes[entry.record.id] = size

    def is_cancelled(self, entry: journal.Journal) -> bool:
        """Whether the workspace says that a deployment was cancelled, as long as it can be."""
        if self.registered is None or self.registered.reports != "http":
            return False
        channel = HttpChannel(self.peer, entry.record.id, self.waits.call / 2)
        with contextlib.suppress(Refused, Unreachable, Gone):
            may_go_on = channel.status(IN_PROGRESS, None, step=entry.record.step)
            self.begun.add(entry.record.id)
            return not may_go_on
        return False

    def channel(self, delivery: Delivery, registered: AgentRegistered) -> Channel:
        """The kind of channel that the workspace asked for."""
        if registered.reports == "http":
            return HttpChannel(self.peer, delivery.entry.record.id, self.waits.call)
        if (
            isinstance(delivery.channel, SocketChannel)
            and delivery.channel.agent_id == registered.id
        ):
            return delivery.channel
        return SocketChannel(self.peer, delivery.entry.record.id, registered.id, self.waits)

    def run(self) -> None:
        """Deliver until the process exits."""
        threading.Thread(target=self.send_lines, name="log", daemon=True).start()
        waiting: list[journal.Journal] = []  # another agent is reporting them
        while True:
            self.wake.wait(self.pause(bool(waiting)))
            self.wake.clear()
            if not self.added.empty():
                time.sleep(HEAD_START)  # both need the processor
            while not self.added.empty():
                waiting.append(self.added.get())
            waiting = [entry for entry in waiting if not self.take(entry)]
            if self.registered is not None:
                for delivery in list(self.deliveries):
                    self.attend(delivery, self.registered)
            if not (self.deliveries or waiting) and self.added.empty():
                self.idle.set()

    def send_lines(self) -> None:
        """Make the calls that send logs, one after another (a thread)."""
        while True:
            self.calls.get().run()
            self.wake.set()

    def pause(self, waiting: bool) -> Optional[float]:
        """Seconds until something may be due; None if only an event can change that."""
        now, deliveries = time.monotonic(), self.deliveries if self.registered is not None else []
        pauses = [max(delivery.not_before - now, self.waits.tail) for delivery in deliveries]
        return min([*pauses, *([LOCK_SECONDS] if waiting else [])], default=None)

    def take(self, entry: journal.Journal) -> bool:
        """Start to report a deployment. False while another agent is reporting it."""
        try:
            taken = lock.take(entry.path("reported.lock"))
        except OSError:  # the state can't be written: report without a lock
            taken = lock.Lock("", os.open(os.devnull, os.O_RDONLY))
        if taken is not None:
            delivery = Delivery(entry, taken, self.sizes, self.calls.put, self.begun)
            if self.registered is not None and self.registered.reports == "http":
                # a small deployment needs the processor, and `is_cancelled` tells of its begin
                delivery.shipped = time.monotonic()
            self.deliveries.append(delivery)
        return taken is not None

    def attend(self, delivery: Delivery, registered: AgentRegistered) -> None:
        """Ship what is new, unless the delivery is postponed."""
        # the end does not wait for a log that fails
        if delivery.has_ended and delivery.log_failed and not delivery.hurried:
            delivery.hurried, delivery.not_before = True, 0.0
        now, shipped = time.monotonic(), delivery.shipped
        if now < delivery.not_before or (
            now < shipped + self.waits.tail and not delivery.has_ended
        ):
            return
        delivery.shipped = now
        try:
            delivery.ship(self.channel(delivery, registered))
            if delivery.failures:
                self.repeats.forget()
            delivery.failures = 0
        except Gone as error:
            tell(f"{error}: its report was dropped")
            delivery.note(logged=True, ended=True)
        except Exception as error:  # a bug must not stop the other reports
            self.postpone(delivery, error)
        if delivery.final and delivery.reported.whole:
            self.conclude(delivery)

    def postpone(self, delivery: Delivery, error: Exception) -> None:
        """Retry a report later. Messages say so."""
        pause = max(backoff(delivery.failures, self.waits), getattr(error, "retry_after", 0.0))
        delivery.failures += 1
        delivery.not_before = time.monotonic() + pause
        if not isinstance(error, Error):
            complain(error)
        name = f"deployment {delivery.entry.record.id}: "
        self.repeats.tell(f"{name}not reported yet, trying again: {error}")
        debug(f"{name}next attempt in {pause:.0f} s")

    def conclude(self, delivery: Delivery) -> None:
        """Finish a delivery whose report is whole, and make room for later ones."""
        self.deliveries.remove(delivery)
        self.sizes.pop(delivery.entry.record.id, None)
        self.begun.discard(delivery.entry.record.id)
        if delivery.channel is not None:
            delivery.channel.close()
        delivery.lock.close()
        prune(os.path.dirname(os.path.dirname(delivery.entry.directory)))
