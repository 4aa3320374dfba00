"""The document of the management API: whole, true, readable, and what is sent by it answered."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from flask import Flask
from hypothesis import HealthCheck, given, settings
from management_support import operations

from cachix_workspace import tokens
from cachix_workspace.app import create_app
from cachix_workspace.settings import Settings
from cachix_workspace.tokens import ADMIN

SECRET = "admin-for-schemathesis"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Flask:
    data: Path = tmp_path_factory.mktemp("data") / "data"
    app = create_app(Settings(data))
    with app.extensions["workspace"].database.write() as connection:
        tokens.create(connection, ADMIN, secret=SECRET)
    return app


@pytest.fixture(scope="module")
def document(app: Flask) -> dict[str, Any]:
    result: dict[str, Any] = app.test_client().get("/api/v1/openapi.json").get_json()
    return result


def described(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (method.upper(), path, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if method != "parameters"
    ]


def test_the_document_has_every_operation(app: Flask, document: dict[str, Any]) -> None:
    assert document["openapi"] == "3.1.0"
    assert document["security"] == [{"token": []}]
    result = {(method, re.sub("{[a-z_]+}", "1", path)) for method, path, _ in described(document)}
    assert result == {(one.method, f"/api/v1{one.path}") for one in operations(app)}


def test_an_error_is_described_as_it_is_answered(app: Flask, document: dict[str, Any]) -> None:
    for method, path, operation in described(document):
        assert operation["summary"], path
        assert "422" not in operation["responses"], (method, path)
        assert "default" in operation["responses"], (method, path)
    for response in document["components"]["responses"].values():
        schema = response["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/Problem"}
    headers = {"Authorization": f"Bearer {SECRET}"}
    answer = app.test_client().post("/api/v1/agents", json={"name": "ä"}, headers=headers)
    assert answer.status_code == 400 and list(answer.get_json()) == ["error"]
    assert "`name`" in answer.get_json()["error"]


def test_people_can_read_it_without_script_or_another_host(
    app: Flask, document: dict[str, Any]
) -> None:
    answer = app.test_client().get("/api/v1/docs")
    page = answer.get_data(as_text=True)
    for method, path, operation in described(document):
        assert f"{method} {path}" in page and operation["summary"] in page
    assert "<script" not in page and "style=" not in page and "//" not in page
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


@pytest.mark.long
def test_whatever_is_sent_is_answered_as_the_document_says(app: Flask) -> None:
    """Random requests that the document allows: no failure, and answers that it describes."""
    loaded = schemathesis.openapi.from_wsgi("/api/v1/openapi.json", app)
    tried = 0
    for result in loaded.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
        def try_it(case: Any) -> None:
            answer = case.call(headers={"Authorization": f"Bearer {SECRET}"})
            assert answer.status_code < 500, answer.text
            case.operation.validate_response(answer)
            if answer.status_code >= 400:
                assert list(answer.json()) == ["error"], answer.text

        try_it()
        tried += 1
    assert tried == len(operations(app))
