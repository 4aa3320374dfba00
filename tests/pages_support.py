"""Shared by the tests of pages: somebody who is signed in, and fills forms as a browser does."""

from __future__ import annotations

import html
import re
from typing import Any

import requests
from workspace_support import DEADLINE, Server

from cachix_workspace import people
from cachix_workspace.database import open_database
from cachix_workspace.pages.access import COOKIE
from cachix_workspace.people import ADMINISTRATOR
from cachix_workspace.settings import Settings


def cookie_of(server: Server, name: str, role: str = ADMINISTRATOR) -> str:
    """The cookie of a person, who is added if there is none of the name."""
    database = open_database(Settings(server.data))
    try:
        with database.write() as connection:
            person = people.find(connection, name) or people.add(connection, name, role)
            return people.begin(connection, "127.0.0.1", "a test", person_id=person.id)
    finally:
        database.close()


class Browser:
    """A person with a browser that runs no script."""

    def __init__(self, server: Server, name: str = "anna", role: str = ADMINISTRATOR) -> None:
        self.server = server
        self.session = requests.Session()
        self.session.headers["Accept"] = "text/html,application/xhtml+xml"
        if name:
            self.session.cookies.set(COOKIE, cookie_of(server, name, role))

    def get(self, path: str, status: int = 200, **options: Any) -> str:
        """The text of a page."""
        answer = self.session.get(self.server.url + path, timeout=DEADLINE, **options)
        assert answer.status_code == status, (path, answer.status_code, words(answer.text)[:500])
        return answer.text

    def post(self, path: str, /, status: int = 200, page: str = "/sign-in", **form: Any) -> str:
        """Send a form of `page`; the text of the page that follows."""
        self.last = self.send(path, page, **form)
        assert self.last.status_code == status, (path, self.last.status_code, words(self.last.text))
        return self.last.text

    def send(self, path: str, /, page: str = "/sign-in", **form: Any) -> requests.Response:
        """Send a form of `page`; the answer after redirects."""
        form["csrf_token"] = self.token(page)
        url = self.server.url + path
        return self.session.post(url, data=form, timeout=DEADLINE)

    def token(self, page: str = "/sign-in") -> str:
        """The token that forms have in this session."""
        text = self.session.get(self.server.url + page, timeout=DEADLINE).text
        match = re.search('name="csrf_token" value="([^"]+)"', text)
        assert match, words(text)
        return match[1]


def words(page: str) -> str:
    """The text of a page, as one reads it."""
    main = page[page.find("<main") :]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", main)).split())
