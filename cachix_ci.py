"""The command `activate deploy.json`: orders deployments, and follows them until they end."""

from __future__ import annotations

import contextlib
import datetime
import json
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Optional

from activate.text import clean, format_size
from cachix_connection import Answer, Peer, http
from cachix_console import Screen, align, tell
from cachix_diagnosis import sentence
from cachix_follow import PATIENCE, Follower, decode_answer, follow, no_workspace, rejection
from cachix_protocol import (
    CANCELLED,
    FAILED,
    SUCCEEDED,
    Error,
    Spec,
    Undecodable,
    Unreachable,
    UsageError,
    checked_field,
    dumps,
    listed,
    uuid_field,
)
from cachix_signed import Signer

HOSTED = "https://cachix.org"
ORDER_PATIENCE = 10.0  # seconds without any answer to the order, as --host may be wrong
THAW_SECONDS, MOST_THAW_SECONDS = 2.0, 30.0  # between two orders, as long as they are refused
LOCKED = 423  # the HTTP status of an order to a workspace that is frozen
NAME_COLOURS = ("36", "33", "35", "34", "96", "93", "95", "94")
STATUS_COLOURS = {SUCCEEDED: "32", FAILED: "31", CANCELLED: "33"}


@dataclass(frozen=True)
class ActivateOptions:
    """The command line of `activate`, checked. `timeout` is in seconds.

    `source` is what CI says about itself. With `waits` a frozen workspace is waited for.
    """

    host: str
    token: Optional[str]
    spec_path: str
    agents: tuple[str, ...] = ()
    asynchronous: bool = False
    timeout: Optional[float] = None
    signer: Optional[Signer] = None
    source: dict[str, str] = field(default_factory=dict)
    waits: bool = False


# --- deploy.json ----------------------------------------------------------------------------------


def decode_spec(raw: bytes, name: str) -> Spec:
    """Decode and check a deploy.json, which messages call `name`. Raises Error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = sorted(key for key, _ in pairs)
        for key, following in zip(keys, keys[1:]):
            if key == following:
                twice = f"{name} has the key {json.dumps(key)} twice in one object"
                raise Error(f"{twice}, and only one would count")
        return dict(pairs)

    try:
        record = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique)
        spec = Spec.from_json(record)
    except Undecodable as error:
        raise Error(f"{name} can't be deployed: {error}") from None
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is 0x{raw[error.start]:02x}"
        raise Error(f"{name} is not UTF-8 text: {byte}") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise Error(f"{name} is not JSON: {place}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise Error(f"{name} is not JSON that can be read: {error}") from None
    for key in sorted(record.keys() - {"agents", "rollbackScript"}):
        tell(f"warning: {name} has an unknown key, which is ignored: {json.dumps(key)}")
    return spec


def read_spec(options: ActivateOptions) -> Spec:
    """Read the deploy.json, and keep the chosen agents. Raises Error."""
    path = options.spec_path
    name = "the specification on stdin" if path == "-" else path
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            spec = decode_spec(file.read(), name)
    except OSError as error:
        raise Error(f"{name} can't be read: {error.strerror or error}") from None
    unknown = [agent for agent in options.agents if agent not in spec.agents]
    if unknown:
        present = listed(sorted(spec.agents))
        raise UsageError(f"no agent {listed(unknown)} in {name}, which has {present}")
    chosen = frozenset(options.agents or spec.agents)
    agents = {agent: path for agent, path in spec.agents.items() if agent in chosen}
    return Spec(agents, spec.rollback_scripts)


def complete(spec: Spec, host: str, options: ActivateOptions) -> Spec:
    """Say who deploys, and sign all deployments, if the workspace has a place for that."""
    if host == HOSTED:
        if options.signer is not None:
            tell(f"warning: {host} has no place for signatures: nothing is signed")
        return spec
    if options.signer is None:
        return replace(spec, source=options.source)
    signatures = options.signer.sign_all(host, spec.agents, spec.rollback_scripts)
    return replace(spec, source=options.source, signatures=signatures)


# --- the order ------------------------------------------------------------------------------------


class Frozen(Error):
    """The workspace takes no orders at present. The message is its own."""


def post_order(peer: Peer, path: str, spec: Spec, deadline: float) -> Answer:
    """Send the order until it is answered. Raises Unreachable, or Frozen.

    To repeat it does no harm, as it names the state that the agents are to reach.
    """
    sent = False
    body = dumps(spec.to_json()).encode()
    headers = {"Content-Type": "application/json;charset=utf-8"}
    start, pause = time.monotonic(), 1.0
    while True:
        try:
            answer = http(peer, "POST", path, data=body, headers=headers)
            if answer.status == LOCKED:
                raise Frozen(sentence(answer.body) or f"{peer.host} is frozen (HTTP {LOCKED})")
            refusal = rejection(peer, answer)
            if not isinstance(refusal, Unreachable):
                return answer
            problem = refusal
        except Unreachable as error:
            problem = error
        pause, sent = max(pause, problem.retry_after), sent or problem.sent
        patience = PATIENCE if problem.overloaded else ORDER_PATIENCE
        if time.monotonic() + pause > min(start + patience, deadline):
            hint = f"; {maybe_started(peer)}" if sent else ""
            raise Unreachable(f"{problem}{hint}")
        tell(f"{problem}; trying again in {pause:.0f} s")
        time.sleep(pause)
        pause = min(2 * pause, 10.0)


def maybe_started(peer: Peer) -> str:
    """What is to be said where the answer to the order did not come."""
    place = "https://app.cachix.org" if peer.host == HOSTED else peer.host
    return f"the deployments may have been started: look at {place}"


def order(peer: Peer, spec: Spec, deadline: float) -> dict[str, tuple[str, str]]:
    """Order the deployments; the id and the URL of each, by agent. Raises Error.

    The ids are empty if the workspace only knows v1 of the API.
    """
    answer = post_order(peer, "/api/v2/deploy/activate", spec, deadline)
    if answer.status == 404:
        answer = post_order(peer, "/api/v1/deploy/activate", spec, deadline)
    if answer.status == 404:
        raise Unreachable(f"{peer.host} is not a workspace: it has no deploy API (HTTP 404)")
    try:
        record = decode_answer(peer, answer)
        records = checked_field(record, "agents", dict)
        expires = checked_field(record, "tokenExpires", str, optional=True)
        if expires:
            tell(f"warning: the token of CI expires on {clean(expires)[:10]}")
        return {agent: _id_and_url(records, agent) for agent in spec.agents}
    except Undecodable as problem:
        raise no_workspace(peer, problem) from None


def order_in_time(
    peer: Peer, spec: Spec, options: ActivateOptions, deadline: float
) -> dict[str, tuple[str, str]]:
    """Order as `order` does. Wait for a frozen workspace if that is wanted. Raises Error.

    Each try is signed anew: what is executed meanwhile must not be newer than the signature.
    """
    pause, told = THAW_SECONDS, ""
    while True:
        try:
            return order(peer, complete(spec, peer.host, options), deadline)
        except Frozen as error:
            left = deadline - time.monotonic()
            if not options.waits or left <= 0:
                raise
            if str(error) != told:
                told = str(error)
                tell(f"{told}; waiting until it takes orders again")
        time.sleep(min(pause, left))
        pause = min(1.5 * pause, MOST_THAW_SECONDS)


def _id_and_url(records: dict[str, Any], agent: str) -> tuple[str, str]:
    record = checked_field(records, agent, (dict, str))
    if isinstance(record, str):
        return "", record
    return uuid_field(record, "id"), checked_field(record, "url", str)


# --- the command ----------------------------------------------------------------------------------


def format_seconds(seconds: float) -> str:
    """A duration for people, such as 1.5 s or 0:01:30; a dash for none."""
    if seconds >= 60:
        return str(datetime.timedelta(seconds=round(seconds)))
    return f"{seconds:.1f} s" if seconds else "-"


def summarize(screen: Screen, followers: list[Follower]) -> None:
    """Print a line for each agent: result, duration, the closure's size, URL. Then the reasons."""
    rows = []
    for follower in followers:
        size = follower.state.closure_size
        size_text = "-" if size is None else format_size(size)
        result, duration = follower.state.result(follower.agent), format_seconds(follower.duration)
        rows.append([follower.agent, result, duration, size_text, follower.url])
    screen.print("")
    for row, follower in zip(align(rows), followers):
        row[1] = screen.paint(row[1], STATUS_COLOURS.get(follower.state.status))
        screen.print("  ".join(row).rstrip())
    for follower in followers:
        for line in follower.state.reasons():
            screen.print(f"{follower.agent}: {line}")


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends this command as an interrupt does."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM raise Terminated, if this is the main thread."""

    def end(*_: Any) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def announce(screen: Screen, peer: Peer, spec: Spec, followers: list[Follower]) -> None:
    """Print a line for each new deployment: its agent, URL and store path."""
    screen.print(f"Deploying by {peer.host}:")
    rows = [[follower.agent, follower.url, spec.agents[follower.agent]] for follower in followers]
    for index, row in enumerate(align(rows)):
        row[0] = screen.paint(row[0], NAME_COLOURS[index % len(NAME_COLOURS)])
        followers[index].label = row[0]
        screen.print("  ".join(row))


def activate_command(options: ActivateOptions) -> int:
    """Deploy a deploy.json, and follow the deployments; the exit status. Raises Error.

    Without --async it is an error if the workspace only knows v1 of the API: there is no id to
    follow a deployment by.
    """
    if not options.token:
        raise UsageError("no token: set CACHIX_ACTIVATE_TOKEN, or give --token-file=FILE")
    timeout = float("inf") if options.timeout is None else options.timeout
    deadline = time.monotonic() + timeout
    peer, spec = Peer.create(options.host, options.token), read_spec(options)
    orders: dict[str, tuple[str, str]] = {}
    try:
        with interruptible():
            orders = order_in_time(peer, spec, options, deadline)
            return show(peer, spec, orders, options.asynchronous, deadline)
    except KeyboardInterrupt as error:
        go_on = "the deployments go on" if orders else maybe_started(peer)
        tell(f"interrupted: {go_on}")
        return 143 if isinstance(error, Terminated) else 130


def show(
    peer: Peer,
    spec: Spec,
    orders: dict[str, tuple[str, str]],
    asynchronous: bool,
    deadline: float,
) -> int:
    """Follow deployments that were ordered; the exit status. Raises Error."""
    screen, wake = Screen(), threading.Event()
    followers = [
        Follower(peer, agent, id, clean(url), screen, wake) for agent, (id, url) in orders.items()
    ]
    announce(screen, peer, spec, followers)
    if asynchronous:
        return 0
    if not all(follower.id for follower in followers):
        hint = "but can't be asked how they end (v1 of its API): look at the URLs"
        raise Error(f"{peer.host} has started them, {hint}")
    try:
        follow(followers, screen, wake, deadline)
    finally:
        summarize(screen, followers)
    return 0 if all(one.state.status == SUCCEEDED for one in followers) else 1
