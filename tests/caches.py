"""A signed binary cache without Nix.

It writes store paths within milliseconds, and serves them over HTTP, with faults on demand.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import os
import re
import socket
import struct
import threading
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from quiet import QuietServer

ALPHABET = "0123456789abcdfghijklmnpqrsvwxyz"
REFERENCE = re.compile(rb"/nix/store/([0-9a-z]{32}-[0-9a-zA-Z+._?=-]+)")
SELF = "@self@"  # in the contents of a path: its own store path
STALL = 3600.0  # seconds for which an answer is stalled, unless the server stops


@dataclass(frozen=True)
class Executable:
    """The content of an executable file."""

    content: Union[str, bytes]


@dataclass(frozen=True)
class Link:
    """A symbolic link."""

    target: str


# The contents of a store path: a file, a link, or a directory's entries by their names.
Tree = Union[str, bytes, Executable, Link, "dict[str, Any]"]


def base32(digest: bytes) -> str:
    """Encode bytes in Nix's variant of base 32: its own alphabet, the last bits first."""
    number, length = int.from_bytes(digest, "little"), (len(digest) * 8 + 4) // 5
    return "".join(ALPHABET[number >> 5 * i & 31] for i in reversed(range(length)))


def nar(tree: Tree) -> bytes:
    """Return the archive (NAR) of a tree, as Nix hashes and ships it."""
    return _string(b"nix-archive-1") + _node(tree)


def _string(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data + b"\0" * (-len(data) % 8)


def _node(tree: Tree) -> bytes:
    if isinstance(tree, dict):
        words = [b"type", b"directory"]
        body = b"".join(map(_string, words))
        for name in sorted(tree):
            head = b"".join(map(_string, [b"entry", b"(", b"name", name.encode(), b"node"]))
            body += head + _node(tree[name]) + _string(b")")
    elif isinstance(tree, Link):
        body = b"".join(map(_string, [b"type", b"symlink", b"target", tree.target.encode()]))
    else:
        words = [b"type", b"regular"]
        if isinstance(tree, Executable):
            words += [b"executable", b""]
        body = b"".join(map(_string, [*words, b"contents", _bytes(tree)]))
    return _string(b"(") + body + _string(b")")


def _bytes(tree: Union[str, bytes, Executable]) -> bytes:
    content = tree.content if isinstance(tree, Executable) else tree
    return content.encode() if isinstance(content, str) else content


def substitute(tree: Tree, own: str) -> Tree:
    """Return the tree with its own store path in place of `@self@`."""
    if isinstance(tree, dict):
        return {name: substitute(part, own) for name, part in tree.items()}
    if isinstance(tree, Link):
        return Link(tree.target.replace(SELF, own))
    content = _bytes(tree).replace(SELF.encode(), own.encode())
    return Executable(content) if isinstance(tree, Executable) else content


class Key:
    """An Ed25519 key for a cache. `public` and `secret` are as Nix writes them."""

    def __init__(self, name: str, seed: Optional[bytes] = None) -> None:
        self.name = name
        self._private = Ed25519PrivateKey.from_private_bytes(
            seed or hashlib.sha256(name.encode()).digest()
        )
        public = self._private.public_key().public_bytes_raw()
        self.bare = base64.b64encode(public).decode()
        self.public = f"{name}:{self.bare}"
        secret = base64.b64encode(self._private.private_bytes_raw() + public).decode()
        self.secret = f"{name}:{secret}"

    @classmethod
    def parse(cls, secret: str) -> Key:
        """Parse a secret key as `cachix-workspace cache create` or Nix prints it."""
        name, _, text = secret.strip().partition(":")
        return cls(name, base64.b64decode(text)[:32])

    def sign(self, path: str, nar_hash: str, size: int, references: Iterable[str]) -> str:
        """Return the signature of a store path, as in a narinfo."""
        names = ",".join(f"/nix/store/{name}" for name in sorted(references))
        signature = self._private.sign(f"1;{path};{nar_hash};{size};{names}".encode())
        return f"{self.name}:{base64.b64encode(signature).decode()}"


class Files:
    """The files of a binary cache, in a directory."""

    def __init__(self, directory: Union[str, Path], key: Optional[Key] = None) -> None:
        self.directory = Path(directory)
        self.key = key or Key("tests-1")
        (self.directory / "nar").mkdir(parents=True, exist_ok=True)
        (self.directory / "nix-cache-info").write_text(
            "StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 30\n"
        )

    def add(self, name: str, tree: Tree, references: Iterable[str] = ()) -> str:
        """Add a store path to the cache and return it.

        It refers to `references`, and to every `/nix/store/...` of this cache that its files
        contain. The same contents under the same name have the same path.
        """
        raw = nar(tree)
        own = f"/nix/store/{base32(hashlib.sha256(name.encode() + raw).digest()[:20])}-{name}"
        if SELF.encode() in raw:
            raw = nar(substitute(tree, own))
        names = {os.path.basename(path) for path in references}
        names |= {match.decode() for match in REFERENCE.findall(raw)}
        present = {
            name for name in names if name == os.path.basename(own) or self.narinfo(name).exists()
        }
        self.write(own, raw, present)
        return own

    def write(
        self, path: str, raw: bytes, references: Iterable[str], signed: Optional[Key] = None
    ) -> None:
        """Write the archive and the narinfo of a path.

        `references` are names without `/nix/store/`. `signed` is the key, if not the cache's own.
        """
        nar_hash = "sha256:" + base32(hashlib.sha256(raw).digest())
        file = f"nar/{nar_hash[7:]}.nar"
        (self.directory / file).write_bytes(raw)
        names = sorted(references)
        signature = (signed or self.key).sign(path, nar_hash, len(raw), names)
        lines = [
            f"StorePath: {path}",
            f"URL: {file}",
            "Compression: none",
            f"FileHash: {nar_hash}",
            f"FileSize: {len(raw)}",
        ]
        lines += [
            f"NarHash: {nar_hash}",
            f"NarSize: {len(raw)}",
            f"References: {' '.join(names)}",
            f"Sig: {signature}",
        ]
        self.narinfo(path).write_text("\n".join(lines) + "\n")

    def narinfo(self, path: str) -> Path:
        """Return the file that describes a store path."""
        return self.directory / f"{os.path.basename(path)[:32]}.narinfo"

    def archive(self, path: str) -> Path:
        """Return the file with the contents of a store path."""
        match = re.search(r"^URL: (.*)$", self.narinfo(path).read_text(), re.M)
        assert match, path
        return self.directory / match[1]

    def references(self, path: str) -> list[str]:
        """Return the names of the paths that a store path refers to."""
        match = re.search(r"^References: (.*)$", self.narinfo(path).read_text(), re.M)
        return match[1].split() if match else []

    def closure(self, *paths: str) -> set[str]:
        """Return these paths and all that they refer to, directly or not."""
        closure: set[str] = set()
        queue = list(paths)
        while queue:
            path = queue.pop()
            if path not in closure:
                closure.add(path)
                queue += [f"/nix/store/{name}" for name in self.references(path)]
        return closure

    def damage(self, path: str, how: str) -> None:
        """Damage a store path in one of the ways below. Raises ValueError for any other way."""
        info, archive = self.narinfo(path), self.archive(path)
        text, raw = info.read_text(), archive.read_bytes()
        if how == "unsigned":
            info.write_text(re.sub(r"Sig: .*\n", "", text))
        elif how == "wrong-key":
            self.write(path, raw, self.references(path), Key(self.key.name, b"x" * 32))
        elif how == "wrong-hash":
            other = raw.replace(b"regular", b"symlink", 1) + b"\0" * 8
            self.write(path, other, [])
            self.archive(path).write_bytes(raw)
        elif how == "corrupt":
            place = raw.index(_string(b"contents")) + 24  # the first byte of a file
            archive.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        elif how == "malformed":
            archive.write_bytes(raw.replace(_string(b"contents"), _string(b"c0ntents"), 1))
        elif how == "truncated":
            archive.write_bytes(raw[: len(raw) // 2])
        elif how == "no-archive":
            archive.unlink()
        elif how == "missing":
            info.unlink()
        else:
            raise ValueError(how)

    def push(self, url: str, token: Optional[str], *paths: str) -> None:
        """Upload closures to another cache over HTTP, as `nix copy` does.

        These files must be signed with that cache's key.
        """
        headers = {} if token is None else {"Authorization": _basic(token)}
        for path in sorted(self.closure(*paths)):
            for file in (self.archive(path), self.narinfo(path)):
                target = f"{url}/{file.relative_to(self.directory)}"
                request = urllib.request.Request(target, file.read_bytes(), headers, method="PUT")
                urllib.request.urlopen(request, timeout=30).close()


def _basic(token: str) -> str:
    """Return the Authorization header for a password without a user name."""
    return "Basic " + base64.b64encode(f":{token}".encode()).decode()


def password(authorization: Optional[str]) -> Optional[str]:
    """Return the password of an Authorization header, whatever the user name is."""
    try:
        return base64.b64decode((authorization or "")[len("Basic ") :]).decode().split(":", 1)[1]
    except (ValueError, IndexError):
        return None


@dataclass
class Fault:
    """How the server misbehaves for requests whose path matches, `times` times (-1: always)."""

    pattern: str
    kind: str  # an HTTP status such as "503", or stall, truncate, reset, slow
    times: int = -1
    value: float = 0.0  # slow: seconds before the answer


@dataclass(frozen=True)
class Request:
    """A client's request, and the status of the answer."""

    method: str
    path: str
    authorization: Optional[str]
    status: int


class Cache(Files):
    """A cache that is served on 127.0.0.1. It misbehaves on demand, and records its requests."""

    def __init__(self, directory: Union[str, Path], key: Optional[Key] = None) -> None:
        super().__init__(directory, key)
        self.token: Optional[str] = None  # the password that clients need, if any
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.ended = threading.Event()
        cache = self

        class Handler(_Handler):
            owner = cache

        self.server = QuietServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        serve = self.server.serve_forever
        threading.Thread(target=serve, args=(0.05,), name="cache", daemon=True).start()

    def misbehave(self, pattern: str, kind: str, times: int = -1, value: float = 0.0) -> Fault:
        """Misbehave for requests whose path matches `pattern`; the latest fault counts."""
        fault = Fault(pattern, kind, times, value)
        self.faults.insert(0, fault)
        return fault

    def heal(self) -> None:
        """Behave well again."""
        self.faults.clear()

    def count(self, pattern: str = "") -> int:
        """Return the number of requests for paths that match."""
        return len([request for request in self.requests if re.search(pattern, request.path)])

    def wire(self, uri: bool = True, name: str = "tests") -> dict[str, Any]:
        """Return the cache in the form of the message AgentRegistered."""
        cache = {"cacheName": name, "publicKey": self.key.public, "isPublic": self.token is None}
        return {**cache, "uri": self.url} if uri else cache

    def close(self) -> None:
        """Stop the server, and drop stalled answers."""
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    owner: Cache
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        """Print nothing: requests are recorded instead."""

    def do_GET(self) -> None:
        owner = self.owner
        path = self.path.partition("?")[0]
        faults = [f for f in owner.faults if f.times and re.search(f.pattern, path)]
        fault = faults[0] if faults else Fault("", "none")
        fault.times -= 1
        if fault.kind == "stall":
            self.note(0)
            owner.ended.wait(STALL)
            self.close_connection = True
        elif fault.kind == "reset":
            self.note(0)
            self.reset()
        elif fault.kind.isdigit():
            self.answer(int(fault.kind), b"out of order\n")
        elif not self.allowed(path):
            self.answer(401, b"a token is needed\n")
        else:
            if fault.kind == "slow":
                owner.ended.wait(fault.value)
            self.serve(path, fault.kind == "truncate")

    do_HEAD = do_GET

    def allowed(self, path: str) -> bool:
        """Whether the password is right. Anybody may read `nix-cache-info`, as with Cachix."""
        token = self.owner.token
        if token is None or path == "/nix-cache-info":
            return True
        return password(self.headers["Authorization"]) == token

    def serve(self, path: str, truncate: bool) -> None:
        """Answer with a file, or with the first half of it."""
        file = self.owner.directory / path[1:]
        if ".." in path or not file.is_file():
            self.answer(404, b"not found\n")
            return
        content = file.read_bytes()
        self.answer(200, content, content[: len(content) // 2] if truncate else content)
        self.close_connection = self.close_connection or truncate

    def answer(self, status: int, announced: bytes, sent: Optional[bytes] = None) -> None:
        """Send an answer whose announced body may be more than the body that is sent."""
        self.note(status)
        self.send_response(status)
        self.send_header("Content-Length", str(len(announced)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(announced if sent is None else sent)

    def note(self, status: int) -> None:
        self.owner.requests.append(
            Request(self.command, self.path, self.headers["Authorization"], status)
        )

    def reset(self) -> None:
        """End the connection with a TCP reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.wfile.close()
        self.rfile.close()
        self.connection.close()
