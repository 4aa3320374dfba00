"""Which store paths an upstream cache has: one look-up each, in parallel, without any token."""

from __future__ import annotations

import queue
import threading
import time
from typing import Optional
from urllib.parse import urlsplit

from cachix_connection import Answer
from cachix_line import Line, repeated
from cachix_protocol import Unreachable

WORKERS = 32
PATIENCE = 60.0  # seconds without any answer until an upstream counts as gone
LACKING = frozenset({403, 404, 410})  # 403 is S3's answer where nobody may list the files


class Upstream:
    """An upstream cache. `problem` says why it could not be asked, or not to the end."""

    def __init__(self, url: str) -> None:
        self.url, self.name = url, urlsplit(url).netloc
        self.problem = ""
        self.stop = threading.Event()
        self.answers = 0
        self.found: set[str] = set()  # by threads, of which some may be late
        self.present: set[str] = set()

    def ask(self, paths: list[str]) -> set[str]:
        """Those of the paths that it has, as far as it can be asked."""
        todo: queue.SimpleQueue[Optional[str]] = queue.SimpleQueue()
        threads = [
            threading.Thread(target=self._work, args=(todo,), name=f"look-up-{number}", daemon=True)
            for number in range(min(WORKERS, len(paths)))
        ]
        for path in [*paths, *[None] * len(threads)]:
            todo.put(path)
        for thread in threads:
            thread.start()
        self._watch(threads)
        self.present = set(self.found)
        return self.present

    def _watch(self, threads: list[threading.Thread]) -> None:
        """Wait until all paths are looked up, or nothing comes any more."""
        end, before = time.monotonic() + PATIENCE, 0
        while any(map(threading.Thread.is_alive, threads)) and not self.stop.is_set():
            self.stop.wait(0.02)
            if self.answers != before:
                end, before = time.monotonic() + PATIENCE, self.answers
            elif time.monotonic() > end:
                self._fail(f"{self.url} has not answered for {PATIENCE:.0f} s")

    def _work(self, todo: queue.SimpleQueue[Optional[str]]) -> None:
        """Look paths up until there are no more (a thread)."""
        line = Line(self.url)
        while not self.stop.is_set() and (path := todo.get()) is not None:
            try:
                if self._has(line, path):
                    self.found.add(path)
            except Unreachable as error:
                self._fail(str(error))
        line.close()

    def _has(self, line: Line, path: str) -> bool:
        """Whether it has a path. Raises Unreachable."""
        name = f"{path[11:43]}.narinfo"

        def get() -> Answer:
            try:
                return line.request("GET", name)
            except Unreachable as error:
                if not self.answers:  # it is not worth more attempts
                    self._fail(str(error))
                raise

        answer = repeated(get, self.stop)
        self.answers += 1
        if answer.status in LACKING:
            return False
        if answer.status != 200:
            raise Unreachable(f"{self.url} answered HTTP {answer.status}")
        if f"StorePath: {path}".encode() not in answer.body.splitlines():
            raise Unreachable(f"{self.url}/{name} does not describe {path}: is this a cache?")
        return True

    def _fail(self, problem: str) -> None:
        self.problem = self.problem or problem
        self.stop.set()
