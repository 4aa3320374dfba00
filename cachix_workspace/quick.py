"""Reads of narinfos, and small uploads, without gunicorn, for heads that it has understood before.

A client sends the same fields with each request. The fields of a read that was answered before
Flask are known by their bytes, and so is, for a moment, the file that was read. The lot's thread
answers from memory. Any other file is read, or stored, by a thread, and its connection stays in the
lot.
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
    Note,
    may_read,
    read_narinfo,
)
from cachix_workspace.cache_writes import BODY, HEADERS, STATUS, may_write, store_small
from cachix_workspace.context import Workspace
from cachix_workspace.stores import store_of

MOST_FIELDS = 4096  # bytes of the fields of a head; longer ones are not remembered
END = b"\r\n\r\n"
LETTER = BASE32.encode()
FILE = (
    rb"([a-z0-9][a-z0-9-]{0,62})"
    rb"/([%b]{32}\.narinfo|nar/[%b]{52}\.nar(?:\.[a-z0-9]{1,8})?) HTTP/1\.1\r\n" % (LETTER, LETTER)
)
READ = re.compile(rb"(GET|HEAD) /cache/" + FILE)
WRITE = re.compile(rb"(PUT) /cache/" + FILE)
LEARNT = re.compile(rb"[A-Z]+ [^\r\n]+ HTTP/1\.1\r\n")
LENGTH = re.compile(rb"(?im)^content-length:[ \t]*\d{1,15}[ \t]*\r\n")


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


@dataclass(frozen=True)
class Write(Read):
    """A small upload by one who may, of which all has come. Its body begins at `start`."""

    start: int


class Quick:
    """What is known of heads and files."""

    def __init__(self, workspace: Workspace, note: Note) -> None:
        self._workspace, self._note = workspace, note
        self._settings, self._known = workspace.settings, workspace.known
        self._date = (0, b"")

    def learn(self, head: bytearray, reader: str) -> None:
        """Remember who asks with the fields of a head, to which the application adds nothing."""
        match = LEARNT.match(head)
        end = head.find(END, match.end() - 2) if match else -1
        if match and 0 <= end <= match.end() + MOST_FIELDS:
            fields = bytes(head[match.end() : end + len(END)])
            if head.startswith(b"PUT "):
                fields = _of_upload(fields)
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

    def ask_to_write(self, head: bytearray, size: int) -> Write | None:
        """The upload that these bytes are, so many; None if the application has to see to it."""
        match = WRITE.match(head)
        end = head.find(END, match.end() - 2) if match else -1
        if match is None or end < 0:
            return None
        start = end + len(END)
        reader = self._known.readers.get(_of_upload(bytes(head[match.end() : start])))
        cache, name = match[2].decode(), match[3].decode()
        if reader is None or may_write(self._workspace, cache, reader) is None:
            return None
        return Write(size, "PUT", cache, name, reader, time.monotonic(), start)

    def store(self, write: Write, body: bytes) -> bytes | None:
        """Store an upload, for any thread; the answer.

        None if the application has to see to it: it says what is wrong, and notes what is dropped.
        """
        known = may_write(self._workspace, write.cache, write.reader)
        stored = known and store_small(self._workspace, *known, write.name, body)
        if stored not in STATUS:
            return None
        status = STATUS[stored]
        self._note("cache", "PUT", status[:3], write.began)
        rest = _without_date((status, HEADERS, BODY), "PUT")
        return b"HTTP/1.1 %b\r\nDate: %b%b" % (status.encode(), self._now(), rest)

    def remembered(self, read: Read) -> bytes | None:
        """The answer to a read, if its file was read within KEPT seconds."""
        if read.method != "GET":
            return None
        found = self._known.files.get((read.cache, read.name, bool(read.reader)))
        if found is None or read.began > found[1]:
            return None
        self._note("cache", "GET", "200", read.began)
        return b"HTTP/1.1 200 OK\r\nDate: %b%b" % (self._now(), found[0])

    def absent(self, read: Read) -> bytes | None:
        """The answer to a read of a file that is not in a directory of our own.

        Before a push all are asked for: one look there takes less than handing it to a thread.
        """
        if self._settings.has_shared_cache:  # the network may take its time
            return None
        try:
            is_there = store_of(self._settings, read.cache).entry(read.name) is not None
        except OSError:
            return None
        return None if is_there else self.answer(read)

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
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (b"" if method == "HEAD" else body)


def _of_upload(fields: bytes) -> bytes:
    """What is remembered of an upload's fields: all of them but the length, if there is one.

    No fields of a read are like that.
    """
    rest, count = LENGTH.subn(b"", fields)
    return b"PUT %d\r\n%b" % (count, rest)
