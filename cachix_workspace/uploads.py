"""Uploads in progress: how large each may become, how much a token may leave unfinished."""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
from collections.abc import Iterator
from typing import Any

from cachix_workspace.cache import Readable
from cachix_workspace.refusal import Refusal
from cachix_workspace.settings import Settings


def gib(size: int) -> str:
    """A number of bytes for people."""
    return f"{round(size / (1 << 30), 3):g} GiB"


class Uploads:
    """All uploads in progress. Its lock is held for sums only, never while anything is read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: set[Upload] = set()

    @contextlib.contextmanager
    def admit(
        self, settings: Settings, token_id: int, body: Readable, announced: int, sock: Any
    ) -> Iterator[Upload]:
        """An upload of so many bytes, 0 if that is not known; its body. Raises Refusal."""
        upload = Upload(self, settings, token_id, body, announced, sock)
        try:
            with self._lock:
                self._all.add(upload)
            self.check(upload, 0)
            yield upload
        finally:
            with self._lock:
                self._all.discard(upload)

    def check(self, upload: Upload, more: int) -> None:
        """Count bytes of an upload. Raises Refusal if it can't go on."""
        settings = upload.settings
        free = shutil.disk_usage(settings.cache_place).free
        with self._lock:
            upload.received += more
            mine = sum(each.size for each in self._all if each.token_id == upload.token_id)
            left = free - sum(each.rest for each in self._all)
        if upload.ended:
            raise Refusal(401, "the upload is broken off: the token was revoked or has expired")
        if upload.size > settings.max_nar:
            most = gib(settings.max_nar)
            raise Refusal(
                413, f"a NAR has at most {most} here: see `cachix-workspace serve --max-nar`"
            )
        if mine > settings.max_unfinished:
            most = gib(settings.max_unfinished)
            raise Refusal(
                429, f"unfinished uploads of a token have at most {most}: try again later"
            )
        if left < settings.keep_free:
            raise Refusal(
                507,
                f"the workspace keeps {gib(settings.keep_free)} of its disk free, and {gib(free)} "
                "are: make room there, or see `cachix-workspace serve --keep-free`",
            )

    def token_ids(self) -> set[int]:
        """The tokens whose uploads are in progress."""
        with self._lock:
            return {upload.token_id for upload in self._all}

    def revoke(self, token_ids: set[int]) -> None:
        """Break off the uploads of these tokens."""
        with self._lock:
            revoked = [upload for upload in self._all if upload.token_id in token_ids]
        for upload in revoked:
            upload.end()


class Upload:
    """The body of an upload, counted while it is read."""

    def __init__(
        self,
        uploads: Uploads,
        settings: Settings,
        token_id: int,
        body: Readable,
        announced: int,
        sock: Any,
    ) -> None:
        self._uploads, self._body, self._socket = uploads, body, sock
        self.settings, self.token_id = settings, token_id
        self.announced, self.received = announced, 0
        self.ended = False

    @property
    def size(self) -> int:
        """Bytes that it will take on the disk, as far as that is known."""
        return max(self.announced, self.received)

    @property
    def rest(self) -> int:
        """Bytes that are announced, and have not come yet."""
        return self.size - self.received

    def read(self, size: int, /) -> bytes:
        """The next block. Raises Refusal."""
        try:
            block = self._body.read(size)
        except Refusal:
            self._uploads.check(self, 0)  # if we have ended it, say so
            raise
        if block or self.ended:
            self._uploads.check(self, len(block))
        return block

    def end(self) -> None:
        """Break it off, from any thread: whoever reads it waits no longer."""
        self.ended = True
        if self._socket is not None:
            with contextlib.suppress(OSError):  # the peer has left
                self._socket.shutdown(socket.SHUT_RD)
