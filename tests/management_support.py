"""Shared by the tests of the management API: a program with a token, and all operations."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import requests
from flask import Flask
from workspace_support import DEADLINE, STORE_PATHS, Server

from cachix_workspace.management.document import BLUEPRINTS

# The body of each operation
BODIES: dict[str, dict[str, Any]] = {
    "add_agent": {"name": "x"},
    "change_agent": {},
    "start_deployments": {"agents": ["x"], "storePath": STORE_PATHS[0]},
    "retry_run": {},
    "roll_back_run": {},
    "create_token": {"kind": "admin"},
    "create_cache": {"name": "x"},
    "collect_garbage": {},
    "pin_path": {"storePath": STORE_PATHS[0]},
    "add_person": {"name": "x", "role": "viewer"},
    "change_role": {"role": "viewer"},
    "create_webhook": {"url": "https://x.example"},
    "freeze_workspace": {"reason": "x"},
    "change_workspace": {"name": "x"},
}


class Client:
    """A program with a token."""

    def __init__(self, server: Server, token: str | None) -> None:
        self.server, self.token = server, token

    def send(self, method: str, path: str, **options: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        headers.update(options.pop("headers", {}))
        url = f"{self.server.url}/api/v1{path}"
        return requests.request(method, url, headers=headers, timeout=DEADLINE, **options)

    def __call__(self, method: str, path: str, status: int = 200, **body: Any) -> Any:
        answer = self.send(method, path, json=body or None)
        assert answer.status_code == status, (method, path, answer.status_code, answer.text)
        is_json = answer.headers.get("Content-Type", "").startswith("application/json")
        return answer.json() if is_json and answer.content else answer.text


class Operation(NamedTuple):
    """An operation, with a path in which each thing is called 1."""

    function: str
    method: str
    path: str

    @property
    def title(self) -> str:
        return f"{self.method} {self.path}"


def operations(app: Flask) -> list[Operation]:
    """All operations of the API, from the application's routes."""
    names = {blueprint.name for blueprint in BLUEPRINTS}
    pairs = []
    for rule in app.url_map.iter_rules():
        blueprint, _, function = rule.endpoint.partition(".")
        if blueprint in names:
            path = re.sub("<(int:)?[a-z_]+>", "1", rule.rule).removeprefix("/api/v1")
            methods = sorted((rule.methods or set()) - {"HEAD", "OPTIONS"})
            pairs += [Operation(function, method, path) for method in methods]
    return sorted(pairs)
