"""The stream of changes that open pages follow."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from exhibits import Gallery, gallery
from pages_support import cookie_of
from workspace_support import DEADLINE, running, wait_for

from cachix_workspace import people
from cachix_workspace.pages import events
from cachix_workspace.pages.access import COOKIE


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gallery]:
    with gallery(tmp_path_factory.mktemp("events") / "data", 0) as site:
        yield site


@contextlib.contextmanager
def stream(site: Gallery, cookie: str) -> Iterator[requests.Response]:
    """A stream of a session, from now on."""
    url = f"{site.url}/events?since={site.workspace.feed.last}"
    with requests.get(url, cookies={COOKIE: cookie}, stream=True, timeout=DEADLINE) as answer:
        assert answer.status_code == 200, answer.text
        yield answer


def messages(answer: requests.Response) -> Iterator[str]:
    """The data of the messages, as they come."""
    for line in answer.iter_lines(1, decode_unicode=True):
        if line.startswith("data: "):
            yield line[len("data: ") :]


def test_changes_are_told(site: Gallery) -> None:
    with stream(site, site.cookie()) as answer:
        site.workspace.feed.publish("agents", "agent:7")
        assert next(messages(answer)) == '["agents","agent:7"]'
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert answer.headers["X-Accel-Buffering"] == "no"


def test_a_page_after_the_other_is_no_reason_to_refuse_the_next(site: Gallery) -> None:
    cookie = site.cookie()
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(stream(site, cookie)) for _ in range(10)]
        for old in streams[:2]:
            assert list(messages(old)) == [], "the oldest ones end"
        topics: list[str] = []

        def listen(one: requests.Response) -> None:
            topics.append(next(messages(one)))

        threads = [threading.Thread(target=listen, args=(one,)) for one in streams[2:]]
        for thread in threads:
            thread.start()
        site.workspace.feed.publish("runs")
        for thread in threads:
            thread.join(DEADLINE)
        assert topics == ['["runs"]'] * events.MOST_OF_ONE


def test_a_stream_ends_with_its_session_however_much_happens(
    site: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "QUIET", 0.2)
    monkeypatch.setattr(events, "PAUSE", 0.01)
    cookie, stop = site.cookie(), threading.Event()

    def keep_changing() -> None:
        while not stop.wait(0.02):
            site.workspace.feed.publish("agents")

    thread = threading.Thread(target=keep_changing, daemon=True)
    thread.start()
    try:
        with stream(site, cookie) as answer:
            changes = messages(answer)
            assert next(changes)
            with site.workspace.database.write() as connection:
                one = people.viewer(connection, cookie)
                assert one is not None
                people.end(connection, one.session_id)
            assert all(message == '["agents"]' for message in changes)  # and then no more
    finally:
        stop.set()
        thread.join(DEADLINE)


def test_a_browser_that_has_gone_leaves_nothing(
    site: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "QUIET", 0.2)
    monkeypatch.setattr(events, "readers", events.Readers())  # other tests' readers may still leave
    with stream(site, site.cookie()):
        assert events.readers.count() == 1
    wait_for(lambda: events.readers.count() == 0)


def test_nobody_follows_without_a_session(site: Gallery, tmp_path: Path) -> None:
    url = f"{site.url}/events"
    answer = requests.get(url, allow_redirects=False, timeout=DEADLINE)
    assert answer.status_code == 303 and answer.headers["Location"].startswith("/sign-in")


def test_a_server_keeps_a_stream_open() -> None:
    with running() as server:
        cookies = {COOKIE: cookie_of(server, "anna")}
        url = f"{server.url}/events?since=0"
        with requests.get(url, cookies=cookies, stream=True, timeout=DEADLINE) as answer:
            assert "Content-Length" not in answer.headers
            assert next(messages(answer)) == '["all"]'
            server.command("freeze", "the audit is on")
            assert next(messages(answer)) == '["all"]'
