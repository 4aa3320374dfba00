#!/usr/bin/env python3
"""Cachix Deploy, open and self-hostable: the agent of a machine, and the command that CI starts deployments with.

Usage:
  cachix-deploy [options] [deploy] agent [NAME] [PROFILE] [--bootstrap] [--if-stopped]
  cachix-deploy [options] [deploy] activate SPEC [--agent=NAME]... [--async] [--timeout=SECONDS]
  cachix-deploy --help
  cachix-deploy --version

Commands:
  agent     Stay connected to the workspace and run what it deploys to this machine.
            NAME defaults to the host name, PROFILE to the profile of the kind that is deployed.
  activate  Deploy the store paths of SPEC (a deploy.json) to their agents, follow their logs, wait for their ends.

Options:
  --host=URL                    The workspace [default: https://cachix.org].
  --token-file=FILE             Read the token from FILE instead of the environment
                                (CACHIX_AGENT_TOKEN; CACHIX_ACTIVATE_TOKEN for activate).
  --confirm-timeout=SECONDS     How long a new system may take to reach the workspace [default: 120].
  --activation-timeout=SECONDS  How long an activation, or the rollback script, may run [default: 3600].
  --on-unit-failure=POLICY      rollback or tolerate: what to do where units failed [default: rollback].
  --on-reboot-needed=POLICY     fail or boot: what to do where the system can only be booted [default: fail].
  --bootstrap                   Deploy once for a machine whose own agent will take over, then end.
  --if-stopped                  End with status 0 where an agent of this name runs already (for cron).
  --agent=NAME                  Deploy to this agent of SPEC only; may be given several times.
  --async                       Start the deployments and end without waiting for them.
  --timeout=SECONDS             Give up waiting after this many seconds (the deployments go on).
  -v --verbose                  Say more: debugging messages, and tracebacks of errors.
  -h --help                     Show this text.
  --version                     Show the version.

Exit status: 0 done; 1 failed (any rollback is a failure); 64 wrong usage; 69 workspace out of reach;
75 already running; 77 token refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Callable, Optional, TypeVar, Union

import activate
from activate import durable, journal, lock, logfile, machine, nix, verdict
from activate.nix import is_store_path as is_store_path
from activate.process import Error as Error

if TYPE_CHECKING:
    import requests
    import websocket

__version__ = "0.1.0"

PROTOCOL_VERSION = "1.11.1"  # the release of Cachix whose protocol is spoken
USER_AGENT = f"cachix-deploy/{__version__}"

# --- errors ----------------------------------------------------------------------------------------------------------


class UsageError(Error):
    """The command line, or a value on it, is wrong."""

    status = 64


class Unreachable(Error):
    """The workspace does not answer, or not in its protocol. `retry_after`: seconds that it asked to be left alone."""

    status = 69

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Refused(Error):
    """The workspace refuses the token."""

    status = 77


class AlreadyRunning(Error):
    """An agent of this name runs on this machine."""

    status = 75


class Gone(Error):
    """The workspace does not know a deployment: there is nobody to report it to."""


class Undecodable(ValueError):
    """A message that is not of the protocol; it is logged and skipped."""


# --- wire values: protocol.md, and nothing else, decides the names below ---------------------------------------------

AGENT_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,127}")
UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
PENDING, IN_PROGRESS = "Pending", "InProgress"
SUCCEEDED, FAILED, CANCELLED = "Succeeded", "Failed", "Cancelled"
TERMINAL = frozenset({SUCCEEDED, FAILED, CANCELLED})
SUCCESS_LINE = "Successfully activated the deployment."
FAILURE_LINE = "Failed to activate the deployment."


def is_agent_name(text: object) -> bool:
    """Whether `text` may become the name of an agent, and so part of file names and of a header."""
    return isinstance(text, str) and AGENT_NAME.fullmatch(text) is not None


def utc_now() -> str:
    """The time as the protocol writes it: RFC 3339, UTC, microseconds."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{nanoseconds // 1000:06}Z"


def nix_system() -> str:
    """This machine as Nix names it, such as x86_64-linux or aarch64-darwin."""
    name = {"arm64": "aarch64", "amd64": "x86_64", "i386": "i686"}.get(os.uname().machine, os.uname().machine)
    return f"{name}-{sys.platform}"


def checked_field(record: Any, name: str, kinds: Union[type, tuple[type, ...]], optional: bool = False) -> Any:
    """Value `name` of a JSON object, checked. A missing key counts as null where it is optional."""
    if not isinstance(record, dict):
        raise Undecodable("an object was expected")
    value = record.get(name)
    if value is None and optional:
        return None
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is int):
        raise Undecodable(f"`{name}` is missing or of the wrong type")
    return value


def uuid_field(record: Any, name: str) -> str:
    value = checked_field(record, name, str)
    if not UUID.fullmatch(value):
        raise Undecodable(f"`{name}` is not a UUID")
    return str(value).lower()


def path_field(record: Any, name: str) -> str:
    value = checked_field(record, name, str)
    if not is_store_path(value):
        raise Undecodable(f"`{name}` is not a store path: {value[:300]!r}")
    return str(value)


@dataclass(frozen=True)
class Cache:
    """The binary cache of a workspace. `uri` is our own addition: without it the rule of `substituter` holds."""

    name: str
    public_key: str
    is_public: bool
    uri: Optional[str] = None

    @classmethod
    def from_json(cls, record: Any) -> Cache:
        return cls(
            checked_field(record, "cacheName", str),
            checked_field(record, "publicKey", str),
            checked_field(record, "isPublic", bool),
            checked_field(record, "uri", str, optional=True),
        )

    def to_json(self) -> dict[str, Any]:
        extra = {} if self.uri is None else {"uri": self.uri}
        return {"cacheName": self.name, "publicKey": self.public_key, "isPublic": self.is_public, **extra}


@dataclass(frozen=True)
class AgentRegistered:
    """The first message to an agent: its id, where closures come from, how it reports ("http"; null for Cachix)."""

    id: str
    cache: Optional[Cache] = None
    reports: Optional[str] = None

    @classmethod
    def from_json(cls, record: Any) -> AgentRegistered:
        cache = checked_field(record, "cache", dict, optional=True)
        reports = checked_field(record, "reports", str, optional=True)
        return cls(uuid_field(record, "id"), None if cache is None else Cache.from_json(cache), reports)

    def to_json(self) -> dict[str, Any]:
        extra = {} if self.reports is None else {"reports": self.reports}
        return {"cache": None if self.cache is None else self.cache.to_json(), "id": self.id, **extra}


@dataclass(frozen=True)
class Deployment:
    """The order to run `store_path`. `resumed`: the workspace believes that the agent had it already.

    The paths are checked where they are used, so that a wrong one gets a report instead of silence.
    """

    store_path: str
    id: str
    index: int
    rollback_script: Optional[str] = None
    resumed: bool = False

    @classmethod
    def from_json(cls, record: Any) -> Deployment:
        return cls(
            checked_field(record, "storePath", str),
            uuid_field(record, "id"),
            checked_field(record, "index", int),
            checked_field(record, "rollbackScript", str, optional=True),
            bool(checked_field(record, "resumed", bool, optional=True)),
        )

    def to_json(self) -> dict[str, Any]:
        extra = {"resumed": True} if self.resumed else {}
        known = {"storePath": self.store_path, "id": self.id, "index": self.index}
        return {**known, "rollbackScript": self.rollback_script, **extra}


@dataclass(frozen=True)
class DeploymentStarted:
    """An agent began a deployment; sent again with the closure's size in bytes once that is known."""

    id: str
    time: str
    closure_size: Optional[int] = None

    @classmethod
    def from_json(cls, record: Any) -> DeploymentStarted:
        size = checked_field(record, "closureSize", int, optional=True)
        return cls(uuid_field(record, "id"), checked_field(record, "time", str), size)

    def to_json(self) -> dict[str, Any]:
        return {"closureSize": self.closure_size, "id": self.id, "tag": "DeploymentStarted", "time": self.time}


@dataclass(frozen=True)
class DeploymentFinished:
    """A deployment ended on the machine."""

    id: str
    time: str
    has_succeeded: bool

    @classmethod
    def from_json(cls, record: Any) -> DeploymentFinished:
        has_succeeded = checked_field(record, "hasSucceeded", bool)
        return cls(uuid_field(record, "id"), checked_field(record, "time", str), has_succeeded)

    def to_json(self) -> dict[str, Any]:
        return {"hasSucceeded": self.has_succeeded, "id": self.id, "tag": "DeploymentFinished", "time": self.time}


@dataclass(frozen=True)
class LogLine:
    """A line of a deployment's log, without its newline."""

    line: str
    time: str

    @classmethod
    def from_json(cls, record: Any) -> LogLine:
        return cls(checked_field(record, "line", str), checked_field(record, "time", str))

    def to_json(self) -> dict[str, Any]:
        return {"line": self.line, "time": self.time}


def fresh_id() -> str:
    """A random UUID."""
    import uuid

    return str(uuid.uuid4())


ToAgent = Union[AgentRegistered, Deployment]
FromAgent = Union[DeploymentStarted, DeploymentFinished]


def dumps(record: Any) -> str:
    """JSON as the protocol writes it: compact, UTF-8 unescaped."""
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False)


def loads(text: Union[str, bytes]) -> Any:
    """JSON, tolerant as Cachix's client is; raises Undecodable, whatever the bytes (or the depth) are."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Undecodable(f"not JSON ({error})") from None


def encode_to_agent(command: ToAgent) -> str:
    """The frame that carries `command` on /ws."""
    tag = type(command).__name__
    inner = {"tag": tag, "contents": command.to_json()}
    return dumps({"method": tag, "command": inner, "agent": None, "id": fresh_id()})


def decode_to_agent(text: Union[str, bytes]) -> ToAgent:
    """What a frame on /ws says; raises Undecodable. The tag decides, `method` is ignored as by Cachix's client."""
    command = checked_field(loads(text), "command", dict)
    tag, contents = checked_field(command, "tag", str), checked_field(command, "contents", dict)
    if tag == "AgentRegistered":
        return AgentRegistered.from_json(contents)
    if tag == "Deployment":
        return Deployment.from_json(contents)
    raise Undecodable(f"unknown tag `{tag}`")


def encode_from_agent(agent_id: str, command: FromAgent) -> str:
    """The frame that carries `command` on /ws-deployment."""
    message = {"agent": agent_id, "command": command.to_json(), "id": fresh_id()}
    return dumps({**message, "method": type(command).__name__})


def decode_from_agent(text: Union[str, bytes]) -> FromAgent:
    """What a frame on /ws-deployment says; raises Undecodable."""
    command = checked_field(loads(text), "command", dict)
    tag = checked_field(command, "tag", str)
    if tag == "DeploymentStarted":
        return DeploymentStarted.from_json(command)
    if tag == "DeploymentFinished":
        return DeploymentFinished.from_json(command)
    raise Undecodable(f"unknown tag `{tag}`")


@dataclass(frozen=True)
class Spec:
    """A deploy.json: which store path each agent is to run, and a rollback script for each system (or none)."""

    agents: dict[str, str]
    rollback_scripts: dict[str, str]

    @classmethod
    def from_json(cls, record: Any) -> Spec:
        agents = checked_field(record, "agents", dict)
        scripts = checked_field(record, "rollbackScript", dict, optional=True) or {}
        for name in agents:
            path_field(agents, name)
        for system in scripts:
            path_field(scripts, system)
        return cls(agents, scripts)

    def to_json(self) -> dict[str, Any]:
        extra = {"rollbackScript": self.rollback_scripts} if self.rollback_scripts else {}
        return {"agents": self.agents, **extra}


# --- connection ------------------------------------------------------------------------------------------------------

CONNECT_TIMEOUT = 20.0  # seconds for name look-up, TCP, TLS and handshake together
SYSTEM_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


def ca_bundle() -> Optional[str]:
    """The file of trusted authorities for all connections of this program: the system's, else certifi's."""
    named = [os.environ.get(name) for name in ("SSL_CERT_FILE", "NIX_SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")]
    for candidate in [*named, *SYSTEM_BUNDLES]:
        if candidate and os.path.isfile(candidate):
            return candidate
    with contextlib.suppress(ImportError, OSError):
        import certifi

        return certifi.where()
    return None


def complete_proxies() -> None:
    """Proxies are also given as HOST:PORT: requests and Nix take that, websocket-client would go around them."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        value = os.environ.get(name)
        if value and "://" not in value:
            os.environ[name] = f"http://{value}"


@dataclass(frozen=True)
class Peer:
    """A workspace as one token sees it. `name` is the agent's, and None for CI."""

    host: str
    token: str
    name: Optional[str] = None

    @classmethod
    def create(cls, host: str, token: str, name: Optional[str] = None) -> Peer:
        """Raises UsageError where `host` is no http or https URL."""
        try:
            parts = urllib.parse.urlsplit(host if "://" in host else f"https://{host}")
            valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) and not parts.query
        except ValueError:
            valid = False
        if not valid:
            raise UsageError(f"--host must be a URL such as https://cachix.org, not {host!r}")
        return cls(urllib.parse.urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", "")), token, name)

    def headers(self) -> dict[str, str]:
        """What every request and handshake carries; an agent's also say who it is."""
        known = {"Authorization": f"Bearer {self.token}"}
        if self.name is not None:
            known.update({"name": self.name, "version": PROTOCOL_VERSION, "system": nix_system()})
        return {**known, "User-Agent": USER_AGENT}

    def substituter(self, cache: Cache) -> str:
        """The URL of the workspace's cache: its `uri`, else its name as a subdomain of the workspace."""
        if cache.uri:
            return cache.uri
        parts = urllib.parse.urlsplit(self.host)
        return f"{parts.scheme}://{cache.name}.{parts.netloc.rpartition('@')[2]}"

    def public_key(self, cache: Cache) -> str:
        """The cache's key as Nix wants it, NAME:BASE64."""
        if ":" in cache.public_key:
            return cache.public_key
        return f"{cache.name}.{urllib.parse.urlsplit(self.host).hostname}-1:{cache.public_key}"


Answer = TypeVar("Answer")


def within(timeout: float, do: Callable[[], Answer]) -> Answer:
    """What `do` returns or raises; Unreachable where that takes longer than `timeout` seconds.

    It runs in a thread of its own, as a name look-up can't be told to hurry, and the libraries' own limits are for each
    packet. A thread that is late ends, and closes what it has opened, as soon as it wakes: at the next packet.
    """
    answers: list[Answer] = []
    problems: list[Exception] = []

    def run() -> None:
        try:
            answers.append(do())
        except Exception as error:
            problems.append(error)
        except SystemExit:  # it is late, see below
            pass

    thread = threading.Thread(target=run, name="call", daemon=True)
    thread.start()
    thread.join(timeout)
    if problems:
        raise problems[0]
    if not answers:
        import ctypes

        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        raise Unreachable(f"no answer within {timeout:.0f} s")
    return answers[0]


def connect(peer: Peer, path: str, timeout: float = CONNECT_TIMEOUT) -> websocket.WebSocket:
    """A websocket to `path` of the workspace. Raises Refused (the token), or Unreachable with what was wrong."""
    import websocket

    bundle = ca_bundle()
    socket_ = websocket.WebSocket(
        enable_multithread=True, skip_utf8_validation=True, sslopt={} if bundle is None else {"ca_certs": bundle}
    )
    headers = [f"{name}: {value}" for name, value in peer.headers().items()]
    options = {"header": headers, "timeout": timeout, "suppress_origin": True, "redirect_limit": 0}
    try:
        within(timeout, lambda: socket_.connect("ws" + peer.host[4:] + path, **options))  # type: ignore[no-untyped-call]
        if socket_.status != 101:
            raise websocket.WebSocketException("a redirect")
    except (Unreachable, OSError, ValueError, websocket.WebSocketException) as error:
        hang_up(socket_)
        status = getattr(error, "status_code", socket_.status)  # the library keeps a redirect's answer for itself
        if status in (401, 403):
            raise Refused(f"{peer.host} refused the token (HTTP {status}): check it, or create a new one") from None
        if status in (None, 101):
            raise Unreachable(f"no connection to {peer.host}{path}: {error or type(error).__name__}") from None
        location = (getattr(error, "resp_headers", socket_.headers) or {}).get("location")
        moved = f" and points to {location}, which is not followed: give it as --host" if location else ""
        raise Unreachable(f"{peer.host}{path} answered HTTP {status} instead of a websocket{moved}") from None
    return socket_


def hang_up(socket_: websocket.WebSocket) -> None:
    """End a connection at once, from any thread: a read of it in another thread ends too."""
    with contextlib.suppress(OSError, AttributeError):
        socket_.sock.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]


def close(socket_: websocket.WebSocket) -> None:
    """Say goodbye (1000) and close; never raises, waits a second at most for the answer."""
    with contextlib.suppress(Exception):
        socket_.close(timeout=1)


def round_trip(socket_: websocket.WebSocket, timeout: float, frames: tuple[str, ...] = ()) -> None:
    """Send text frames and a ping, and wait for its pong: all of them have arrived then. Raises Unreachable."""
    import websocket

    mark, deadline = os.urandom(16), time.monotonic() + timeout
    try:
        socket_.settimeout(timeout)
        for frame in frames:
            socket_.send(frame)
        socket_.ping(mark)
        while True:
            socket_.settimeout(max(0.01, deadline - time.monotonic()))
            opcode, frame = socket_.recv_data_frame(control_frame=True)
            if opcode == websocket.ABNF.OPCODE_PONG and frame.data == mark:
                return
            if opcode == websocket.ABNF.OPCODE_CLOSE:
                raise Unreachable("the workspace closed the connection")
    except (OSError, websocket.WebSocketException) as error:
        raise Unreachable(f"no answer to a ping: {error or type(error).__name__}") from None


def reach(peer: Peer, timeout: float) -> None:
    """One look whether the workspace can be reached over a connection of its own. Raises Refused or Unreachable."""
    socket_ = connect(peer, "/ws-deployment", timeout)
    try:
        round_trip(socket_, timeout)
    finally:
        close(socket_)


def http(peer: Peer, method: str, path: str, timeout: float = 20.0, **kwargs: Any) -> requests.Response:
    """One request, its answer read whole (at most 64 MiB). Raises Unreachable where none comes in `timeout` seconds.

    Redirects are refused as any other status that the caller does not expect: the token would go elsewhere.
    """
    with _importing:
        import requests

    session, deadline = _session(), time.monotonic() + timeout
    kwargs.update(headers={**peer.headers(), **kwargs.pop("headers", {})}, timeout=timeout, verify=ca_bundle() or True)

    def call() -> requests.Response:
        answer = session.request(method, peer.host + path, stream=True, allow_redirects=False, **kwargs)
        body = bytearray()
        for chunk in answer.iter_content(1 << 16):
            body += chunk
            if time.monotonic() > deadline or len(body) > 1 << 26:
                raise requests.Timeout(f"the answer took longer than {timeout:.0f} s, or has no end")
        answer._content = bytes(body)
        return answer

    try:
        return within(timeout, call)
    except (Unreachable, requests.RequestException, OSError, ValueError) as error:
        _sessions.__dict__.clear()  # the call that was left behind may still use it
        raise Unreachable(f"{method} {peer.host}{path} failed: {error or type(error).__name__}") from None


_sessions = threading.local()
_importing = threading.Lock()  # two threads that import it at once may see half of it (Python 3.9, from a zip file)


def _session() -> requests.Session:
    """The calling thread's own session; proxies come from the environment, credentials never from a ~/.netrc."""
    import requests

    if not hasattr(_sessions, "value"):
        _sessions.value = requests.Session()
        _sessions.value.auth = lambda request: request
    return _sessions.value  # type: ignore[no-any-return]


# --- reports ---------------------------------------------------------------------------------------------------------

BATCH_LINES = 2000
CALL_TIMEOUT = 10.0  # seconds for one call of the reporter


class HttpChannel:
    """Reports to our workspace: every call is acknowledged, and may be repeated."""

    def __init__(self, peer: Peer, deployment_id: str, timeout: float = CALL_TIMEOUT) -> None:
        self.peer, self.id, self.timeout = peer, deployment_id, timeout

    def call(self, method: str, path: str, timeout: Optional[float] = None, **kwargs: Any) -> requests.Response:
        """An answer that the protocol knows. Raises Refused, Unreachable or Gone."""
        answer = http(self.peer, method, path, timeout or self.timeout, **kwargs)
        if answer.status_code in (401, 403):
            raise Refused(f"{self.peer.host} refused the token (HTTP {answer.status_code})")
        ours = answer.headers.get("Content-Type", "").startswith("application/json")  # no page of a proxy
        if answer.status_code == 404 and ours:
            raise Gone(f"{self.peer.host} does not know deployment {self.id}")
        if answer.status_code not in (200, 409, 416) or not ours:
            raise Unreachable(f"{self.peer.host} answered HTTP {answer.status_code}", retry_after(answer))
        return answer

    def status(
        self, status: str, size: Optional[int], reason: Optional[str] = None, timeout: Optional[float] = None
    ) -> bool:
        """Put a status; whether it counts, which it does not where the deployment was cancelled."""
        body = {"status": status, "time": utc_now(), "closureSize": size, "reason": reason}
        path = f"/api/v1/deploy/deployment/{self.id}/status"
        return self.call("PUT", path, timeout, json=body).status_code != 409

    def lines(self, index: int, lines: list[str]) -> int:
        """Append lines, the first of which has this index; the index that the workspace expects next."""
        now = utc_now()
        body = "".join(dumps(LogLine(line, now).to_json()) + "\n" for line in lines)
        answer = self.call("PUT", f"/api/v1/deploy/log/{self.id}?offset={index}", data=body.encode())
        try:
            return int(checked_field(loads(answer.content), "next", int))
        except Undecodable:
            raise Unreachable(f"{self.peer.host} answered a log without `next`") from None

    def close(self) -> None:
        """Nothing is held."""


def retry_after(answer: requests.Response) -> float:
    """Seconds that an answer asks to wait, an hour at most; 0 where it asks for nothing (or by a date)."""
    with contextlib.suppress(ValueError):
        return min(3600.0, max(0.0, float(answer.headers.get("Retry-After", "0"))))
    return 0.0


class SocketChannel:
    """Reports to Cachix: frames on two sockets. A frame has arrived when a ping that was sent after it is answered."""

    def __init__(self, peer: Peer, deployment_id: str, agent_id: str, waits: Waits) -> None:
        self.peer, self.id, self.agent_id, self.waits = peer, deployment_id, agent_id, waits
        self.sockets: dict[str, websocket.WebSocket] = {}

    def send(self, path: str, frames: list[str]) -> None:
        """Deliver text frames on the socket of `path`. Raises Unreachable or Refused."""
        try:
            if path not in self.sockets:
                self.sockets[path] = connect(self.peer, path, self.waits.connect)
            within(self.waits.call, lambda: round_trip(self.sockets[path], self.waits.call, tuple(frames)))
        except Error:
            if path in self.sockets:
                self.sockets.pop(path).shutdown()  # type: ignore[no-untyped-call]
            raise

    def status(self, status: str, size: Optional[int], reason: Optional[str] = None) -> bool:
        """Send that the deployment started, or how it ended; Cachix has no room for a reason but the log."""
        command: FromAgent = DeploymentStarted(self.id, utc_now(), size)
        if status != IN_PROGRESS:
            command = DeploymentFinished(self.id, utc_now(), status == SUCCEEDED)
        self.send("/ws-deployment", [encode_from_agent(self.agent_id, command)])
        return True

    def lines(self, index: int, lines: list[str]) -> int:
        """Append lines; the index after them."""
        now = utc_now()
        if lines:
            self.send(f"/api/v1/deploy/log/{self.id}", [dumps(LogLine(line, now).to_json()) for line in lines])
        return index + len(lines)

    def close(self) -> None:
        for path in sorted(self.sockets):
            close(self.sockets.pop(path))


Channel = Union[HttpChannel, SocketChannel]


class Delivery:
    """One deployment on its way to the workspace: started, its log, its size, its end."""

    def __init__(self, entry: journal.Journal, held: lock.Lock, sizes: dict[str, int]) -> None:
        self.entry, self.held, self.sizes = entry, held, sizes
        self.reported = logfile.Reported.load(entry.path("reported.json"))
        self.channel: Optional[Channel] = None
        self.failures, self.not_before = 0, 0.0
        self.log_failed, self.hurried, self.batch = False, False, BATCH_LINES
        self.counted = False  # whether the workspace has said how much it has of a log that is lost here
        self.final = False  # as of the last `ship`: an end that comes meanwhile waits for the rest of its log

    @property
    def has_ended(self) -> bool:
        return self.entry.record.step in journal.FINAL

    def note(self, **facts: Any) -> None:
        """Keep how far it is; in memory alone where the disk can't."""
        self.reported = replace(self.reported, time=utc_now(), **facts)
        path = self.entry.path("reported.json")
        with contextlib.suppress(OSError):
            with open(path + ".new", "w", encoding="utf-8") as file:
                file.write(json.dumps(asdict(self.reported)))
            os.rename(path + ".new", path)

    def ship(self, channel: Channel) -> None:
        """Send what there is to send by now. A failing log holds back nothing else. Raises the first Error."""
        self.channel, self.final = channel, self.has_ended
        steps = [self.ship_start, self.ship_log, self.ship_size, self.ship_end]
        if self.log_failed:
            steps = [self.ship_start, self.ship_size, self.ship_end, self.ship_log]
        problems = []
        for step in steps:
            try:
                step(channel)
            except Error as error:
                problems.append(error)
                if getattr(error, "retry_after", 0.0) and step != self.ship_log:
                    break  # it asked to be left alone
        if problems:
            raise problems[0]

    def ship_start(self, channel: Channel) -> None:
        if not (self.reported.started or self.reported.ended):
            channel.status(IN_PROGRESS, None)
            self.note(started=True)

    def ship_size(self, channel: Channel) -> None:
        if self.reported.size is None and self.entry.record.id in self.sizes:
            self.note(size=self.sizes[self.entry.record.id])
        if self.final and isinstance(channel, HttpChannel):
            return  # the final status has it
        if self.reported.size is not None and not (self.reported.sized or self.reported.ended):
            channel.status(IN_PROGRESS, self.reported.size)
            self.note(sized=True)

    def ship_end(self, channel: Channel) -> None:
        if self.final and not self.reported.ended:
            record = self.entry.record
            reason = "\n".join(text for text in (record.reason, record.detail) if text) or None
            channel.status(SUCCEEDED if record.step == journal.SUCCEEDED else FAILED, self.reported.size, reason)
            self.note(ended=True)

    def ship_log(self, channel: Channel) -> None:
        """Send the log as far as it has grown, for a few seconds at the most while the end waits behind it."""
        if self.log_failed:  # the way may be too slow for so many
            self.batch = max(1, self.batch // 8)
        until, self.log_failed = time.monotonic() + 5.0, True
        while not self.reported.logged and time.monotonic() < until:
            lines, offset = logfile.lines_from(self.entry, self.reported.offset, self.batch)
            closing = self.final and offset >= logfile.end(self.entry) and len(lines) < self.batch
            if closing and not self.counted and logfile.is_lost(self.entry, self.reported.offset):
                self.note(line=channel.lines(self.reported.line, []))  # the closing line comes behind all that is there
                self.counted = True
            if closing:
                lines.append(closing_line(self.entry.record))
            if not lines:
                break
            self.acknowledge(channel.lines(self.reported.line, lines), len(lines), offset, closing)
            self.batch = min(BATCH_LINES, 2 * self.batch)
        self.log_failed = False

    def acknowledge(self, expected: int, sent: int, offset: int, closing: bool) -> None:
        """Go on behind lines that have arrived, or back to those that the workspace has lost."""
        behind = self.reported.line + sent
        lost = closing and expected > behind  # here, not there
        if expected >= behind:
            self.note(line=expected if lost else behind, offset=offset, logged=closing and not lost)
        elif expected == self.reported.line:
            raise Unreachable(f"{sent} lines were sent, and none was taken")
        else:
            line, offset, lines = 0, 0, [""]
            while lines and line < expected:
                lines, offset = logfile.lines_from(self.entry, offset, expected - line)
                line += len(lines)
            self.note(line=line, offset=offset)


def closing_line(record: journal.Record) -> str:
    """The line by which Cachix's `activate` knows that a log is complete."""
    if record.step == journal.SUCCEEDED:
        return SUCCESS_LINE
    said = " ".join(f"{FAILURE_LINE} {record.reason or ''}".split("\n")).rstrip()
    return logfile.printable(said.encode("utf-8", "replace"))


class Reporter(threading.Thread):
    """Ships logs and results. The files of the deployments are the queue; it sleeps while nothing is under way."""

    def __init__(self, peer: Peer, waits: Waits) -> None:
        super().__init__(name="reporter", daemon=True)
        self.peer, self.waits = peer, waits
        self.wake = threading.Event()
        self.idle = threading.Event()
        self.registered: Optional[AgentRegistered] = None
        self.added: queue.SimpleQueue[journal.Journal] = queue.SimpleQueue()
        self.deliveries: list[Delivery] = []
        self.sizes: dict[str, int] = {}
        self.idle.set()

    def add(self, entry: journal.Journal) -> None:
        """Report this deployment from now on."""
        self.idle.clear()
        self.added.put(entry)
        self.wake.set()

    def register(self, registered: AgentRegistered) -> None:
        """The workspace has said how it wants its reports."""
        self.registered = registered
        self.wake.set()

    def measured(self, entry: journal.Journal, size: int) -> None:
        """The closure's size in bytes is known; it is told with what is told next."""
        self.sizes[entry.record.id] = size

    def channel(self, delivery: Delivery, registered: AgentRegistered) -> Channel:
        """The way of reporting that the workspace asked for."""
        if registered.reports == "http":
            return HttpChannel(self.peer, delivery.entry.record.id, self.waits.call)
        if isinstance(delivery.channel, SocketChannel) and delivery.channel.agent_id == registered.id:
            return delivery.channel
        return SocketChannel(self.peer, delivery.entry.record.id, registered.id, self.waits)

    def run(self) -> None:
        waiting: list[journal.Journal] = []
        while True:
            self.wake.wait(self.pause(bool(waiting)))
            self.wake.clear()
            while not self.added.empty():
                waiting.append(self.added.get())
            waiting = [entry for entry in waiting if not self.take(entry)]
            if self.registered is not None:
                for delivery in list(self.deliveries):
                    self.attend(delivery, self.registered)
            if not (self.deliveries or waiting) and self.added.empty():
                self.idle.set()

    def pause(self, waiting: bool) -> Optional[float]:
        """Seconds until there may be something to do; None: only an event can bring that."""
        now = time.monotonic()
        due = [max(d.not_before - now, self.waits.tail) for d in self.deliveries if self.registered is not None]
        return min([*due, *([5.0] if waiting else [])], default=None)

    def take(self, entry: journal.Journal) -> bool:
        """Begin with a deployment, unless another agent reports it at this moment."""
        try:
            held = lock.take(entry.path("reported.lock"))
        except OSError:  # a state that can't be written is no reason to be silent
            held = lock.Lock("", os.open(os.devnull, os.O_RDONLY))
        if held is not None:
            self.deliveries.append(Delivery(entry, held, self.sizes))
        return held is not None

    def attend(self, delivery: Delivery, registered: AgentRegistered) -> None:
        """Ship what is there; a failure is tried again after a while."""
        if delivery.has_ended and delivery.log_failed and not delivery.hurried:  # the end does not wait for a log
            delivery.hurried, delivery.not_before = True, 0.0
        if time.monotonic() < delivery.not_before:
            return
        try:
            delivery.ship(self.channel(delivery, registered))
            delivery.failures = 0
        except Gone as error:
            tell(f"{error}: its report is given up")
            delivery.note(logged=True, ended=True)
        except Exception as error:  # nothing that is wrong with one report may end the others
            pause = max(backoff(delivery.failures, self.waits), getattr(error, "retry_after", 0.0))
            delivery.failures += 1
            delivery.not_before = time.monotonic() + pause
            if not isinstance(error, Error):
                complain(error)
            tell(f"deployment {delivery.entry.record.id}: not reported yet, next attempt in {pause:.0f} s: {error}")
        if delivery.final and delivery.reported.whole:
            self.deliveries.remove(delivery)
            self.sizes.pop(delivery.entry.record.id, None)
            if delivery.channel is not None:
                delivery.channel.close()
            delivery.held.close()
            logfile.prune(os.path.dirname(os.path.dirname(delivery.entry.directory)))


# --- agent -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Waits:
    """How long the agent waits, in seconds; CACHIX_DEPLOY_WAITS, a JSON object, shortens that in tests."""

    ping: float = 30.0
    silence: float = 60.0
    connect: float = CONNECT_TIMEOUT
    call: float = CALL_TIMEOUT
    backoff: float = 1.0
    slowest: float = 60.0
    healthy: float = 60.0
    handover: float = 60.0
    tail: float = 0.1
    ready: float = 2.0
    download: float = 6 * 3600.0
    unit_recheck: float = 10.0

    @classmethod
    def from_environment(cls) -> Waits:
        given = loads(os.environ.get("CACHIX_DEPLOY_WAITS", "{}"))
        return cls(**{name: float(given[name]) for name in cls.__dataclass_fields__ if name in given})


def backoff(failures: int, waits: Waits) -> float:
    """Seconds before the next attempt: exponential, with full jitter, so that a fleet does not come back at once."""
    import random

    return random.uniform(0, min(waits.slowest, waits.backoff * 2 ** min(failures, 16)))


@dataclass(frozen=True)
class AgentOptions:
    """An agent's command line, checked."""

    peer: Peer
    profile: Optional[str]
    bootstrap: bool
    if_stopped: bool
    settings: verdict.Settings
    waits: Waits

    @property
    def name(self) -> str:
        return str(self.peer.name)


class Worker(threading.Thread):
    """Takes deployments one at a time, downloads them, and follows their switch processes to the end."""

    def __init__(self, options: AgentOptions, state: str, reporter: Reporter, stop: threading.Event) -> None:
        super().__init__(name="worker", daemon=True)
        self.options, self.state, self.reporter, self.stop = options, state, reporter, stop
        self.queue: queue.Queue[Deployment] = queue.Queue()
        self.registered: Optional[AgentRegistered] = None
        self.nix_config: dict[str, str] = {}
        self.deployed = threading.Event()
        self.taken: set[str] = set()  # what is queued or under way: the workspace may send it again
        peer = options.peer
        config = {"host": peer.host, "token": peer.token, "name": peer.name, "settings": asdict(options.settings)}
        config["network"] = "cachix_deploy"  # the module of `load_reach`
        from activate import attempt, conduct

        self.conductor = conduct.Conductor(
            attempt.Surroundings(
                config, options.waits.ready, options.waits.download, stop, self.source, self.last_look,
                reporter.wake.set, reporter.measured, tell, lambda timeout: reach(peer, timeout),
            )
        )  # fmt: skip

    def run(self) -> None:
        self.nix_config = nix.show_config()
        self.guarded(self.recover)
        while not self.stop.is_set():
            queued = [self.queue.get()]
            while not self.queue.empty():
                queued.append(self.queue.get())
            *older, newest = sorted(queued, key=lambda one: one.index)  # what is sent again need not come in order
            for deployment in older:
                self.guarded(self.supersede, deployment, newest)
            self.guarded(self.deploy, newest)
            self.taken -= {deployment.id for deployment in queued}

    def put(self, deployment: Deployment) -> None:
        """Queue a deployment, once. The end of one that has just ended may be told already, and is to be told again."""
        if deployment.id not in self.taken or self.conductor.has_ended(self.state, deployment.id):
            self.taken.add(deployment.id)
            self.queue.put(deployment)

    def guarded(self, do: Callable[..., None], *arguments: Any) -> None:
        """Whatever goes wrong with one deployment, the agent takes the next."""
        try:
            do(*arguments)
        except Exception as error:
            complain(error)

    def begin(self, deployment: Deployment) -> Optional[journal.Journal]:
        """A new deployment, which is reported from now on; None for one that is known: its end is reported again."""
        directory = os.path.join(self.state, "deployments", deployment.id)
        entry = None
        with contextlib.suppress(journal.Unreadable):
            entry = journal.load(directory)
        if entry is not None:
            if entry.record.step in journal.FINAL:
                with contextlib.suppress(OSError):
                    os.unlink(entry.path("reported.json"))
                self.reporter.add(entry)
            return None
        record = journal.Record(
            deployment.id, deployment.index, self.options.name, self.options.peer.host, deployment.store_path,
            deployment.rollback_script, self.options.profile,
        )  # fmt: skip
        entry = journal.Journal(directory, record)
        self.reporter.add(entry)
        return entry

    def supersede(self, older: Deployment, newer: Deployment) -> None:
        entry = self.begin(older)
        if entry is not None:
            self.conductor.end(entry, journal.SUPERSEDED, f"deployment {newer.index} came before this one was begun")

    def deploy(self, deployment: Deployment) -> None:
        """See a deployment through."""
        if deployment.resumed:
            self.conductor.wait_for_holder(self.options.name, deployment.id)
        entry = self.begin(deployment)
        if entry is None:
            return
        if deployment.resumed or journal.was_set_aside(entry.directory):
            self.conductor.end(entry, journal.FAILED, "state lost: without its journal nothing is executed")
            return
        tell(f"deployment {deployment.index}: {deployment.store_path}")
        self.conductor.settle(entry)
        self.deployed.set()

    def recover(self) -> None:
        """Bring to its end what an earlier agent has left, and report what it has not.

        What has changed the machine is seen to whoever began it, an agent of another name or at another workspace.
        """
        from activate import download

        download.remove_stale_netrcs(self.state)
        journals, problems = journal.load_all(self.state)
        for problem in problems:
            tell(problem)
        for entry in sorted(journals, key=lambda found: found.record.step in journal.HARMLESS):  # the cache comes late
            record = entry.record
            ours = (record.agent, record.host) == (self.options.name, self.options.peer.host)
            ended = record.step in journal.FINAL
            if ours and not (ended and logfile.Reported.load(entry.path("reported.json")).whole):
                self.reporter.add(entry)
                self.guarded(self.conductor.settle, entry)
                if not ended:
                    self.deployed.set()
            elif ended and record.step != journal.ROLLBACK_FAILED:
                entry.drop_roots()
            elif not (ours or ended or record.step in journal.HARMLESS) and not self.conductor.is_held(record.agent):
                self.guarded(self.conductor.settle, entry)

    @contextlib.contextmanager
    def source(self) -> Iterator[nix.Source]:
        """The workspace's cache for Nix, with a netrc that is there no longer than it is needed."""
        while self.registered is None:  # what an earlier agent has begun needs the workspace's cache too
            if self.stop.wait(0.1):
                raise Error("the agent ends")
        cache = self.registered.cache
        if cache is None:
            yield nix.Source()
            return
        peer = self.options.peer
        configured = self.nix_config.get("trusted-public-keys", "").split()
        keys = tuple(dict.fromkeys([*configured, peer.public_key(cache)]))
        url = peer.substituter(cache)
        if cache.is_public:
            yield nix.Source(url, keys)
            return
        from activate import download

        held = download.write_netrc(self.state, url, peer.token, self.nix_config.get("netrc-file", ""))
        try:
            yield nix.Source(url, keys, held.path)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(held.path)
            held.close()

    def last_look(self, entry: journal.Journal) -> None:
        """Before anything changes: a successor, a cancellation and the agent's own end still count. Raises Error."""
        from activate import attempt

        if self.registered is not None and self.registered.reports == "http":
            channel = HttpChannel(self.options.peer, entry.record.id, self.options.waits.call / 2)
            with contextlib.suppress(Refused, Unreachable, Gone):
                if not channel.status(IN_PROGRESS, None):
                    raise attempt.Ended(journal.CANCELLED, "it was cancelled before it was activated")
        if any(later.index > entry.record.index for later in list(self.queue.queue)):
            raise attempt.Ended(journal.SUPERSEDED, "a newer deployment came before this one was activated")
        if self.stop.is_set():
            raise Error("the agent ends")


class Stopped(Exception):
    """The agent ends, because the workspace asks it to or another one has taken over."""


class Agent:
    """The main thread: the websocket of an agent's whole life."""

    def __init__(self, options: AgentOptions, state: str) -> None:
        self.options, self.state, self.waits = options, state, options.waits
        self.stop = threading.Event()
        self.reporter = Reporter(options.peer, options.waits)
        self.worker = Worker(options, state, self.reporter, self.stop)
        self.socket: Optional[websocket.WebSocket] = None
        self.pending: list[Deployment] = []
        self.replaced = False
        self.leave_by = float("inf")

    def run(self) -> int:
        """Stay connected until asked to stop; the exit status."""
        self.reporter.start()
        self.worker.start()
        failures, first = 0, True
        while not self.stop.is_set():
            began, slowest = time.monotonic(), False
            try:
                self.socket = connect(self.options.peer, "/ws", self.waits.connect)
                first = False
                self.serve(self.socket)
            except Stopped:
                break
            except Refused as error:
                if first:
                    raise
                slowest = True
                tell(f"{error}; still trying")
            except Error as error:
                if not self.stop.is_set():
                    tell(str(error))
            if self.stop.is_set():
                break
            failures = 0 if time.monotonic() - began > self.waits.healthy else failures + 1
            pause = self.waits.slowest if slowest or self.replaced else backoff(failures - 1, self.waits)
            if self.socket is not None:
                hang_up(self.socket)  # a broken connection is not held open until the next one
            debug(f"connecting again in {pause:.1f} s")
            self.stop.wait(pause)
        self.farewell()
        if self.socket is not None:
            close(self.socket)
        return 0

    def farewell(self) -> None:
        """What is to be done before the end, by the agent's own will: a running switch goes on, a download ends."""
        self.stop.set()
        activate.process.end_all()
        switch, is_held = self.worker.conductor.switch, self.worker.conductor.is_held
        until = self.leave_by = min(self.leave_by, time.monotonic() + 6.0)  # a last look takes 5 s at most
        while switch is not None and not switch.step and is_held(self.options.name) and time.monotonic() < until:
            time.sleep(0.02)  # before "go" the worker has yet to write that this was no attempt
            activate.process.end_all()
        if switch is not None and switch.step not in (journal.ACTIVATING, journal.CHECKING):
            with contextlib.suppress(OSError, ValueError):  # the pipe may be closed by now, on either side
                switch.write("bye")

    def request_stop(self) -> None:
        """Ask the main thread to end, from another one."""
        self.farewell()
        if self.socket is not None:
            with contextlib.suppress(Exception):
                self.socket.settimeout(1)
                self.socket.send_close()
            hang_up(self.socket)

    def serve(self, socket_: websocket.WebSocket) -> None:
        """Receive until the connection ends, which is raised: Stopped, or Unreachable with the reason."""
        import websocket

        heard = pinged = time.monotonic()
        self.send_ping(socket_)
        while not self.stop.is_set():  # which may have been asked for while it connected
            now = time.monotonic()
            socket_.settimeout(max(0.01, min(pinged + self.waits.ping, heard + self.waits.silence) - now))
            try:
                opcode, frame = socket_.recv_data_frame(control_frame=True)
                heard = time.monotonic()
            except websocket.WebSocketTimeoutException:
                now = time.monotonic()
                if now >= heard + self.waits.silence:
                    raise Unreachable(f"nothing was heard for {self.waits.silence:.0f} s, connecting again") from None
                if now >= pinged + self.waits.ping:
                    self.send_ping(socket_)
                    pinged = now
                continue
            except (OSError, websocket.WebSocketException) as error:
                raise Unreachable(f"the connection was lost: {error or type(error).__name__}") from None
            if opcode == websocket.ABNF.OPCODE_CLOSE:
                self.closed(frame.data)
            elif opcode in (websocket.ABNF.OPCODE_TEXT, websocket.ABNF.OPCODE_BINARY):
                self.receive(frame.data)

    def send_ping(self, socket_: websocket.WebSocket) -> None:
        """Send a ping; one that can't be sent in time ends the connection."""
        import websocket

        try:
            socket_.settimeout(CALL_TIMEOUT)
            socket_.ping()
        except (OSError, websocket.WebSocketException) as error:
            raise Unreachable(f"the connection was lost: {error or type(error).__name__}") from None

    def closed(self, data: bytes) -> None:
        """The workspace has closed the connection: only 1000, or no code, asks the agent to end."""
        code = int.from_bytes(data[:2], "big") if len(data) >= 2 else 1000
        reason = data[2:].decode("utf-8", "replace")
        if code == 1000:
            tell("the workspace asked this agent to stop")
            raise Stopped
        self.replaced = code == 4001
        if self.replaced and self.options.bootstrap:
            tell("another agent of this name has taken over")
            self.drain()
            raise Stopped
        other = f"another agent named {self.options.name} has connected"
        meaning = {1012: "it restarts", 4001: other, 4003: "the token was revoked"}.get(code, "no reason given")
        raise Unreachable(f"the workspace closed the connection ({code}): {reason or meaning}")

    def receive(self, data: bytes) -> None:
        """Act on a message; one that can't be decoded is said and skipped."""
        try:
            message = decode_to_agent(data)
        except (Undecodable, UnicodeDecodeError) as error:
            tell(f"a message of the workspace was skipped: {error}")
            return
        if isinstance(message, AgentRegistered):
            self.register(message)
        else:
            self.pending.append(message)
        if self.worker.registered is not None:
            for deployment in self.pending:
                self.worker.put(deployment)
            self.pending.clear()

    def register(self, message: AgentRegistered) -> None:
        """The workspace knows this agent now."""
        tell(f"{self.options.name} is connected to {self.options.peer.host}")
        self.replaced = False
        self.worker.registered = message
        self.reporter.register(message)
        said = {"pid": os.getpid(), "boot_id": machine.boot_id(), "time": time.time()}
        try:
            path = os.path.join(self.state, f"registered-{self.options.name}.json")
            durable.write_durably(path, json.dumps(said).encode())
        except OSError as error:
            complain(Error(f"{self.state} can't be written: {error}"))

    def drain(self) -> None:
        """Let the deployment that runs come to its end and its report arrive; new ones are not taken.

        A report that does not arrive in time is the successor's to deliver.
        """
        while self.worker.conductor.attempt is not None and not self.stop.wait(0.2):
            pass
        until = time.monotonic() + self.waits.handover
        while not (self.reporter.idle.is_set() or self.stop.wait(0.2)) and time.monotonic() < until:
            pass


def watch_signals(agent: Agent) -> None:
    """SIGTERM and SIGINT end the agent, even while a name look-up holds its main thread."""
    receives, sends = socket.socketpair()
    sends.setblocking(False)
    signal.set_wakeup_fd(sends.fileno(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)

    def run(keep: socket.socket = sends) -> None:
        while not {signal.SIGTERM, signal.SIGINT} & set(receives.recv(64)):
            pass
        tell("asked to stop")
        until = time.monotonic() + 8.0
        agent.request_stop()
        time.sleep(max(0.0, until - time.monotonic()))
        os._exit(0)  # whatever holds the main thread: a name look-up, a peer that takes nothing

    threading.Thread(target=run, name="signals", daemon=True).start()


def agent_command(options: AgentOptions) -> int:
    """Run an agent until it is asked to stop."""
    state = journal.state_directory()
    for directory in (state, os.path.join(state, "deployments")):
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
        except OSError as error:  # deployments will fail with that reason, which is better than no agent
            complain(Error(f"{directory} can't be made ({error.strerror}): set STATE_DIRECTORY to one that can"))
    agent = Agent(options, state)
    if options.bootstrap:
        watch_signals(agent)
        threading.Thread(target=hand_over, args=(agent,), name="hand-over", daemon=True).start()
        return agent.run()
    path = lock.shared_path("agent", options.name)
    try:
        held = lock.take(path)
        if held is None:
            pid = lock.read(path.replace(".lock", ".pid"))
            message = f"an agent named {options.name} runs already" + (f" (pid {pid})" if pid else "")
            if options.if_stopped:
                debug(message)
                return 0
            raise AlreadyRunning(f"{message}; choose another NAME, or stop it first")
        with open(path.replace(".lock", ".pid"), "w", encoding="ascii") as file:
            file.write(str(os.getpid()))
    except OSError as error:
        hint = "set XDG_CACHE_HOME to a directory that can be written"
        raise Error(f"{path} can't be locked: {error.strerror}; {hint}") from None
    watch_signals(agent)
    return agent.run()


def hand_over(agent: Agent) -> None:
    """A bootstrapping agent ends when the machine's own agent has taken over; where none does, it stays."""
    worker, name = agent.worker, agent.options.name
    path = lock.shared_path("agent", name)
    while not agent.stop.is_set():
        worker.deployed.wait()
        worker.deployed.clear()
        tell(f"waiting up to {agent.waits.handover:.0f} s for the machine's own agent named {name} to take over")
        until = time.monotonic() + agent.waits.handover
        while time.monotonic() < until and not agent.stop.is_set():
            if lock.held(path):
                tell(f"the agent with pid {lock.read(path.replace('.lock', '.pid')) or '?'} has taken over")
                agent.drain()
                agent.request_stop()
                return
            time.sleep(0.2)
        tell(f"no agent named {name} has started, so this one stays")


def load_reach(config: dict[str, Any]) -> Callable[[float], None]:
    """For the switch process: a look at the workspace that reads no more files, as they may be gone by then."""
    import websocket

    websocket.WebSocket(sslopt={"ca_certs": ca_bundle()})
    peer = Peer(config["host"], config["token"], config["name"])
    return lambda timeout: reach(peer, timeout)


# --- main ------------------------------------------------------------------------------------------------------------

LONG_OPTIONS = tuple(re.findall(r"^  (?:-\w )?(--[a-z-]+)", __doc__ or "", re.MULTILINE))
verbose = False


def tell(message: str) -> None:
    """A message for the operator, one line on stderr; never raises."""
    with contextlib.suppress(OSError, ValueError):
        print(" ".join(message.split("\n")), file=sys.stderr, flush=True)


def debug(message: str) -> None:
    """A message for --verbose."""
    if verbose:
        tell(message)


def complain(error: Exception) -> None:
    """Tell of an error; a mistake of this program, and everything with --verbose, with its traceback."""
    tell(f"error: {error or type(error).__name__}")
    if verbose or not isinstance(error, (Error, OSError)):
        with contextlib.suppress(OSError, ValueError):
            import traceback

            traceback.print_exception(type(error), error, error.__traceback__, file=sys.stderr)


def normalized(argv: list[str]) -> list[str]:
    """The command line as docopt takes it. Raises UsageError.

    docopt takes unambiguous prefixes, so that a mistyped `--token SECRET` would be a `--token-file`; it refuses
    `"--host URL"` as one argument, which home-manager's module passes. Empty arguments are dropped.
    """
    words: list[str] = []
    for word in argv:
        head, blank, rest = word.partition(" ")
        words += [head, rest] if blank and head in LONG_OPTIONS else [word]
    words = [word for word in words if word]
    takes = {option for option in LONG_OPTIONS if f"{option}=" in (__doc__ or "")}
    value_next = False
    for word in words:
        if word == "--":
            break
        name = word.partition("=")[0]
        if not value_next and word.startswith("--") and name not in LONG_OPTIONS:
            hint = "; tokens come from the environment or --token-file" if name.startswith("--tok") else ""
            raise UsageError(f"there is no option {name[:40]}{hint}: see --help")
        value_next = not value_next and word in takes
    return words


def misfit(words: list[str]) -> str:
    """What is wrong with arguments that fit no command: docopt does not say. Nothing is shown: it may be a token."""
    command = next((word for word in words if word in ("agent", "activate")), None)
    if command is None:
        return "there must be a command, agent or activate"
    if command == "activate" and words[-1] == command:
        return "activate needs a deploy.json"
    return f"{command} takes no such arguments"


def parse(argv: list[str]) -> dict[str, Any]:
    """The command line as a dictionary. Raises UsageError, or SystemExit for --help and --version."""
    import docopt

    words = normalized(argv)
    try:
        return dict(docopt.docopt(__doc__, argv=words, version=f"cachix-deploy {__version__}"))
    except docopt.DocoptExit as error:
        said = str(error).splitlines()[0] if not str(error).startswith("Usage:") else misfit(words)
        raise UsageError(f"{said}: see --help") from None


def seconds(options: dict[str, Any], name: str) -> float:
    """The value of an option that is a number of seconds. Raises UsageError."""
    try:
        value = float(options[name])
    except ValueError:
        value = -1.0
    if not 0 < value < 1e7:
        raise UsageError(f"{name} must be a number of seconds above 0, not {options[name]!r}")
    return value


def choice(options: dict[str, Any], name: str, allowed: tuple[str, ...]) -> str:
    """The value of an option that is one of a few words. Raises UsageError."""
    if options[name] not in allowed:
        raise UsageError(f"{name} must be {' or '.join(allowed)}, not {options[name]!r}")
    return str(options[name])


def read_token(variable: str, file_option: Optional[str]) -> str:
    """The token: of --token-file, the environment, or a systemd credential of that name. Raises UsageError."""
    credential = os.path.join(os.environ.get("CREDENTIALS_DIRECTORY", "/nonexistent"), variable)
    token = os.environ.get(variable, "")
    path = file_option or (credential if not token and os.path.exists(credential) else None)
    if path is not None:
        try:
            with open(path, encoding="utf-8") as file:
                token = file.read(1 << 16)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the token file {path} can't be read: {error}") from None
        token = token.strip().removeprefix(f"{variable}=") if sys.version_info >= (3, 9) else token
    token = token.strip().strip("\"'")
    if not token:
        raise UsageError(f"there is no token: set {variable}, or give --token-file=FILE")
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise UsageError("the token has blanks or characters that no token has")
    return token


def agent_options(options: dict[str, Any]) -> AgentOptions:
    """An agent's command line. Raises UsageError."""
    name = options["NAME"] or socket.gethostname().partition(".")[0]
    for what, value in (("NAME", name), ("PROFILE", options["PROFILE"] or name)):
        if not is_agent_name(value):
            raise UsageError(f"{what} {value!r} is not usable: letters, digits, `-`, `_` and `.`, at most 128 of them")
    token = read_token("CACHIX_AGENT_TOKEN", options["--token-file"])
    waits = Waits.from_environment()
    settings = verdict.Settings(
        seconds(options, "--confirm-timeout"),
        seconds(options, "--activation-timeout"),
        choice(options, "--on-unit-failure", ("rollback", "tolerate")),
        choice(options, "--on-reboot-needed", ("fail", "boot")),
        waits.unit_recheck,
    )
    peer = Peer.create(options["--host"], token, name)
    return AgentOptions(peer, options["PROFILE"], options["--bootstrap"], options["--if-stopped"], settings, waits)


def activate_command(options: dict[str, Any]) -> int:
    """Deploy and wait; the exit status. Raises Error."""
    import cachix_activate

    timeout = seconds(options, "--timeout") if options["--timeout"] is not None else None
    command_line = cachix_activate.ActivateOptions(
        host=options["--host"],
        token=read_token("CACHIX_ACTIVATE_TOKEN", options["--token-file"]),
        spec_path=options["SPEC"],
        agents=tuple(options["--agent"]),
        asynchronous=options["--async"],
        timeout=timeout,
    )
    return cachix_activate.activate_command(command_line)


def main(argv: Optional[list[str]] = None) -> int:
    """Run a command line and return its exit status."""
    global verbose
    argv = sys.argv[1:] if argv is None else argv
    try:
        if len(argv) == 2 and argv[0] == "switch":
            from activate import boot

            return boot.main(argv[1])
        options = parse(argv)
        verbose = options["--verbose"]
        complete_proxies()
        if options["agent"]:
            return agent_command(agent_options(options))
        return activate_command(options)
    except Error as error:
        complain(error)
        return error.status
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.modules.setdefault("cachix_deploy", sys.modules["__main__"])  # run as a file, it is still one module
    sys.exit(main())
