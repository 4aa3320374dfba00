"""Following deployments until they end: their status by polling, their logs by websocket."""

from __future__ import annotations

import random
import re
import threading
import time
from typing import Any, Optional, Protocol

import websocket

from activate.text import brief
from activate.values import dataclass
from cachix_connection import Answer, Peer, connect, hang_up, http
from cachix_console import debug, tell
from cachix_diagnosis import sentence
from cachix_protocol import (
    CANCELLED,
    FAILURE_LINE,
    IN_PROGRESS,
    SUCCESS_LINE,
    Error,
    Refused,
    Undecodable,
    Unreachable,
    UsageError,
    checked_field,
    loads,
)
from cachix_state import DeploymentState
from cachix_websocket import TooLarge

POLL_SECONDS = 2.0  # between two polls of a deployment, as in Cachix's client
SOON_SECONDS = 0.1  # between two polls after the log has ended, twice as long each time
PATIENCE = 60.0  # seconds without a usable answer until the workspace is out of reach
QUIET_SECONDS = 3.0  # without a new line after the end until a log counts as complete
CLOSED_SECONDS = 0.3  # the same after the closing line
DRAIN_SECONDS = 120.0  # for which logs are shown at most after all deployments have ended
VIEWER_SILENCE = 30.0  # until a ping, and once more until the connection counts as dead
DEPLOY, ROLL_BACK = "deploy", "roll-back"

# --- answers --------------------------------------------------------------------------------------


def rejection(peer: Peer, answer: Answer) -> Error:
    """The error for an answer without success, with the server's own words."""
    status, text = answer.status, sentence(answer.body)
    text = f": {text}" if text else ""
    if status in (401, 403):
        hint = text or ": check it, or create a new one"
        return Refused(f"{peer.host} refused the token (HTTP {status}){hint}")
    if status in (408, 425, 429) or status >= 500:
        pause = min(answer.retry_after, PATIENCE / 2)
        problem = f"{peer.host} answered HTTP {status}{text}"
        return Unreachable(problem, pause, overloaded=True, sent=status >= 500)
    if 300 <= status < 400:
        target = brief(answer.headers.get("Location", "another address"))
        hint = f"points to {target}, which is not followed: give it as --host (HTTP {status})"
        return UsageError(f"{peer.host} {hint}")
    return Error(f"{peer.host} refused the request (HTTP {status}){text}")


def decode_answer(peer: Peer, answer: Answer) -> Any:
    """The JSON of a successful answer. Raises Undecodable; Error if it is not successful."""
    if not 200 <= answer.status < 300:
        raise rejection(peer, answer)
    return loads(answer.body)


def no_workspace(peer: Peer, problem: Undecodable) -> Unreachable:
    """The error for an answer that breaks the protocol, such as the page of a proxy."""
    hint = f"unexpected response: is this a Cachix Deploy workspace? ({problem})"
    return Unreachable(f"{peer.host}: {hint}")


# --- deployments ----------------------------------------------------------------------------------


class Display(Protocol):
    """Where logs are shown: see cachix_show."""

    @property
    def broken(self) -> bool:
        """Whether nobody reads them any more."""

    def line(self, follower: Follower, text: str) -> None:
        """Show a line of a log."""

    def ended(self, follower: Follower) -> None:
        """A deployment has ended; lines of its log may follow."""

    def complete(self, follower: Follower) -> None:
        """No line of this log follows. May be called twice."""


@dataclass(frozen=True)
class Target:
    """A deployment that this command has ordered: of a new path, or of the former one."""

    agent: str
    id: str
    url: str
    store_path: str
    action: str = DEPLOY


class Follower:
    """A deployment in progress: its last known state, and the thread that shows its log."""

    def __init__(self, peer: Peer, target: Target, display: Display, wake: threading.Event) -> None:
        """`wake` tells the main thread that `due` was brought forward."""
        self.peer, self.display = peer, display
        self.agent, self.id, self.url = target.agent, target.id, target.url
        self.store_path, self.action = target.store_path, target.action
        self.label = self.agent
        self.wake = wake
        self.nudge = threading.Event()  # tells the viewer that the deployment has ended
        self.state = DeploymentState()
        self.started_at = self.quiet_since = time.monotonic()
        self.due = self.duration = 0.0
        self.shown = 0
        self.stopped = False
        self.closed = 0  # polls since the closing line of the log was shown, which counts as one
        self.told: set[str] = set()
        self.socket: Optional[websocket.WebSocket] = None
        self.thread: Optional[threading.Thread] = None

    @property
    def ended(self) -> bool:
        """Whether the deployment has ended."""
        return self.state.ended

    def poll(self, timeout: float) -> None:
        """Ask for the status once, and start to show the log. Raises Error.

        A deployment that was cancelled before it was started has no log.
        """
        soon = SOON_SECONDS * 2.0**self.closed if self.closed else POLL_SECONDS
        self.due = time.monotonic() + min(soon, POLL_SECONDS)
        self.closed += bool(self.closed)
        answer = http(self.peer, "GET", f"/api/v1/deploy/deployment/{self.id}", timeout)
        before = self.state.status
        try:
            self.state = DeploymentState.from_json(decode_answer(self.peer, answer))
        except Undecodable as problem:
            raise no_workspace(self.peer, problem) from None
        if self.state.status == IN_PROGRESS != before:
            self.started_at = time.monotonic()
        if self.thread is None and self.state.status != CANCELLED:
            name = f"view-{self.id}"
            self.thread = threading.Thread(target=self.view, name=name, daemon=True)
            self.thread.start()
        if self.ended:
            self.quiet_since, seconds = time.monotonic(), self.state.seconds()
            if seconds is None:
                seconds = self.quiet_since - self.started_at
            if self.thread is not None:
                self.duration = seconds
            self.display.ended(self)
            self.nudge.set()

    def tell_news(self, hint: str) -> None:
        """Say once why nothing happens."""
        news = self.state.news(self.agent, time.monotonic() - self.started_at)
        if news and news not in self.told:
            self.told.add(news)
            tell(news + hint)

    def view(self) -> None:
        """Show the log until it is complete, over as many connections as that takes (a thread)."""
        delay, complained = 1.0, False
        while not self.stopped:
            late, before, complete = self.ended, self.shown, False
            try:
                complete = self.stream() or (late and self.shown == before)
                self.due = 0.0  # the deployment has most likely ended with its log
                self.wake.set()
            except (Refused, Unreachable) as error:
                warn = debug if complained else tell
                warn(f"warning: no log of {self.agent} at present: {error}")
                complained = True
            delay = 1.0 if self.shown > before else min(30.0, 2 * delay)
            pause = delay * random.uniform(0.5, 1.0)
            if not (complete and self.ended) and self.nudge.wait(pause):
                self.nudge.clear()
            if complete and self.ended:  # it may have ended during the pause
                self.display.complete(self)
                return

    def stream(self) -> bool:
        """Show the new lines of one connection. True if the workspace closed it with code 1000."""
        path = f"/api/v1/deploy/log/{self.id}?view=true"
        self.socket = sock = connect(self.peer, path)
        count, pinged = 0, False
        try:
            sock.settimeout(VIEWER_SILENCE)
            while not self.stopped:
                try:
                    opcode, frame = sock.recv_data_frame(control_frame=True)
                except websocket.WebSocketTimeoutException:
                    if pinged:
                        break
                    sock.ping()
                    pinged = True
                    continue
                pinged = False
                if opcode == websocket.ABNF.OPCODE_CLOSE:
                    return frame.data[:2] in (b"", b"\x03\xe8")  # no code means 1000
                if opcode in (websocket.ABNF.OPCODE_TEXT, websocket.ABNF.OPCODE_BINARY):
                    count += 1
                    self.take(count, frame.data)
        except TooLarge as error:
            raise Unreachable(str(error)) from None
        except (OSError, ValueError, websocket.WebSocketException) as error:
            if not self.stopped:
                reason = error or type(error).__name__
                debug(f"the connection for the log of {self.agent} broke: {reason}")
        finally:
            sock.shutdown()  # type: ignore[no-untyped-call]
        return False

    def take(self, count: int, data: bytes) -> None:
        """Show line number `count` of the log, unless an earlier connection has shown it."""
        self.quiet_since = time.monotonic()
        if count > self.shown:
            self.shown = count
            self.show(data)

    def show(self, data: bytes) -> None:
        """Print a line of the log, split at carriage returns (progress bars)."""
        try:
            text = checked_field(loads(data), "line", str)
        except Undecodable as error:
            tell(f"warning: skipped a line of the log of {self.agent}: {error}")
            return
        if text == SUCCESS_LINE or text.startswith(FAILURE_LINE):  # unless more lines follow
            self.closed, self.due = 1, 0.0
        else:
            self.closed = 0
        for part in [part for part in re.split(r"[\r\n]+", text) if part] or [""]:
            if not self.stopped:
                self.display.line(self, part)
        if self.closed:
            self.wake.set()

    def stop(self) -> None:
        """Stop showing the log, from another thread."""
        self.stopped = True
        self.nudge.set()
        if self.socket is not None:
            hang_up(self.socket)


# --- all of them ----------------------------------------------------------------------------------


def wait_for(followers: list[Follower], wake: threading.Event, deadline: float) -> None:
    """Poll the deployments until they end, or until the deadline.

    Raises Unreachable after PATIENCE seconds without a usable answer, any other Error at once.
    Where nobody reads stdout any more that changes nothing: the result counts.
    """
    hint = "; --timeout=SECONDS limits that" if deadline == float("inf") else ""
    failures, pending = 0, followers
    last_answer = now = time.monotonic()
    while pending and now < deadline:
        try:
            for follower in sorted(pending, key=lambda follower: follower.due):
                if follower.due <= (now := time.monotonic()) < deadline:
                    follower.poll(min(20.0, max(1.0, deadline - now)))
                    last_answer, failures = time.monotonic(), 0
                    follower.tell_news(hint)
        except Unreachable as problem:
            if time.monotonic() - last_answer >= PATIENCE:
                silence = f"no answer for {PATIENCE:.0f} s, the deployments go on unseen"
                raise Unreachable(f"{silence}: {problem}") from None
            failures += 1
            if failures == 1:
                tell(f"{problem}; trying again")
            pause = problem.retry_after or min(2.0**failures, 15.0)
            time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
        now = time.monotonic()
        pending = [follower for follower in pending if not follower.ended]
        complete_logs(followers, now)
        if pending and not failures:
            wake.wait(max(0.0, min(deadline, *(follower.due for follower in pending)) - now))
            wake.clear()


def complete_logs(followers: list[Follower], now: float) -> None:
    """Tell the display of logs that have their closing line: Cachix keeps their connections."""
    for follower in followers:
        if follower.ended and follower.closed and now - follower.quiet_since > CLOSED_SECONDS:
            follower.display.complete(follower)


def show_rest(followers: list[Follower], display: Display, deadline: float) -> None:
    """Wait until each log is complete, or brings no line for QUIET_SECONDS."""
    limit = min(deadline, time.monotonic() + DRAIN_SECONDS)
    for follower in followers:
        while follower.thread is not None and follower.thread.is_alive() and not display.broken:
            # a workspace may keep the connection open; a command may print a closing line too
            quiet = CLOSED_SECONDS if follower.closed else QUIET_SECONDS
            left = min(limit, follower.quiet_since + quiet) - time.monotonic()
            if left <= 0:
                break
            follower.thread.join(min(left, CLOSED_SECONDS))


def follow(
    followers: list[Follower], display: Display, wake: threading.Event, deadline: float
) -> None:
    """Show the logs until all deployments have ended. Raises Error if one has not in time."""
    try:
        wait_for(followers, wake, deadline)
        show_rest([follower for follower in followers if follower.ended], display, deadline)
    finally:
        for follower in followers:
            follower.stop()
        limit = time.monotonic() + 1.0
        for follower in followers:
            if follower.thread is not None:  # none may be writing when Python exits
                follower.thread.join(max(0.0, limit - time.monotonic()))
            display.complete(follower)
    missing = [f"{one.agent} is {one.state.status}" for one in followers if not one.ended]
    if missing:
        listed = ", ".join(missing)
        raise Error(f"gave up waiting at the --timeout: {listed}; the deployments go on")
