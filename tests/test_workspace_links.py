"""No log has the secret of a link that signs somebody in."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator

import pytest
import requests
from workspace_support import DEADLINE, command, running, wait_for

from cachix_workspace.server import hide_links


@pytest.fixture
def hiding() -> Iterator[None]:
    former = logging.getLogRecordFactory()
    hide_links()
    yield
    logging.setLogRecordFactory(former)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("%s %s failed", ("GET", "/sign-in/SECRET")),
        ("Error handling request /sign-in/SECRET?next=%2F", ()),
        ('%(m)s "GET /sign-in/SECRET HTTP/1.1" 303 "http://x/sign-in/SECRET"', ({"m": "x"},)),
    ],
)
@pytest.mark.usefixtures("hiding")
def test_a_link_is_masked_wherever_it_stands(
    message: str, arguments: tuple[object, ...], caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("gunicorn.error").error(message, *arguments)
    [record] = caplog.records
    assert "SECRET" not in record.getMessage() and "/sign-in/..." in record.getMessage()


@pytest.mark.usefixtures("hiding")
def test_other_messages_stay_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("x").warning("%s has %d of 100%%", "/agents/web", 3)
    [record] = caplog.records
    assert record.args == ("/agents/web", 3)
    assert record.getMessage() == "/agents/web has 3 of 100%"


@pytest.mark.sqlite
def test_a_request_that_fails_is_logged_without_it() -> None:
    with running() as server:
        link = command("login-link", f"--data={server.data}").stdout.strip()
        secret = link.rpartition("/")[2]
        with sqlite3.connect(server.data / "workspace.db") as database:
            database.execute("drop table links")
        answer = requests.get(link, timeout=DEADLINE)
        assert answer.status_code == 503
        wait_for(lambda: any("failed" in line for line in server.lines))
        text = "\n".join(server.lines)
        assert "/sign-in/..." in text and secret not in text
