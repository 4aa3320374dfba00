"""Where a command works: on a workspace beside it, or from afar by the management API.

Both answer alike, as a workspace beside us is asked through the same API, in this process.
"""

from __future__ import annotations

import json
import re
from typing import Any, Protocol

from cachix_console import read_token
from cachix_protocol import Error, UsageError, checked_url
from cachix_workspace.cli.place import open_workspace, operator

TIMEOUT = 30.0  # seconds
PAGE = 1000  # things that are asked for at a time
TOKEN = "CACHIX_WORKSPACE_TOKEN"


class Backend(Protocol):
    """Takes requests of the management API."""

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The answer: what JSON says, or text. Raises Error."""


def backend(options: dict[str, Any]) -> Backend:
    """The workspace that a command line names. Raises Error."""
    if options.get("--url"):
        return Remote(options)
    if options.get("--token-file"):
        raise UsageError("--token-file goes with --url")
    return Local(options)


class Local:
    """A workspace beside us, perhaps under a server that runs."""

    def __init__(self, options: dict[str, Any]) -> None:
        import logging

        from flask import Flask

        from cachix_workspace import answers
        from cachix_workspace.context import KEY, Workspace
        from cachix_workspace.hub import Hub
        from cachix_workspace.life import Signs
        from cachix_workspace.management import access, document
        from cachix_workspace.orders import Actor

        self.database, settings = open_workspace(options)
        app = Flask("cachix_workspace", static_folder=None)
        app.extensions[KEY] = Workspace(settings, self.database, Hub(1), Signs())
        app.extensions[access.LOCAL] = Actor(operator())
        answers.register_error_handlers(app)
        # the command prints the same sentence
        answers.database_logger.addHandler(logging.NullHandler())
        document.add_to(app)
        self.client = app.test_client()

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The answer. A server that runs is told that something has changed. Raises Error."""
        from cachix_workspace.database import note_change

        url = f"/api/v1{path}"
        answer = self.client.open(url, method=method, json=body)
        value = read(answer.status_code, answer.mimetype or "", answer.get_data())
        if method != "GET":
            with self.database.write() as connection:
                note_change(connection)
        return value


class Remote:
    """A workspace at --url, with the token in --token-file."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.url = checked_url(options["--url"], "--url", "https://deploy.example.org")
        self.token = read_token(TOKEN, options["--token-file"])

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The answer. Raises Error."""
        import requests

        try:
            answer = requests.request(
                method,
                f"{self.url.rstrip('/')}/api/v1{path}",
                json=body,
                auth=self._authorize,
                timeout=TIMEOUT,
                allow_redirects=False,
            )
        except requests.RequestException as error:
            raise Error(f"{self.url} can't be reached: {type(error).__name__}") from None
        mimetype = answer.headers.get("Content-Type", "").partition(";")[0]
        return read(answer.status_code, mimetype, answer.content)

    def _authorize(self, request: Any) -> Any:
        """Requests would take what ~/.netrc has for the host in place of a header that was set."""
        request.headers["Authorization"] = f"Bearer {self.token}"
        return request


def every(where: Backend, path: str, key: str, most: int | None = None) -> list[Any]:
    """The things of a list, page by page, or the first `most` of them. Raises Error."""
    things: dict[Any, Any] = {}
    page: int | None = 1
    while page is not None and (most is None or len(things) < most):
        limit = min(PAGE, PAGE if most is None else most)
        mark = "&" if "?" in path else "?"
        answer = where.call("GET", f"{path}{mark}page={page}&limit={limit}")
        # whatever is new meanwhile moves others to the next page
        things.update((one.get("id", one.get("name")), one) for one in answer[key])
        page = answer["next"]
    return list(things.values())[:most]


def read(status: int, mimetype: str, content: bytes) -> Any:
    """The value of an answer. Raises Error for one that is none of success."""
    text = content.decode("utf-8", "replace")
    value: Any = text
    if mimetype == "application/json" and text.strip():
        try:
            value = json.loads(text)
        except ValueError:
            raise Error("the workspace's answer is no JSON: is this its URL?") from None
    if 200 <= status < 300:
        return value
    if isinstance(value, dict) and "error" in value:
        sentence = str(value["error"])
        # the API names the request, which whoever ran a command did not write
        raise Error(re.sub(r"^[A-Z]+ /api/v1[^ ]*: ", "", sentence))
    raise Error(f"the workspace answered with status {status}: is this its URL?")
