"""The upload of store paths to a cache: archives in parallel, descriptions after their references.

Whenever it is interrupted, each description in the cache has its archive there, and those of all
references that were to be pushed too.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, Callable, Optional, Union

import cachix_nar
from activate.text import base32
from activate.values import dataclass
from cachix_connection import Answer, Peer
from cachix_follow import rejection
from cachix_line import Line, Lines, basic, repeated
from cachix_narinfo import Archived, CacheKey, PathInfo, narinfo
from cachix_protocol import Error, Unreachable

if TYPE_CHECKING:
    import lzma

WORKERS = 24  # most of them wait for the network
LARGE = 16 << 20  # bytes of an archive that is kept on the disk, and looked for before it is sent
LARGE_AT_ONCE = 4  # as many of those may be unfinished by the rules of a workspace
COMPRESSION, PRESET = "xz", 0  # zstd can't be read by Nix 2.3, nor written by most Pythons


@dataclass
class Done:
    """How much was uploaded: paths, archives of paths, and bytes as they were sent."""

    paths: int = 0
    archives: int = 0
    size: int = 0


class Order:
    """Which worker does what next: the archive of a path, or its description once that may be.

    A description may be uploaded when its archive is there, and all descriptions that it needs.
    """

    def __init__(self, infos: list[PathInfo]) -> None:
        """`infos` come after their references."""
        self.changed = threading.Condition()
        self.stop = threading.Event()  # after a failure
        self.problem: Optional[Exception] = None
        self.archives = deque(infos)
        self.ready: deque[tuple[PathInfo, bytes]] = deque()
        self.waiting: dict[str, tuple[PathInfo, bytes]] = {}  # their archives are there
        self.left = {info.path[11:] for info in infos}
        self.users: dict[str, list[str]] = defaultdict(list)
        self.needs: dict[str, set[str]] = {}
        for info in infos:
            own = info.path[11:]
            self.needs[own] = (set(info.references) & self.left) - {own}
            for name in self.needs[own]:
                self.users[name].append(own)

    def take(self) -> Union[PathInfo, tuple[PathInfo, bytes], None]:
        """A path whose archive is due, or a description that is; None when there is nothing left.

        It waits while others may have to finish something first.
        """
        with self.changed:
            self.changed.wait_for(self._is_due)
            if self.stop.is_set() or not self.left:
                return None
            return self.ready.popleft() if self.ready else self.archives.popleft()

    def _is_due(self) -> bool:
        return bool(self.ready or self.archives or not self.left or self.stop.is_set())

    def note_archive(self, info: PathInfo, text: bytes) -> None:
        """Note that a path's archive is there; `text` is its description."""
        with self.changed:
            name = info.path[11:]
            self.waiting[name] = info, text
            self._release(name)

    def note_description(self, info: PathInfo) -> None:
        """Note that a path is in the cache."""
        with self.changed:
            name = info.path[11:]
            self.left.discard(name)
            for user in self.users[name]:
                self.needs[user].discard(name)
                self._release(user)
            self.changed.notify_all()

    def _release(self, name: str) -> None:
        if name in self.waiting and not self.needs[name]:
            self.ready.append(self.waiting.pop(name))
            self.changed.notify()

    def fail(self, problem: Exception) -> None:
        """End all uploads; the first problem is the reason."""
        with self.changed:
            self.problem = self.problem or problem
            self.stop.set()
            self.changed.notify_all()


class Upload:
    """An upload to the cache at a URL, by a token and the cache's key."""

    def __init__(self, url: str, token: str, key: CacheKey, infos: list[PathInfo]) -> None:
        self.peer, self.key, self.order = Peer(url, token), key, Order(infos)
        self.lines = Lines(url, basic(token))
        self.done, self.count = Done(), len(infos)
        self.large = threading.Semaphore(LARGE_AT_ONCE)

    def run(self, tell: Callable[[Done], None]) -> Done:
        """Upload all paths; `tell` is called now and then. Raises Error."""
        names = [f"upload-{number}" for number in range(min(WORKERS, self.count))]
        threads = [threading.Thread(target=self._work, name=name, daemon=True) for name in names]
        try:
            for thread in threads:
                thread.start()
            # after a failure nobody waits for an upload that may take long
            while any(map(threading.Thread.is_alive, threads)) and not self.order.stop.is_set():
                self._wait(threads)
                tell(self.done)
        finally:
            self.order.stop.set()
        if self.order.problem is not None:
            raise self.order.problem
        return self.done

    def _wait(self, threads: list[threading.Thread]) -> None:
        end = time.monotonic() + 0.2
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
            if self.order.stop.is_set():
                return

    def _work(self) -> None:
        """Upload what is due, until there is nothing left (a thread)."""
        line = self.lines.line
        try:
            while (task := self.order.take()) is not None:
                if isinstance(task, PathInfo):
                    self._archive(line, task)
                else:
                    self._describe(line, *task)
        except Exception as error:  # also a bug must end the others, and be raised
            self.order.fail(error)
        finally:
            line.close()

    def _describe(self, line: Line, info: PathInfo, text: bytes) -> None:
        self._put(line, info, f"{info.hash}.narinfo", text, len(text))
        self.order.note_description(info)
        with self.order.changed:
            self.done.paths += 1

    def _archive(self, line: Line, info: PathInfo) -> None:
        is_large = info.size > LARGE
        turn = self.large if is_large else contextlib.nullcontext()
        with turn, packed(info) as (archived, body):
            if not (is_large and self._is_there(line, archived.url)):
                self._put(line, info, archived.url, body, archived.size)
        with self.order.changed:
            self.done.archives += 1
            self.done.size += archived.size
        self.order.note_archive(info, narinfo(info, archived, self.key))

    def _is_there(self, line: Line, name: str) -> bool:
        """Whether an archive was uploaded before, by a push that did not end."""
        with contextlib.suppress(Unreachable):
            return line.request("HEAD", name).status == 200
        return False

    def _put(self, line: Line, info: PathInfo, name: str, body: Any, size: int) -> None:
        """Upload a file of a path. Raises Error."""

        def put() -> Answer:
            return line.request("PUT", name, body, size)

        try:
            answer = repeated(put, self.order.stop)
            problem = None if 200 <= answer.status < 300 else rejection(self.peer, answer)
        except Unreachable as error:
            problem = error
        if problem is not None:
            raise Error(f"{info.path} could not be pushed: {problem}")


def new_compressor() -> lzma.LZMACompressor:
    """A compressor for one archive. Raises Error."""
    try:
        import lzma
    except ImportError:  # Pythons that are built by hand often lack it
        raise Error("this Python has no module lzma, which a push needs: use another") from None
    return lzma.LZMACompressor(preset=PRESET)


@contextlib.contextmanager
def packed(info: PathInfo) -> Iterator[tuple[Archived, BinaryIO]]:
    """A path's archive, compressed, in memory or in a temporary file. Raises Error.

    Its contents are compared with what Nix's database says of them.
    """
    digest, file_digest, size = hashlib.sha256(), hashlib.sha256(), 0
    compressor = new_compressor()
    with tempfile.TemporaryFile() if info.size > LARGE else io.BytesIO() as file:

        def write(data: bytes) -> None:
            nonlocal size
            file_digest.update(data)
            size += file.write(data)

        def pack(block: bytes) -> None:
            digest.update(block)
            write(compressor.compress(block))

        try:
            cachix_nar.write(info.path, pack)
            write(compressor.flush())
        except OSError as error:
            raise Error(f"{info.path} can't be packed: {error}") from None
        if digest.digest() != info.nar_hash:
            repair = "`nix-store --verify --check-contents --repair` mends that"
            problem = "its contents on this machine are not those that Nix knows"
            raise Error(f"{info.path} is damaged: {problem}; {repair}")
        name = f"nar/{base32(file_digest.digest())}.nar.{COMPRESSION}"
        yield Archived(name, COMPRESSION, size, file_digest.digest()), file
