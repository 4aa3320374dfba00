"""Reads of narinfos, which Nix asks for by the thousand: answered before Flask, from what is known.

A cache's row and a token count as they were for KEPT seconds, so that these reads touch no
database, and go on while there is none. Any other request, and any refusal, is the application's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import IO, Any, Generic, TypeVar

from werkzeug.wsgi import FileWrapper

from cachix_protocol import BASE32, dumps
from cachix_workspace.cache import INFO, CacheRow, media_type
from cachix_workspace.door import note_read
from cachix_workspace.files import Content
from cachix_workspace.memory import Memory
from cachix_workspace.settings import Settings
from cachix_workspace.stores import store_of
from cachix_workspace.tokens import Token, digest

KEPT = 2.0  # seconds: a token that is revoked ends within them
BLOCK = 1 << 18  # bytes of a NAR in memory
MOST = 10_000  # tokens or caches that are known at a time
WHERE = re.compile(
    f"/cache/([a-z0-9][a-z0-9-]{{0,62}})/(nix-cache-info|[{BASE32}]{{32}}\\.narinfo)"
)
# Requests of browsers, of parts, and with conditions are answered by the application.
NOT_HERE = (
    "HTTP_ORIGIN",
    "HTTP_SEC_FETCH_SITE",
    "HTTP_RANGE",
    "HTTP_IF_NONE_MATCH",
    "HTTP_IF_MODIFIED_SINCE",
    "HTTP_TRANSFER_ENCODING",
    "HTTP_EXPECT",
    "CONTENT_LENGTH",
)
UTF_8 = "; charset=utf-8"
NOSNIFF = ("X-Content-Type-Options", "nosniff")

Value = TypeVar("Value")
Note = Callable[[str, str, str, float], None]  # part, method, status, when it began
Answer = tuple[str, list[tuple[str, str]], bytes]  # status, headers, body


class Kept(Generic[Value]):
    """Values of the database by their keys, each for KEPT seconds."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[Value, float]] = {}

    def get(self, key: str) -> Value | None:
        """The value, unless it is too old."""
        value, until = self._values.get(key, (None, 0.0))
        return value if time.monotonic() < until else None

    def get_stale(self, key: str) -> Value | None:
        """The value, of whatever age: for the time that there is no database."""
        return self._values.get(key, (None, 0.0))[0]

    def put(self, key: str, value: Value) -> None:
        """Know a value that was read just now."""
        if len(self._values) >= MOST:
            self._values.clear()
        self._values[key] = (value, time.monotonic() + KEPT)

    def clear(self) -> None:
        """Know nothing."""
        self._values.clear()


@dataclass(frozen=True)
class Known:
    """The caches by name, and the tokens that may read them by the hash of their header.

    `readers` are those hashes by the bytes of a request's fields, and `files` answers by cache,
    file, and whether a token was shown, with the moment at which they are too old: see `quick`.
    """

    caches: Kept[CacheRow] = field(default_factory=Kept)
    tokens: Kept[Token] = field(default_factory=Kept)
    readers: Memory[bytes, str] = field(default_factory=Memory)
    files: Memory[tuple[str, str, bool], tuple[bytes, float]] = field(default_factory=Memory)

    def forget_file(self, cache: str, name: str) -> None:
        """Forget a file that may be another one now."""
        for has_token in (True, False):
            self.files.forget((cache, name, has_token))


class Blocks(FileWrapper):
    """A file in blocks: of 8 KiB, as is usual, they would cost a NAR most of its speed."""

    def __init__(self, file: IO[bytes], _size: int = 0) -> None:
        super().__init__(file, BLOCK)


class CacheReads:
    """WSGI middleware that answers reads of narinfos and of `nix-cache-info`."""

    def __init__(self, app: Any, settings: Settings, known: Known, note: Note) -> None:
        self.app, self.settings, self.known, self.note = app, settings, known, note

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        began = time.monotonic()
        answer = self._answer(environ)
        if answer is None:
            environ["wsgi.file_wrapper"] = Blocks
            return self.app(environ, start_response)  # type: ignore[no-any-return]
        status, headers, body = answer
        start_response(status, headers)
        if environ["RAW_URI"] == environ["PATH_INFO"]:
            note_read(environ, _reader(environ))
        self.note("cache", environ["REQUEST_METHOD"], status[:3], began)
        return [body] if environ["REQUEST_METHOD"] == "GET" else []

    def _answer(self, environ: dict[str, Any]) -> Answer | None:
        """The answer to a plain read; None if the application has to see to the request."""
        match = WHERE.fullmatch(environ["PATH_INFO"])
        is_plain = environ["REQUEST_METHOD"] in ("GET", "HEAD")
        if match is None or not is_plain or any(map(environ.get, NOT_HERE)):
            return None
        reader = _reader(environ)
        if not may_read(self.known, match[1], reader):
            return None
        if match[2] == "nix-cache-info":
            answer = _answer("200 OK", f"text/x-nix-cache-info{UTF_8}", INFO)
            answer[1].extend([("Cache-Control", "private")] if reader else [])
            return answer
        return read_narinfo(self.settings, match[1], match[2], bool(reader))


def _reader(environ: dict[str, Any]) -> str:
    """The hash of the header that has the token; empty without one."""
    header = environ.get("HTTP_AUTHORIZATION")
    return "" if header is None else digest(header)


def may_read(known: Known, name: str, reader: str) -> bool:
    """Whether one who has shown this header is known to be allowed to read a cache."""
    row = known.caches.get(name)
    if row is None or row.public:
        return row is not None
    token = known.tokens.get(reader)
    return token is not None and token.cache_id in (None, row.id)


def read_narinfo(settings: Settings, cache_name: str, name: str, is_private: bool) -> Answer | None:
    """The answer with a narinfo, or that there is none; None if the files can't be read.

    Of a NAR this answers only that there is none.
    """
    store = store_of(settings, cache_name)
    try:
        if name.startswith("nar/") and store.entry(name) is not None:
            return None
        content = None if name.startswith("nar/") else store.read(name)
    except OSError:
        return None
    status, headers, body = _narinfo(cache_name, name, content)
    if is_private:
        headers.append(("Cache-Control", "private"))
    elif content is not None:
        headers.append(("Cache-Control", "no-cache"))
    return status, headers, body


def _narinfo(cache_name: str, name: str, content: Content | None) -> Answer:
    if content is None:
        sentence = f"there is no {name!r} in the cache {cache_name}"
        return _answer("404 NOT FOUND", "application/json", dumps({"error": sentence}) + "\n")
    status, headers, body = _answer("200 OK", media_type(name) + UTF_8, content.body)
    headers.append(("Last-Modified", formatdate(content.modified / 1e9, usegmt=True)))
    return status, headers, body


def _answer(status: str, kind: str, body: str | bytes) -> Answer:
    content = body.encode() if isinstance(body, str) else body
    length = ("Content-Length", str(len(content)))
    return status, [("Content-Type", kind), length, NOSNIFF], content
