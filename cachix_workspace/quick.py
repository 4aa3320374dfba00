"""Reads of narinfos without gunicorn, for heads that it has understood before.

A client sends the same fields with each request. The fields of a read that was answered before
Flask are known by their bytes, and so is, for a moment, the file that was read. The lot's thread
answers from memory; any other file is read by a thread, and its connection stays in the lot.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from email.utils import formatdate

from cachix_protocol import BASE32
from cachix_workspace.cache_reads import (
    KEPT,
    Answer,
    Known,
    Note,
    may_read,
    read_narinfo,
)
from cachix_workspace.settings import Settings

MOST_FIELDS = 4096  # bytes of the fields of a head; longer ones are not remembered
END = b"\r\n\r\n"
LETTER = BASE32.encode()
READ = re.compile(
    rb"(GET|HEAD) /cache/([a-z0-9][a-z0-9-]{0,62})"
    rb"/([%b]{32}\.narinfo|nar/[%b]{52}\.nar(?:\.[a-z0-9]{1,8})?) HTTP/1\.1\r\n" % (LETTER, LETTER)
)
LEARNT = re.compile(rb"[A-Z]+ [^\r\n]+ HTTP/1\.1\r\n")


@dataclass(frozen=True)
class Read:
    """A read of a narinfo, or a look whether a NAR is there, by one who may.

    `size` is the bytes of the request, `reader` the hash of the header that has the token, which is
    empty without one.
    """

    size: int
    method: str
    cache: str
    name: str
    reader: str
    began: float


class Quick:
    """What is known of heads and files."""

    def __init__(self, settings: Settings, known: Known, note: Note) -> None:
        self._settings, self._known, self._note = settings, known, note
        self._date = (0, b"")

    def learn(self, head: bytearray, reader: str) -> None:
        """Remember who reads with the fields of a head, to which the application adds nothing."""
        match = LEARNT.match(head)
        end = head.find(END, match.end() - 2) if match else -1
        if match and 0 <= end <= match.end() + MOST_FIELDS:
            fields = bytes(head[match.end() : end + len(END)])
            self._known.readers.put(fields, reader, len(fields))

    def ask(self, head: bytearray) -> Read | None:
        """The read that bytes begin with; None if the application has to see to them."""
        match = READ.match(head)
        end = head.find(END, match.end() - 2) if match else -1
        if match is None or end < 0:
            return None
        size = end + len(END)
        reader = self._known.readers.get(bytes(head[match.end() : size]))
        if reader is None:
            return None
        method, cache, name = (part.decode() for part in match.groups())
        is_nar = method == "GET" and name.startswith("nar/")
        if is_nar or not may_read(self._known, cache, reader):
            return None
        return Read(size, method, cache, name, reader, time.monotonic())

    def remembered(self, read: Read) -> bytes | None:
        """The answer to a read, if its file was read within KEPT seconds."""
        if read.method != "GET":
            return None
        found = self._known.files.get((read.cache, read.name, bool(read.reader)))
        if found is None or read.began > found[1]:
            return None
        self._note("cache", "GET", "200", read.began)
        return b"HTTP/1.1 200 OK\r\nDate: %b%b" % (self._now(), found[0])

    def answer(self, read: Read) -> bytes | None:
        """The answer to a read, for any thread; None if the application has to see to it."""
        answer = read_narinfo(self._settings, read.cache, read.name, bool(read.reader))
        if answer is None:
            return None
        status, rest = answer[0], _without_date(answer, read.method)
        if status.startswith("200") and read.method == "GET":
            key = (read.cache, read.name, bool(read.reader))
            self._known.files.put(key, (rest, read.began + KEPT), len(rest))
        self._note("cache", read.method, status[:3], read.began)
        return b"HTTP/1.1 %b\r\nDate: %b%b" % (status.encode(), self._now(), rest)

    def _now(self) -> bytes:
        """The time, as a Date header has it."""
        second, text = self._date
        now = int(time.time())
        if now != second:
            text = formatdate(now, usegmt=True).encode()
            self._date = (now, text)
        return text


def _without_date(answer: Answer, method: str) -> bytes:
    """What follows the date in an answer as gunicorn writes it."""
    _, headers, body = answer
    lines = ["", "Connection: keep-alive", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body if method == "GET" else b"")
