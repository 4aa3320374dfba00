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
import datetime
import json
import os
import platform
import re
import socket
import sys
import threading
import time
import urllib.parse
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional, Union

import websocket

if TYPE_CHECKING:
    import requests

__version__ = "0.1.0"

PROTOCOL_VERSION = "1.11.1"  # the release of Cachix whose protocol is spoken
USER_AGENT = f"cachix-deploy/{__version__}"

# --- errors ----------------------------------------------------------------------------------------------------------


class Error(Exception):
    """What the user is told: a sentence that says what failed and what to do. `status` is the exit status."""

    status = 1


class UsageError(Error):
    """The command line, or a value on it, is wrong."""

    status = 64


class Unreachable(Error):
    """The workspace does not answer, or not in its protocol."""

    status = 69


class Refused(Error):
    """The workspace refuses the token."""

    status = 77


class Undecodable(ValueError):
    """A message that is not of the protocol; it is logged and skipped."""


# --- wire values: protocol.md, and nothing else, decides the names below ---------------------------------------------

STORE_PATH = re.compile(r"/nix/store/[0-9abcdfghijklmnpqrsvwxyz]{32}-[0-9a-zA-Z+\-_?=][0-9a-zA-Z+\-._?=]{0,210}")
AGENT_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,127}")
UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
PENDING, IN_PROGRESS = "Pending", "InProgress"
SUCCEEDED, FAILED, CANCELLED = "Succeeded", "Failed", "Cancelled"
TERMINAL = frozenset({SUCCEEDED, FAILED, CANCELLED})
SUCCESS_LINE = "Successfully activated the deployment."
FAILURE_LINE = "Failed to activate the deployment."


def is_store_path(text: object) -> bool:
    """Whether `text` is a store path itself, by Nix's grammar: no option, no file below one, nothing outside the store."""
    return isinstance(text, str) and STORE_PATH.fullmatch(text) is not None


def is_agent_name(text: object) -> bool:
    """Whether `text` may become the name of an agent, and so part of file names and of a header."""
    return isinstance(text, str) and AGENT_NAME.fullmatch(text) is not None


def utc_now() -> str:
    """The time as the protocol writes it: RFC 3339, UTC, microseconds."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def nix_system() -> str:
    """This machine as Nix names it, such as x86_64-linux or aarch64-darwin."""
    machine = {"arm64": "aarch64", "amd64": "x86_64", "i386": "i686"}.get(platform.machine(), platform.machine())
    return f"{machine}-{sys.platform}"


def _field(record: Any, name: str, kinds: Union[type, tuple[type, ...]], optional: bool = False) -> Any:
    """Value `name` of a JSON object, checked. A missing key counts as null where it is optional."""
    if not isinstance(record, dict):
        raise Undecodable("an object was expected")
    value = record.get(name)
    if value is None and optional:
        return None
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is int):
        raise Undecodable(f"`{name}` is missing or of the wrong type")
    return value


def _uuid_field(record: Any, name: str) -> str:
    value = _field(record, name, str)
    if not UUID.fullmatch(value):
        raise Undecodable(f"`{name}` is not a UUID")
    return str(value).lower()


def _path_field(record: Any, name: str) -> str:
    value = _field(record, name, str)
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
            _field(record, "cacheName", str),
            _field(record, "publicKey", str),
            _field(record, "isPublic", bool),
            _field(record, "uri", str, optional=True),
        )

    def to_json(self) -> dict[str, Any]:
        extra = {} if self.uri is None else {"uri": self.uri}
        return {"cacheName": self.name, "publicKey": self.public_key, "isPublic": self.is_public, **extra}


@dataclass(frozen=True)
class AgentRegistered:
    """The first message to an agent: who it is, where closures come from, how it reports ("http", or null for Cachix)."""

    id: str
    cache: Optional[Cache] = None
    reports: Optional[str] = None

    @classmethod
    def from_json(cls, record: Any) -> AgentRegistered:
        cache = _field(record, "cache", dict, optional=True)
        reports = _field(record, "reports", str, optional=True)
        return cls(_uuid_field(record, "id"), None if cache is None else Cache.from_json(cache), reports)

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
            _field(record, "storePath", str),
            _uuid_field(record, "id"),
            _field(record, "index", int),
            _field(record, "rollbackScript", str, optional=True),
            bool(_field(record, "resumed", bool, optional=True)),
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
        size = _field(record, "closureSize", int, optional=True)
        return cls(_uuid_field(record, "id"), _field(record, "time", str), size)

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
        return cls(_uuid_field(record, "id"), _field(record, "time", str), _field(record, "hasSucceeded", bool))

    def to_json(self) -> dict[str, Any]:
        return {"hasSucceeded": self.has_succeeded, "id": self.id, "tag": "DeploymentFinished", "time": self.time}


@dataclass(frozen=True)
class LogLine:
    """A line of a deployment's log, without its newline."""

    line: str
    time: str

    @classmethod
    def from_json(cls, record: Any) -> LogLine:
        return cls(_field(record, "line", str), _field(record, "time", str))

    def to_json(self) -> dict[str, Any]:
        return {"line": self.line, "time": self.time}


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
    return dumps({"method": tag, "command": inner, "agent": None, "id": str(uuid.uuid4())})


def decode_to_agent(text: Union[str, bytes]) -> ToAgent:
    """What a frame on /ws says; raises Undecodable. The tag decides, `method` is ignored as by Cachix's client."""
    command = _field(loads(text), "command", dict)
    tag, contents = _field(command, "tag", str), _field(command, "contents", dict)
    if tag == "AgentRegistered":
        return AgentRegistered.from_json(contents)
    if tag == "Deployment":
        return Deployment.from_json(contents)
    raise Undecodable(f"unknown tag `{tag}`")


def encode_from_agent(agent_id: str, command: FromAgent) -> str:
    """The frame that carries `command` on /ws-deployment."""
    message = {"agent": agent_id, "command": command.to_json(), "id": str(uuid.uuid4())}
    return dumps({**message, "method": type(command).__name__})


def decode_from_agent(text: Union[str, bytes]) -> FromAgent:
    """What a frame on /ws-deployment says; raises Undecodable."""
    command = _field(loads(text), "command", dict)
    tag = _field(command, "tag", str)
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
        agents = _field(record, "agents", dict)
        scripts = _field(record, "rollbackScript", dict, optional=True) or {}
        for name in agents:
            _path_field(agents, name)
        for system in scripts:
            _path_field(scripts, system)
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
    """The file of trusted certificate authorities, for every connection of this program; None: certifi's own.

    A zip application can't open certifi's file in place, so there Python's own default counts.
    """
    named = [os.environ.get(name) for name in ("SSL_CERT_FILE", "NIX_SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")]
    for candidate in [*named, *SYSTEM_BUNDLES]:
        if candidate and os.path.isfile(candidate):
            return candidate
    return None


@dataclass(frozen=True)
class Peer:
    """A workspace as one token sees it. `name` is the agent's, and None for CI."""

    host: str
    token: str
    name: Optional[str] = None

    @classmethod
    def create(cls, host: str, token: str, name: Optional[str] = None) -> Peer:
        """Raises UsageError where `host` is no http or https URL."""
        parts = urllib.parse.urlsplit(host if "://" in host else f"https://{host}")
        try:
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


def connect(peer: Peer, path: str, timeout: float = CONNECT_TIMEOUT) -> websocket.WebSocket:
    """A websocket to `path` of the workspace. Raises Refused (the token), or Unreachable with what was wrong."""
    bundle = ca_bundle()
    socket_ = websocket.WebSocket(
        enable_multithread=True, skip_utf8_validation=True, sslopt={} if bundle is None else {"ca_certs": bundle}
    )
    watchdog = threading.Timer(timeout, hang_up, (socket_,))  # its own timeout is per packet
    watchdog.name, watchdog.daemon = "connect-deadline", True
    watchdog.start()
    headers = [f"{name}: {value}" for name, value in peer.headers().items()]
    try:
        socket_.connect(
            "ws" + peer.host[4:] + path, header=headers, timeout=timeout, suppress_origin=True, redirect_limit=0
        )
    except websocket.WebSocketBadStatusException as error:
        status = error.status_code
        if status in (401, 403):
            raise Refused(f"{peer.host} refused the token (HTTP {status}): check it, or create a new one") from None
        location = (error.resp_headers or {}).get("location")
        moved = f" and points to {location}, which is not followed: give it as --host" if location else ""
        raise Unreachable(f"{peer.host}{path} answered HTTP {status} instead of a websocket{moved}") from None
    except (OSError, ValueError, websocket.WebSocketException) as error:
        hang_up(socket_)
        raise Unreachable(f"no connection to {peer.host}{path}: {error or type(error).__name__}") from None
    finally:
        watchdog.cancel()
    return socket_


def hang_up(socket_: websocket.WebSocket) -> None:
    """End a connection at once, from any thread: a read of it in another thread ends too."""
    with contextlib.suppress(OSError, AttributeError):
        socket_.sock.shutdown(socket.SHUT_RDWR)


def close(socket_: websocket.WebSocket) -> None:
    """Say goodbye (1000) and close; never raises, waits a second at most for the answer."""
    with contextlib.suppress(OSError, ValueError, websocket.WebSocketException):
        socket_.close(timeout=1)


def round_trip(socket_: websocket.WebSocket, timeout: float) -> None:
    """Send a ping and wait for its pong: what was sent before has arrived. Raises Unreachable."""
    mark, deadline = uuid.uuid4().bytes, time.monotonic() + timeout
    try:
        socket_.settimeout(timeout)
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
    """One request, its answer read whole (at most 64 MiB). Raises Unreachable where none comes within `timeout` seconds.

    Redirects are refused as any other status that the caller does not expect: the token would go elsewhere.
    """
    import requests

    deadline = time.monotonic() + timeout
    headers = {**peer.headers(), **kwargs.pop("headers", {})}
    try:
        answer = _session().request(
            method, peer.host + path, headers=headers, timeout=timeout, stream=True, allow_redirects=False,
            verify=ca_bundle() or True, **kwargs,
        )
        body = bytearray()
        for chunk in answer.iter_content(1 << 16):
            body += chunk
            if time.monotonic() > deadline or len(body) > 1 << 26:
                raise requests.Timeout(f"the answer took longer than {timeout:.0f} s, or has no end")
        answer._content = bytes(body)
    except (requests.RequestException, OSError, ValueError) as error:
        raise Unreachable(f"{method} {peer.host}{path} failed: {error or type(error).__name__}") from None
    return answer


_sessions = threading.local()


def _session() -> requests.Session:
    """The calling thread's own session; proxies come from the environment, credentials never from a ~/.netrc."""
    import requests

    if not hasattr(_sessions, "value"):
        _sessions.value = requests.Session()
        _sessions.value.auth = lambda request: request
    return _sessions.value  # type: ignore[no-any-return]


# --- reports ---------------------------------------------------------------------------------------------------------

# --- agent -----------------------------------------------------------------------------------------------------------

# --- activate command ------------------------------------------------------------------------------------------------

# --- main ------------------------------------------------------------------------------------------------------------
