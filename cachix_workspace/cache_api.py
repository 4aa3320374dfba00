"""The binary caches over HTTP, as Nix reads and pushes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flask import Blueprint, Response, request, send_file

from cachix_workspace import audit, cache
from cachix_workspace.admission import BodyStream, authenticate
from cachix_workspace.answers import json_answer
from cachix_workspace.cache import CacheRow, Stored
from cachix_workspace.context import current_workspace
from cachix_workspace.refusal import Refusal
from cachix_workspace.settings import Settings
from cachix_workspace.tokens import ANY, CI

cache_routes = Blueprint("cache", __name__)


class ByHost:
    """WSGI middleware: a request to NAME.<one of our hosts> is one to /cache/NAME.

    Cachix's agent expects caches there.
    """

    def __init__(self, app: Any, settings: Settings) -> None:
        self.app, self.hosts = app, settings.hosts

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        host = cache.host_name(environ.get("HTTP_HOST", ""))
        name, _, rest = host.partition(".")
        if rest in self.hosts and cache.NAME.fullmatch(name):
            environ = {**environ, "PATH_INFO": f"/cache/{name}{environ.get('PATH_INFO', '/')}"}
        return self.app(environ, start_response)  # type: ignore[no-any-return]


def _find(name: str) -> CacheRow:
    """Raises Refusal (404) if there is no such cache."""
    with current_workspace().database.read() as connection:
        row = cache.find(connection, name)
    if row is None:
        raise Refusal(404, f"there is no cache {name[:64]!r}")
    return row


@cache_routes.get("/cache/<name>/nix-cache-info")
def get_info(name: str) -> Response:
    """The properties of a cache. Nix asks for them without a token."""
    _find(name)
    return Response(cache.INFO, mimetype="text/x-nix-cache-info")


@cache_routes.get("/cache/<name>/<path:file_name>")
def get_file(name: str, file_name: str) -> Response:
    """A narinfo or a NAR."""
    row = _find(name)
    if not row.public:
        authenticate(ANY).check_cache(row.id)
    path = cache.path_of(current_workspace().settings, row.name, file_name)
    if not cache.is_file_name(file_name) or not path.is_file():
        raise Refusal(404, f"there is no {file_name[:300]!r} in the cache {name}")
    return send_file(path, mimetype=cache.media_type(file_name), conditional=True)


@cache_routes.put("/cache/<name>/<path:file_name>")
def put_file(name: str, file_name: str) -> Response:
    """Upload a narinfo or a NAR."""
    token, row = authenticate(CI), _find(name)
    token.check_cache(row.id)
    if not cache.is_file_name(file_name):
        raise Refusal(405, "a cache takes HASH.narinfo and nar/HASH.nar, compressed or not")
    path = cache.path_of(current_workspace().settings, row.name, file_name)
    workspace, length = current_workspace(), request.content_length
    sock = request.environ.get("gunicorn.socket")
    admitted = workspace.uploads.admit(
        workspace.settings, token.id, BodyStream(), length or 0, sock
    )
    with admitted as body:
        if path.suffix == ".narinfo":
            stored = cache.store_narinfo(path, body, length, row)
        else:
            stored = cache.store_nar(path, body, length)
    if stored is Stored.DROPPED:
        with workspace.database.write() as connection:
            detail = f"{path.name} of the cache {name}: another one is there, with other contents"
            address = request.remote_addr or ""
            audit.record(connection, token.label, "narinfo dropped", detail, address)
    return json_answer({}, 201 if stored is Stored.NEW else 200)
