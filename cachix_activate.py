"""The command that CI starts deployments with: reads a deploy.json, orders it, shows the logs, waits for the ends."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import random
import re
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

import websocket

from activate.download import human
from cachix_deploy import (
    CANCELLED,
    FAILED,
    IN_PROGRESS,
    SUCCEEDED,
    TERMINAL,
    Error,
    Peer,
    Refused,
    Spec,
    Undecodable,
    Unreachable,
    UsageError,
    checked_field,
    connect,
    debug,
    dumps,
    hang_up,
    http,
    is_store_path,
    loads,
    retry_after,
    tell,
    uuid_field,
)

if TYPE_CHECKING:
    import requests

POLL_SECONDS = 2.0  # between two looks at a deployment, as Cachix's client does
PATIENCE = 60.0  # seconds without a usable answer after which the workspace is out of reach
ORDER_PATIENCE = 10.0  # the same while it has not answered at all: --host may be wrong
QUIET_SECONDS = 3.0  # without a new line after the end of a deployment: its log is whole
DRAIN_SECONDS = 120.0  # the longest time for which logs are shown after all have ended
VIEWER_SILENCE = 30.0  # seconds until a ping, and once more until the connection counts as dead
NAME_COLOURS = ("36", "33", "35", "34", "96", "93", "95", "94")
STATUS_COLOURS = {SUCCEEDED: "32", FAILED: "31", CANCELLED: "33"}
EXAMPLE_SPEC = '{"agents": {"NAME": "/nix/store/..."}}'
ESCAPES = re.compile(
    r"(?P<sgr>\x1b\[[0-9;:]*m)"  # colours and weights: the only ones that a line may keep
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[PX^_][^\x1b]*\x1b\\"  # titles, links and other strings
    r"|\x1b\[[0-?]*[ -/]*[@-~]|\x1b[ -/]*[0-~]?"  # the cursor, the screen, the modes
    r"|[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]"  # control characters; what reverses the text
)


@dataclass(frozen=True)
class ActivateOptions:
    """The command line of `activate`, and the token that was found for it."""

    host: str
    token: Optional[str]
    spec_path: str
    agents: tuple[str, ...] = ()
    asynchronous: bool = False
    timeout: Optional[float] = None


class Busy(Unreachable):
    """The workspace can't answer now; `pause` is how many seconds it asks to stay away, if it says."""

    pause = 0.0


@dataclass(frozen=True)
class DeploymentState:
    """What the workspace knows of a deployment."""

    status: str = "Unknown"
    started: Optional[str] = None
    finished: Optional[str] = None
    closure_size: Optional[int] = None

    @classmethod
    def from_json(cls, record: Any) -> DeploymentState:
        started, finished = (checked_field(record, name, str, optional=True) for name in ("startedOn", "finishedOn"))
        size = checked_field(record, "closureSize", int, optional=True)
        return cls(checked_field(record, "status", str), started, finished, size)

    def seconds(self) -> Optional[float]:
        """How long it ran, by the workspace's clock where it tells."""
        found = [re.match(r"(\S{19})(\.\d+)?", time_ or "") for time_ in (self.started, self.finished)]
        with contextlib.suppress(ValueError, TypeError):
            begin, end = (datetime.datetime.fromisoformat(match[1]) for match in found)  # type: ignore[index]
            begin_part, end_part = (float(match[2] or 0) for match in found)  # type: ignore[index]
            return max(0.0, (end - begin).total_seconds() + end_part - begin_part)
        return None


def clean(text: str, colour: bool = False) -> str:
    """`text` without what moves the cursor or changes the terminal; SGR colours stay where `colour` is set."""
    kept = ESCAPES.sub(lambda found: (found["sgr"] or "") if colour else "", text)
    return kept + "\x1b[0m" if "\x1b" in kept else kept


class Screen:
    """stdout, shared by the viewers: whole lines at once, never an exception. `broken`: nobody reads it any more."""

    def __init__(self) -> None:
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        self.colour = sys.stdout is not None and sys.stdout.isatty() and not plain
        self.broken = False
        self.lock = threading.Lock()

    def paint(self, text: str, colour: Optional[str]) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self.colour and colour else text

    def say(self, line: str) -> None:
        stream = sys.stdout
        encoding = getattr(stream, "encoding", None) or "utf-8"
        with self.lock:
            if self.broken or stream is None:
                return
            try:
                stream.write(line.encode(encoding, "backslashreplace").decode(encoding, "replace") + "\n")
                stream.flush()
            except (OSError, ValueError) as error:
                self.broken = True
                if not isinstance(error, BrokenPipeError):
                    tell(f"warning: stdout can't be written: {error}")
                with contextlib.suppress(OSError, ValueError):  # or Python complains when it exits
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def decode_spec(raw: bytes, name: str) -> Spec:
    """The deploy.json `raw`, which the user knows as `name`; raises Error with what is wrong in it, and where."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = sorted(key for key, _ in pairs)
        for key, following in zip(keys, keys[1:]):
            if key == following:
                raise Error(f"{name} has the key {json.dumps(key)} twice in one object, and only one would count")
        return dict(pairs)

    try:
        return check_spec(json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique), name)
    except UnicodeDecodeError as error:
        raise Error(f"{name} is not UTF-8 text: byte {error.start} is 0x{raw[error.start]:02x}") from None
    except json.JSONDecodeError as error:
        raise Error(f"{name} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise Error(f"{name} is not JSON that can be read: {error}") from None


def check_spec(record: Any, name: str) -> Spec:
    """The deploy.json `record`; raises Error that lists all the values that are wrong."""
    if not isinstance(record, dict):
        raise Error(f"{name} must hold an object such as {EXAMPLE_SPEC}")
    agents, scripts = record.get("agents"), record.get("rollbackScript")
    if not isinstance(agents, dict) or not agents:
        raise Error(f"{name} names no agents: `agents` must be an object as in {EXAMPLE_SPEC}")
    if scripts is not None and not isinstance(scripts, dict):
        raise Error(f'`rollbackScript` in {name} must be an object such as {{"x86_64-linux": "/nix/store/..."}}')
    unnamed = [json.dumps(key) for key in (*agents, *(scripts or {})) if not key.strip() or not key.isprintable()]
    if unnamed:
        raise Error(f"{name} has names that are empty or can't be printed: {', '.join(unnamed)}")
    parts = (("agents", agents), ("rollbackScript", scripts or {}))
    values = [(f"{part}.{key} is", value) for part, entries in parts for key, value in entries.items()]
    wrong = [f"{label} {json.dumps(value)[:200]}" for label, value in values if not is_store_path(value)]
    if wrong:
        raise Error(f"{name} may have store paths (/nix/store/HASH-NAME) only, but {', '.join(wrong)}")
    for key in sorted(record.keys() - {"agents", "rollbackScript"}):
        tell(f"warning: {name} has an unknown key, which is ignored: {json.dumps(key)}")
    return Spec(agents, scripts or {})


def read_spec(options: ActivateOptions) -> Spec:
    """What is to be deployed: the file, or those of its agents that were chosen."""
    path = options.spec_path
    name = "the specification on stdin" if path == "-" else path
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            spec = decode_spec(file.read(), name)
    except OSError as error:
        raise Error(f"{name} can't be read: {error.strerror or error}") from None
    unknown = [agent for agent in options.agents if agent not in spec.agents]
    if unknown:
        raise UsageError(f"no agent {', '.join(unknown)} in {name}, which has {', '.join(sorted(spec.agents))}")
    chosen = options.agents or tuple(spec.agents)
    return Spec({agent: path for agent, path in spec.agents.items() if agent in chosen}, spec.rollback_scripts)


def rejection(peer: Peer, answer: requests.Response) -> Error:
    """The error for an answer that is no success, with what it says: our JSON, Cachix's, or plain text."""
    status, said = answer.status_code, answer.content.decode("utf-8", "replace")
    with contextlib.suppress(Undecodable):
        record = loads(answer.content)
        texts = [record.get("error"), record.get("message")] if isinstance(record, dict) else [record]
        said = next((text for text in texts if isinstance(text, str)), said)
    said = "" if said.lstrip().startswith("<") else clean(" ".join(said.split()))[:500]
    said = f": {said}" if said else ""
    if status in (401, 403):
        return Refused(f"{peer.host} refused the token (HTTP {status}){said or ': check it, or create a new one'}")
    if status in (408, 425, 429) or status >= 500:
        busy = Busy(f"{peer.host} answered HTTP {status}{said}")
        busy.pause = min(retry_after(answer), PATIENCE / 2)
        return busy
    if 300 <= status < 400:
        target = clean(answer.headers.get("Location", "another address"))
        return UsageError(f"{peer.host} points to {target}, which is not followed: give it as --host (HTTP {status})")
    return Error(f"{peer.host} refused the request (HTTP {status}){said}")


def decode_answer(peer: Peer, answer: requests.Response) -> Any:
    """The JSON of a successful answer. Raises Undecodable, or Error for any other answer."""
    if not 200 <= answer.status_code < 300:
        raise rejection(peer, answer)
    return loads(answer.content)


def no_workspace(peer: Peer, problem: Undecodable) -> Unreachable:
    """The error for an answer that is not of the protocol, such as the page of a proxy."""
    return Unreachable(f"{peer.host} answered, but not as a workspace does: {problem}")


def post_order(peer: Peer, path: str, spec: Spec, deadline: float) -> requests.Response:
    """Send the order until it is answered. It names the state that is wanted: to send it twice does no harm."""
    body, kind = dumps(spec.to_json()).encode(), {"Content-Type": "application/json;charset=utf-8"}
    begin, pause = time.monotonic(), 1.0
    while True:
        try:
            answer = http(peer, "POST", path, data=body, headers=kind)
            problem = rejection(peer, answer)
            if not isinstance(problem, Busy):
                return answer
        except Unreachable as error:
            problem = error
        pause = max(pause, getattr(problem, "pause", 0.0))
        patience = PATIENCE if isinstance(problem, Busy) else ORDER_PATIENCE
        if time.monotonic() + pause > min(begin + patience, deadline):
            raise problem
        tell(f"{problem}; trying again in {pause:.0f} s")
        time.sleep(pause)
        pause = min(2 * pause, 10.0)


def order(peer: Peer, spec: Spec, deadline: float) -> dict[str, tuple[str, str]]:
    """Ask the workspace to deploy: id and URL for each agent. Where v2 is unknown by v1, which tells no ids (empty)."""
    answer = post_order(peer, "/api/v2/deploy/activate", spec, deadline)
    if answer.status_code == 404:
        answer = post_order(peer, "/api/v1/deploy/activate", spec, deadline)
    if answer.status_code == 404:
        raise Unreachable(f"{peer.host} is no workspace: it knows neither v2 nor v1 of the API (HTTP 404)")
    try:
        made = checked_field(decode_answer(peer, answer), "agents", dict)
        values = {agent: checked_field(made, agent, (dict, str)) for agent in spec.agents}
        return {
            agent: ("", made) if isinstance(made, str) else (uuid_field(made, "id"), checked_field(made, "url", str))
            for agent, made in values.items()
        }
    except Undecodable as problem:
        raise no_workspace(peer, problem) from None


class Follower:
    """A deployment under way: what the workspace said of it last, and the thread that shows its log."""

    def __init__(self, peer: Peer, agent: str, id: str, url: str, screen: Screen, wake: threading.Event) -> None:
        self.peer, self.agent, self.id, self.url, self.screen = peer, agent, id, url, screen
        self.label = agent
        self.wake = wake  # tells the main thread that `due` was brought forward
        self.nudge = threading.Event()  # tells the viewer that the deployment has ended
        self.state = DeploymentState()
        self.began = self.heard = time.monotonic()
        self.due = self.took = 0.0
        self.shown = 0
        self.stopped = False
        self.socket: Optional[websocket.WebSocket] = None
        self.thread: Optional[threading.Thread] = None

    @property
    def ended(self) -> bool:
        return self.state.status in TERMINAL

    def poll(self, timeout: float) -> None:
        """Ask for the status once, and begin to show the log of what is not cancelled already. Raises Error."""
        self.due = time.monotonic() + POLL_SECONDS
        answer = http(self.peer, "GET", f"/api/v1/deploy/deployment/{self.id}", timeout)
        before = self.state.status
        try:
            self.state = DeploymentState.from_json(decode_answer(self.peer, answer))
        except Undecodable as problem:
            raise no_workspace(self.peer, problem) from None
        if self.state.status == IN_PROGRESS != before:
            self.began = time.monotonic()
        if self.thread is None and self.state.status != CANCELLED:
            self.thread = threading.Thread(target=self.view, name=f"view-{self.id}", daemon=True)
            self.thread.start()
        if self.ended:
            self.heard, seconds = time.monotonic(), self.state.seconds()
            if self.thread is not None:
                self.took = self.heard - self.began if seconds is None else seconds
            self.nudge.set()

    def view(self) -> None:
        """The thread: show the log until it is whole, over as many connections as that takes."""
        delay, complained = 1.0, False
        while not self.stopped:
            late, known, whole = self.ended, self.shown, False
            try:
                whole = self.stream() or (late and self.shown == known)
                self.due = 0.0  # the end of the log is most likely that of the deployment
                self.wake.set()
            except (Refused, Unreachable) as error:
                (debug if complained else tell)(f"warning: no log of {self.agent} at present: {error}")
                complained = True
            delay = 1.0 if self.shown > known else min(30.0, 2 * delay)
            if not (whole and self.ended) and self.nudge.wait(delay * random.uniform(0.5, 1.0)):
                self.nudge.clear()
            if whole and self.ended:
                return

    def stream(self) -> bool:
        """Show what one connection brings, but for lines shown before. True where the workspace closed it in order."""
        self.socket = socket_ = connect(self.peer, f"/api/v1/deploy/log/{self.id}?view=true")
        count, pinged = 0, False
        try:
            socket_.settimeout(VIEWER_SILENCE)
            while not self.stopped:
                try:
                    opcode, frame = socket_.recv_data_frame(control_frame=True)
                except websocket.WebSocketTimeoutException:
                    if pinged:
                        break
                    socket_.ping()
                    pinged = True
                    continue
                pinged = False
                if opcode == websocket.ABNF.OPCODE_CLOSE:
                    return frame.data[:2] in (b"", b"\x03\xe8")  # no code, or 1000
                if opcode in (websocket.ABNF.OPCODE_TEXT, websocket.ABNF.OPCODE_BINARY):
                    count, self.heard = count + 1, time.monotonic()
                    if count > self.shown:
                        self.shown = count
                        self.show(frame.data)
        except (OSError, ValueError, websocket.WebSocketException) as error:
            if not self.stopped:
                debug(f"the connection for the log of {self.agent} broke: {error or type(error).__name__}")
        finally:
            socket_.shutdown()  # type: ignore[no-untyped-call]
        return False

    def show(self, data: bytes) -> None:
        """Print a line of the log; one with carriage returns (a progress bar) as several."""
        try:
            text = checked_field(loads(data), "line", str)
        except Undecodable as error:
            tell(f"warning: a line of the log of {self.agent} is skipped: {error}")
            return
        for part in [part for part in re.split(r"[\r\n]+", text) if part] or [""]:
            if not self.stopped:
                self.screen.say(f"{self.label} | {clean(part, self.screen.colour)}".rstrip(" "))
        if self.screen.broken:
            self.wake.set()

    def stop(self) -> None:
        self.stopped = True
        self.nudge.set()
        if self.socket is not None:
            hang_up(self.socket)


def wait_for(followers: list[Follower], screen: Screen, wake: threading.Event, deadline: float) -> None:
    """Poll the deployments to their ends, or to the deadline. Raises Unreachable after PATIENCE, else Error at once."""
    answered, failures, now = time.monotonic(), 0, time.monotonic()
    pending = followers
    while pending and not screen.broken and now < deadline:
        try:
            for follower in sorted(pending, key=lambda follower: follower.due):
                if follower.due <= (now := time.monotonic()) < deadline:
                    follower.poll(min(20.0, max(1.0, deadline - now)))
                    answered, failures = time.monotonic(), 0
        except Unreachable as problem:
            if time.monotonic() - answered >= PATIENCE:
                raise Unreachable(f"no answer for {PATIENCE:.0f} s, the deployments go on unseen: {problem}") from None
            failures += 1
            if failures == 1:
                tell(f"{problem}; trying again")
            pause = getattr(problem, "pause", 0.0) or min(2.0**failures, 15.0)
            time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
        now = time.monotonic()
        pending = [follower for follower in pending if not follower.ended]
        if pending and not failures:
            wake.wait(max(0.0, min(deadline, *(follower.due for follower in pending)) - now))
            wake.clear()


def show_rest(followers: list[Follower], screen: Screen, deadline: float) -> None:
    """Wait until each log is whole: its viewer saw the end, or nothing came for QUIET_SECONDS."""
    limit = min(deadline, time.monotonic() + DRAIN_SECONDS)
    for follower in followers:
        while follower.thread is not None and follower.thread.is_alive() and not screen.broken:
            left = min(limit, follower.heard + QUIET_SECONDS) - time.monotonic()
            if left <= 0:
                break
            follower.thread.join(left)


def table(rows: list[list[str]]) -> list[list[str]]:
    """The cells of `rows`, padded so that columns stand one below the other."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [[cell.ljust(width) for cell, width in zip(row, widths)] for row in rows]


def summarize(screen: Screen, followers: list[Follower]) -> None:
    """One line for each agent: how its deployment ended, how long that took, the closure's size, where to look."""
    rows = []
    for follower in followers:
        size, took = follower.state.closure_size, f"{follower.took:.1f} s"
        if follower.took >= 60:
            took = str(datetime.timedelta(seconds=round(follower.took)))
        cells = [took if follower.took else "-", "-" if size is None else human(size), follower.url]
        rows.append([follower.agent, clean(follower.state.status), *cells])
    screen.say("")
    for row, follower in zip(table(rows), followers):
        row[1] = screen.paint(row[1], STATUS_COLOURS.get(follower.state.status))
        screen.say("  ".join(row).rstrip())


def follow(followers: list[Follower], screen: Screen, wake: threading.Event, deadline: float) -> None:
    """Show the logs until all have ended. Raises Error where an end is not known."""
    try:
        wait_for(followers, screen, wake, deadline)
        show_rest([follower for follower in followers if follower.ended], screen, deadline)
    finally:
        for follower in followers:
            follower.stop()
        limit = time.monotonic() + 1.0
        for follower in followers:
            if follower.thread is not None:  # none may be writing when Python exits
                follower.thread.join(max(0.0, limit - time.monotonic()))
    missing = [f"{follower.agent} is {follower.state.status}" for follower in followers if not follower.ended]
    if missing and not screen.broken:
        raise Error(f"gave up waiting at the --timeout: {', '.join(missing)}; the deployments go on")


def activate_command(options: ActivateOptions) -> int:
    """Deploy a deploy.json and follow it to its end; the exit status. Raises Error.

    Where the workspace only knows v1 of the API nothing can be waited for: that is an error, but with --async.
    """
    if not options.token:
        raise UsageError("no token: put it into CACHIX_ACTIVATE_TOKEN, or into a file for --token-file")
    deadline = time.monotonic() + (float("inf") if options.timeout is None else options.timeout)
    peer, spec = Peer.create(options.host, options.token), read_spec(options)
    screen, wake = Screen(), threading.Event()
    try:
        made = order(peer, spec, deadline)
        followers = [Follower(peer, agent, id, clean(url), screen, wake) for agent, (id, url) in made.items()]
        screen.say(f"Deploying by {peer.host}:")
        for index, row in enumerate(table([[f.agent, f.url, spec.agents[f.agent]] for f in followers])):
            row[0] = followers[index].label = screen.paint(row[0], NAME_COLOURS[index % len(NAME_COLOURS)])
            screen.say("  ".join(row))
        if options.asynchronous:
            return 0
        if not all(follower.id for follower in followers):
            raise Error(f"{peer.host} started them, but tells no ids to wait for (v1 of its API): follow the URLs")
        try:
            follow(followers, screen, wake, deadline)
        finally:
            summarize(screen, followers)
        return 0 if all(follower.state.status == SUCCEEDED for follower in followers) else 1
    except KeyboardInterrupt:
        tell("interrupted: the deployments that were started go on")
        return 130
