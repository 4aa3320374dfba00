"""The binary caches over HTTP, as Nix reads and pushes them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flask import Blueprint, Response, request, send_file
from sqlalchemy.exc import SQLAlchemyError

from cachix_protocol import Error, Undecodable, loads
from cachix_workspace import cache, holdings, narinfo, side_files
from cachix_workspace.admission import BodyStream, authenticate, read_body
from cachix_workspace.answers import json_answer
from cachix_workspace.cache import CacheRow, Stored
from cachix_workspace.cache_writes import FAILURE, find, note_dropped, store_file
from cachix_workspace.context import current_workspace
from cachix_workspace.refusal import Refusal
from cachix_workspace.settings import Settings
from cachix_workspace.stores import store_of
from cachix_workspace.tokens import ANY, CI, Token, digest

MOST_HASHES = 4 << 20  # bytes of a list of store paths' hashes: of some hundred thousand

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


def _find_to_read(name: str) -> CacheRow:
    """As `_find`, but a little old; of any age while there is no database."""
    caches = current_workspace().known.caches
    row = caches.get(name)
    if row is None:
        try:
            row = find(current_workspace(), name)
        except Refusal:
            raise
        except (Error, SQLAlchemyError):
            row = caches.get_stale(name)
            if row is None:
                raise
        caches.put(name, row)
    return row


def _user(kinds: frozenset[str]) -> Token:
    """The token of this request, a little old. Raises Refusal."""
    known = current_workspace().known.tokens
    header = digest(request.headers.get("Authorization", ""))
    token = known.get(header)
    if token is None or token.kind not in kinds:
        token = authenticate(kinds)
        known.put(header, token)
    return token


@cache_routes.get("/cache/<name>/nix-cache-info")
def get_info(name: str) -> Response:
    """The properties of a cache. Nix asks for them without a token."""
    _find_to_read(name)
    return Response(cache.INFO, mimetype="text/x-nix-cache-info")


@cache_routes.get("/cache/<name>/<path:file_name>")
def get_file(name: str, file_name: str) -> Response:
    """A narinfo, a NAR, or a file beside them."""
    row = _find_to_read(name)
    if not row.public:
        _user(ANY).check_cache(row.id)
    store = store_of(current_workspace().settings, row.name)
    is_beside = side_files.is_name(file_name)
    is_name = is_beside or cache.is_file_name(file_name)
    entry = store.entry(file_name) if is_name else None
    if entry is None:
        raise Refusal(404, f"there is no {file_name[:300]!r} in the cache {name}")
    kind = side_files.media_type(file_name) if is_beside else cache.media_type(file_name)
    source = store.source(file_name)
    if isinstance(source, Path):
        return send_file(source, mimetype=kind, conditional=True)
    if request.method == "HEAD":  # the link would be for GET only
        return Response(mimetype=kind, headers={"Content-Length": str(entry.size)})
    if file_name.startswith("nar/"):
        return Response(status=302, headers={"Location": source})
    content = store.read(file_name)
    return Response(content.body if content else b"", mimetype=kind)


@cache_routes.put("/cache/<name>/<path:file_name>")
def put_file(name: str, file_name: str) -> Response:
    """Upload a narinfo, a NAR, or a file beside them."""
    if FAILURE in request.environ:
        raise request.environ[FAILURE]
    token, row = _user(CI), _find_to_read(name)
    token.check_cache(row.id)
    is_beside = side_files.is_name(file_name)
    if not is_beside and not cache.is_file_name(file_name):
        raise Refusal(405, "a cache takes HASH.narinfo and nar/HASH.nar, compressed or not")
    _check_framing()
    workspace, length = current_workspace(), request.content_length
    body, sock = BodyStream(request.stream), request.environ.get("gunicorn.socket")
    admitted = workspace.uploads.admit(workspace.settings, token.id, body, length or 0, sock)
    with admitted as counted:
        if is_beside:
            files = store_of(workspace.settings, row.name)
            stored = side_files.put(files, file_name, counted, length)
        else:
            stored = store_file(workspace, row, file_name, counted, length)
    if stored is Stored.DROPPED:
        note_dropped(workspace, token, row, file_name, request.remote_addr or "")
    return json_answer({}, 201 if stored is Stored.NEW else 200)


def _check_framing() -> None:
    """Raises Refusal for an upload of a part, or of one whose end could not be told."""
    if "Content-Range" in request.headers:
        raise Refusal(400, "a cache takes whole files, no Content-Range")
    # without a length HTTP/1.0 ends a body by closing, as a connection that breaks does
    is_chunked = "Transfer-Encoding" in request.headers
    if request.content_length is None and not is_chunked:
        raise Refusal(411, "an upload needs a Content-Length, or to be chunked")


# --- pushes ---------------------------------------------------------------------------------------


def _pushed_to() -> CacheRow:
    """The cache that a token of CI pushes to: that of the query's `name`, else the token's own.

    Else it is the one that agents use. Raises Refusal.
    """
    token, name = authenticate(CI), request.args.get("name")
    with current_workspace().database.read() as connection:
        if name:
            row = cache.find_named(connection, name[:64])
            token.check_cache(row.id)
            return row
        default = cache.find_default(connection, token.cache_id)
    if default is None:
        raise Refusal(404, "there is no cache: make it with `cachix-workspace cache create`")
    return default


@cache_routes.get("/api/v1/deploy/cache")
def get_cache() -> Response:
    """The cache that CI pushes to, as agents are told of theirs."""
    row = _pushed_to()
    offer = cache.offer(row, current_workspace().settings, request.host)
    return json_answer(offer.to_json())


@cache_routes.post("/api/v1/deploy/cache/missing")
def post_missing() -> Response:
    """Those of a list of store paths' hashes that the cache does not have, or not whole."""
    row, hashes = _pushed_to(), loads(read_body(MOST_HASHES))
    names = [f"{one}.narinfo" for one in hashes] if isinstance(hashes, list) else [""]
    if not all(narinfo.FILE_NAME.fullmatch(name) for name in names):
        raise Undecodable("a list of store paths' hashes was expected")
    return json_answer({"missing": holdings.lacking(current_workspace().settings, row, hashes)})
