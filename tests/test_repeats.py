"""Messages that repeat are counted, and printed ever more rarely."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Iterator

from hosts import Host, wait_until
from peer import Peer as Workspace
from servers import listen

from cachix_repeats import Repeats

WAITS = json.dumps({"backoff": 0.02, "slowest": 0.05})


def test_a_message_that_repeats_is_counted() -> None:
    messages: list[str] = []
    now = 0.0
    repeats = Repeats(messages.append, lambda: now)
    printed = []
    for _ in range(14401):  # four hours, a message each second
        before = len(messages)
        repeats.tell("no connection")
        if len(messages) > before:
            printed.append(now)
        now += 1
    assert printed == [0, 60, 120, 240, 480, 960, 1920, 3840, 7440, 11040]
    assert messages[0] == "no connection"
    assert messages[1] == "no connection (repeated 60 times in 1 min)"
    assert messages[-1] == "no connection (repeated 11040 times in 3 h)"


def test_messages_that_take_turns_are_counted_too() -> None:
    messages: list[str] = []
    repeats = Repeats(messages.append, lambda: 0.0)
    for _ in range(10):
        repeats.tell("one")
        repeats.tell("two")
    assert messages == ["one", "two"]
    repeats.forget()
    repeats.tell("one")
    assert messages == ["one", "two", "one"]


def test_messages_that_differ_always_cost_no_memory() -> None:
    messages: list[str] = []
    repeats = Repeats(messages.append)
    for number in range(10_000):
        repeats.tell(str(number))
    assert len(messages) == 10_000 and len(repeats.counts) <= 50


def test_an_agent_says_once_that_it_can_not_connect(host: Host, peer: Workspace) -> None:
    peer.stop()
    agent = host.agent("web", peer.url, "t0ken", env={"CACHIX_DEPLOY_WAITS": WAITS})
    agent.wait_for("no connection")
    wait_until(lambda: agent.text().count("\n") >= 1)
    with listening(peer.port) as count:  # it goes on trying
        wait_until(lambda: len(count) > 5, 10, "more attempts")
    assert len(re.findall("Connection refused", agent.text())) == 1, agent.text()
    assert agent.text().count("\n") < 6
    peer.restart()
    agent.wait_for("web is connected to")
    assert agent.stop() == 0


@contextlib.contextmanager
def listening(port: int) -> Iterator[list[int]]:
    """Accept connections on a port and end them at once; yields a list that grows with each."""
    count: list[int] = []
    listener, _ = listen(lambda connection: count.append(1), port=port)
    yield count
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()
