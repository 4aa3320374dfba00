"""Uploads of NARs and narinfos, which a push sends by the thousand: answered before Flask.

They are by a token, to a cache, that were seen a moment ago. Any other request, and any failure, is
the application's. `quick` takes small ones that come with known fields.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterable
from typing import Any

from cachix_protocol import BASE32
from cachix_workspace import audit, cache
from cachix_workspace.admission import BodyStream
from cachix_workspace.cache import CacheRow, Readable, Stored
from cachix_workspace.cache_reads import NOSNIFF, Note
from cachix_workspace.context import Workspace
from cachix_workspace.door import note_read, note_token
from cachix_workspace.refusal import Refusal
from cachix_workspace.stores import store_of
from cachix_workspace.tokens import CI, Token, digest

FAILURE = "workspace.failure"  # in the environ: what the application is to answer
WHERE = re.compile(
    f"/cache/([a-z0-9][a-z0-9-]{{0,62}})"
    f"/([{BASE32}]{{32}}\\.narinfo|nar/[{BASE32}]{{52}}\\.nar(?:\\.[a-z0-9]{{1,8}})?)"
)
# Requests of browsers, of parts, and without a length are answered by the application.
NOT_HERE = (
    "HTTP_ORIGIN",
    "HTTP_SEC_FETCH_SITE",
    "HTTP_CONTENT_RANGE",
    "HTTP_TRANSFER_ENCODING",
)
BODY = b"{}\n"
HEADERS = [
    ("Content-Type", "application/json"),
    ("Content-Length", str(len(BODY))),
    NOSNIFF,
    ("Cache-Control", "private"),
]
STATUS = {Stored.NEW: "201 CREATED", Stored.KNOWN: "200 OK"}


def find(workspace: Workspace, name: str) -> CacheRow:
    """The cache as the database has it. Raises Refusal (404) if there is none."""
    with workspace.database.read() as connection:
        row = cache.find(connection, name)
    if row is None:
        raise Refusal(404, f"there is no cache {name[:64]!r}")
    return row


def store_file(
    workspace: Workspace, row: CacheRow, file_name: str, body: Readable, length: int | None
) -> Stored:
    """Store a NAR or a narinfo. Raises Refusal."""
    files = store_of(workspace.settings, row.name)
    if not file_name.endswith(".narinfo"):
        return cache.store_nar(files, file_name, body, length)
    # its key may just have been rotated
    stored = cache.store_narinfo(
        files, file_name, body, length, row, lambda: find(workspace, row.name)
    )
    workspace.known.forget_file(row.name, file_name)
    return stored


def note_dropped(
    workspace: Workspace, token: Token, row: CacheRow, file_name: str, address: str
) -> None:
    """Note that an upload was dropped."""
    with workspace.database.write() as connection:
        detail = f"{file_name} of the cache {row.name}: another one is there, with other contents"
        audit.record(connection, token.label, "narinfo dropped", detail, address)


def may_write(workspace: Workspace, name: str, reader: str) -> tuple[Token, CacheRow] | None:
    """The token in a header, and a cache, if both are known, and it may push there."""
    row, token = workspace.known.caches.get(name), workspace.known.tokens.get(reader)
    if row is None or token is None or workspace.node.is_lost:
        return None
    is_allowed = token.kind in CI and token.cache_id in (None, row.id)
    return (token, row) if is_allowed else None


def store_small(
    workspace: Workspace, token: Token, row: CacheRow, file_name: str, body: bytes
) -> Stored | None:
    """Store an upload of which all has come; None if that fails."""
    source, settings = io.BytesIO(body), workspace.settings
    try:
        admitted = workspace.uploads.admit(settings, token.id, source, len(body), None)
        with admitted as counted:
            return store_file(workspace, row, file_name, counted, len(body))
    except Exception:  # the application tries it again, and says what is wrong
        return None


class CacheWrites:
    """WSGI middleware that takes uploads."""

    def __init__(self, app: Any, workspace: Workspace, note: Note) -> None:
        self.app, self.workspace, self.note = app, workspace, note

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        began = time.monotonic()
        match = WHERE.fullmatch(environ["PATH_INFO"]) if _is_plain(environ) else None
        reader = digest(environ.get("HTTP_AUTHORIZATION", ""))
        known = may_write(self.workspace, match[1], reader) if match else None
        if match is None or known is None:
            return self.app(environ, start_response)  # type: ignore[no-any-return]
        try:
            status = self._take(environ, *known, match[2])
        except Exception as error:
            environ[FAILURE] = error
            return self.app(environ, start_response)  # type: ignore[no-any-return]
        start_response(status, list(HEADERS))
        if environ["RAW_URI"] == environ["PATH_INFO"]:
            note_read(environ, reader)
        self.note("cache", "PUT", status[:3], began)
        return [BODY]

    def _take(self, environ: dict[str, Any], token: Token, row: CacheRow, file_name: str) -> str:
        """Take an upload; the status of the answer. Raises Refusal."""
        note_token(environ)
        workspace, length = self.workspace, int(environ["CONTENT_LENGTH"])
        body, sock = BodyStream(environ["wsgi.input"]), environ.get("gunicorn.socket")
        admitted = workspace.uploads.admit(workspace.settings, token.id, body, length, sock)
        with admitted as counted:
            stored = store_file(workspace, row, file_name, counted, length)
        if stored is Stored.DROPPED:
            note_dropped(workspace, token, row, file_name, environ.get("REMOTE_ADDR", ""))
        return STATUS.get(stored, "200 OK")


def _is_plain(environ: dict[str, Any]) -> bool:
    """Whether a request is a plain upload."""
    is_put = environ["REQUEST_METHOD"] == "PUT" and environ.get("CONTENT_LENGTH", "").isdigit()
    return is_put and not any(map(environ.get, NOT_HERE))
