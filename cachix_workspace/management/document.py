"""The API in an application: its routes, its document, and the page that shows that."""

from __future__ import annotations

from typing import Any

from flask import Flask, render_template
from flask_smorest import Api

from cachix_protocol import __version__
from cachix_workspace.management import caches, fleet, keys, workspace
from cachix_workspace.management.shapes import Problem

BLUEPRINTS = (fleet.blueprint, caches.blueprint, keys.blueprint, workspace.blueprint)
METHODS = ("get", "post", "put", "patch", "delete")
BEARER = {"type": "http", "scheme": "bearer", "description": "an admin token, or one of CI"}


class Management(Api):
    """flask-smorest's, but for errors: those are answered as everywhere in the workspace."""

    ERROR_SCHEMA = Problem

    def _register_error_handlers(self) -> None:
        """Leave the application's handlers as they are."""


def add_to(app: Flask) -> Management:
    """Add the API to an application."""
    app.config.update(
        API_TITLE="cachix-deploy workspace",
        API_VERSION=__version__,
        OPENAPI_VERSION="3.1.0",
        OPENAPI_URL_PREFIX="/api/v1",
        OPENAPI_JSON_PATH="openapi.json",
    )
    api = Management(app)
    api.spec.components.security_scheme("token", BEARER)
    api.spec.options["security"] = [{"token": []}]
    for blueprint in BLUEPRINTS:
        api.register_blueprint(blueprint)

    @app.get("/api/v1/docs")
    def api_docs() -> str:
        """The document for people."""
        return render_template("api.html", groups=groups(api.spec.to_dict()), version=__version__)

    return api


def groups(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The operations of a document, by their tags."""
    by_tag: dict[str, list[dict[str, Any]]] = {}
    for path, item in document["paths"].items():
        for method in METHODS:
            operation = item.get(method)
            if operation is not None:
                parameters = [*item.get("parameters", []), *operation.get("parameters", [])]
                body = operation.get("requestBody", {}).get("content", {})
                schemas = [media["schema"].get("$ref", "") for media in body.values()]
                facts = {
                    "method": method.upper(),
                    "path": path,
                    "summary": operation.get("summary", ""),
                    "parameters": [one["name"] for one in parameters if one.get("in") == "query"],
                    "fields": _fields(document, schemas),
                }
                by_tag.setdefault(operation["tags"][0], []).append(facts)
    return by_tag


def _fields(document: dict[str, Any], references: list[str]) -> list[str]:
    """The names of what a body may have."""
    names: list[str] = []
    for reference in references:
        schema = document["components"]["schemas"].get(reference.rpartition("/")[2], {})
        required = schema.get("required", [])
        names += [f"{name}*" if name in required else name for name in schema.get("properties", {})]
    return names
