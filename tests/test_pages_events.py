"""The stream of changes that open pages follow."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from exhibits import Gallery, gallery
from workspace_support import DEADLINE, wait_for

from cachix_workspace import people
from cachix_workspace.pages import events
from cachix_workspace.pages.access import COOKIE


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gallery]:
    with gallery(tmp_path_factory.mktemp("events") / "data", 0) as shown:
        yield shown


@contextlib.contextmanager
def stream(shown: Gallery, cookie: str) -> Iterator[requests.Response]:
    """A stream of a session, from now on."""
    url = f"{shown.url}/events?since={shown.workspace.feed.last}"
    with requests.get(url, cookies={COOKIE: cookie}, stream=True, timeout=DEADLINE) as answer:
        assert answer.status_code == 200, answer.text
        yield answer


def messages(answer: requests.Response) -> Iterator[str]:
    """The data of the messages, as they come."""
    for line in answer.iter_lines(1, decode_unicode=True):
        if line.startswith("data: "):
            yield line[len("data: ") :]


def test_changes_are_told(shown: Gallery) -> None:
    with stream(shown, shown.cookie()) as answer:
        shown.workspace.feed.publish("agents", "agent:7")
        assert next(messages(answer)) == '["agents","agent:7"]'
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert answer.headers["X-Accel-Buffering"] == "no"


def test_a_page_after_the_other_is_no_reason_to_refuse_the_next(shown: Gallery) -> None:
    cookie = shown.cookie()
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(stream(shown, cookie)) for _ in range(10)]
        for old in streams[:2]:
            assert list(messages(old)) == [], "the oldest ones end"
        told: list[str] = []

        def listen(one: requests.Response) -> None:
            told.append(next(messages(one)))

        threads = [threading.Thread(target=listen, args=(one,)) for one in streams[2:]]
        for thread in threads:
            thread.start()
        shown.workspace.feed.publish("runs")
        for thread in threads:
            thread.join(DEADLINE)
        assert told == ['["runs"]'] * events.MOST_OF_ONE


def test_a_stream_ends_with_its_session_however_much_happens(
    shown: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "QUIET", 0.2)
    monkeypatch.setattr(events, "PAUSE", 0.01)
    cookie, stop = shown.cookie(), threading.Event()

    def keep_changing() -> None:
        while not stop.wait(0.02):
            shown.workspace.feed.publish("agents")

    thread = threading.Thread(target=keep_changing, daemon=True)
    thread.start()
    try:
        with stream(shown, cookie) as answer:
            found = messages(answer)
            assert next(found)
            with shown.workspace.database.write() as connection:
                one = people.viewer(connection, cookie)
                assert one is not None
                people.end(connection, one.session_id)
            assert all(message == '["agents"]' for message in found)  # and then no more
    finally:
        stop.set()
        thread.join(DEADLINE)


def test_a_browser_that_has_gone_leaves_nothing(
    shown: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "QUIET", 0.2)
    before = events.readers.count()
    with stream(shown, shown.cookie()):
        assert events.readers.count() == before + 1
    wait_for(lambda: events.readers.count() <= before)


def test_nobody_follows_without_a_session(shown: Gallery, tmp_path: Path) -> None:
    url = f"{shown.url}/events"
    answer = requests.get(url, allow_redirects=False, timeout=DEADLINE)
    assert answer.status_code == 303 and answer.headers["Location"].startswith("/sign-in")
