"""The wire protocol of Cachix Deploy: names, values and messages in JSON; the door to the errors.

Nothing here does I/O. protocol.md decides every name below; our own additions are marked as such.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from typing import Any, Optional, Union

from activate.text import BASE32 as BASE32
from activate.text import base32 as base32
from activate.text import brief
from activate.text import is_store_path as is_store_path
from activate.values import dataclass, field
from cachix_errors import AlreadyRunning as AlreadyRunning
from cachix_errors import Error as Error
from cachix_errors import Gone as Gone
from cachix_errors import Refused as Refused
from cachix_errors import Undecodable as Undecodable
from cachix_errors import Unreachable as Unreachable
from cachix_errors import UsageError as UsageError
from cachix_wishes import ABILITY as ABILITY
from cachix_wishes import EXAMPLE_SCRIPTS, EXAMPLE_SPEC, brief_value, decode_wishes, is_printable
from cachix_wishes import PLAIN as PLAIN
from cachix_wishes import WISHES as WISHES
from cachix_wishes import Wish as Wish
from cachix_wishes import listed as listed

__version__ = "0.1.0"

PROTOCOL_VERSION = "1.11.1"  # the Cachix release whose protocol we speak
USER_AGENT = f"cachix-deploy/{__version__}+{ABILITY}"

# --- names and values -----------------------------------------------------------------------------

AGENT_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,127}")
UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
PENDING, IN_PROGRESS = "Pending", "InProgress"
SUCCEEDED, FAILED, CANCELLED = "Succeeded", "Failed", "Cancelled"
TERMINAL = frozenset({SUCCEEDED, FAILED, CANCELLED})
SUCCESS_LINE = "Successfully activated the deployment."
FAILURE_LINE = "Failed to activate the deployment."


def is_agent_name(text: object) -> bool:
    """Whether `text` may be an agent's name: it becomes part of file names and of a header."""
    return isinstance(text, str) and AGENT_NAME.fullmatch(text) is not None


def checked_url(text: str, option: str, example: str, bare: bool = False) -> str:
    """An http or https URL without a slash at its end. Raises UsageError that names the option.

    It may hold no user and no password, which no message repeats; with `bare` no fragment either.
    """
    from urllib.parse import urlsplit, urlunsplit

    if "@" in text:
        raise UsageError(f"{option} must be a URL such as {example}, without user and password")
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:
        valid = False
    if not valid or parts.query or (bare and parts.fragment):
        raise UsageError(f"{option} must be a URL such as {example}, not {text!r}")
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))


def utc_now() -> str:
    """The present time as the protocol writes it: RFC 3339, UTC, microseconds."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{nanoseconds // 1000:06}Z"


def nix_system() -> str:
    """This machine as Nix names it, such as x86_64-linux or aarch64-darwin."""
    renamed = {"arm64": "aarch64", "amd64": "x86_64", "i386": "i686"}
    machine = os.uname().machine
    return f"{renamed.get(machine, machine)}-{sys.platform}"


def fresh_id() -> str:
    """A random UUID."""
    import uuid

    return str(uuid.uuid4())


# --- JSON -----------------------------------------------------------------------------------------


def dumps(record: Any) -> str:
    """JSON as the protocol writes it: compact, UTF-8 unescaped."""
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False)


def loads(text: Union[str, bytes]) -> Any:
    """JSON, read as tolerantly as Cachix's client does. Raises Undecodable for any other bytes."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Undecodable(f"not JSON ({error})") from None


def checked_field(
    record: Any, name: str, kinds: Union[type, tuple[type, ...]], optional: bool = False
) -> Any:
    """Value `name` of a JSON object if it has the right type. Raises Undecodable.

    An optional value may be null, or missing.
    """
    if not isinstance(record, dict):
        raise Undecodable("an object was expected")
    value = record.get(name)
    if value is None and optional:
        return None
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is int):
        raise Undecodable(f"`{name}` is missing or of the wrong type")
    return value


def uuid_field(record: Any, name: str) -> str:
    """Value `name` of a JSON object, which must be a UUID; in lower case. Raises Undecodable."""
    value = checked_field(record, name, str)
    if not UUID.fullmatch(value):
        raise Undecodable(f"`{name}` is not a UUID")
    return str(value).lower()


# --- messages -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cache:
    """The binary cache of a workspace.

    `uri` is our own addition. Without it the cache is a subdomain of the workspace.
    """

    name: str
    public_key: str
    is_public: bool
    uri: Optional[str] = None

    @classmethod
    def from_json(cls, record: Any) -> Cache:
        return cls(
            name=checked_field(record, "cacheName", str),
            public_key=checked_field(record, "publicKey", str),
            is_public=checked_field(record, "isPublic", bool),
            uri=checked_field(record, "uri", str, optional=True),
        )

    def to_json(self) -> dict[str, Any]:
        extra = {} if self.uri is None else {"uri": self.uri}
        fixed = {"cacheName": self.name, "publicKey": self.public_key, "isPublic": self.is_public}
        return {**fixed, **extra}


UNREADABLE = Cache("", "", False)  # a cache without its fields; the agent refuses to deploy from it


@dataclass(frozen=True)
class AgentRegistered:
    """The first message to an agent: its id, its binary cache, and how it reports.

    Our own additions: `reports` is "http" for plain requests, null for the sockets of Cachix;
    `secret` is a token of its own for the agent, `expires` when the one that it has will expire.
    """

    id: str
    cache: Optional[Cache] = None
    reports: Optional[str] = None
    secret: Optional[str] = field(default=None, repr=False)
    expires: Optional[str] = None

    @classmethod
    def from_json(cls, record: Any) -> AgentRegistered:
        cache: Optional[Cache] = UNREADABLE
        with contextlib.suppress(Undecodable):
            fields = checked_field(record, "cache", dict, optional=True)
            cache = None if fields is None else Cache.from_json(fields)
        return cls(
            id=uuid_field(record, "id"),
            cache=cache,
            reports=checked_field(record, "reports", str, optional=True),
            secret=checked_field(record, "secret", str, optional=True),
            expires=checked_field(record, "tokenExpires", str, optional=True),
        )

    def to_json(self) -> dict[str, Any]:
        extra = {"reports": self.reports, "secret": self.secret, "tokenExpires": self.expires}
        own = {name: value for name, value in extra.items() if value is not None}
        return {"cache": None if self.cache is None else self.cache.to_json(), "id": self.id, **own}


@dataclass(frozen=True)
class Deployment:
    """The order to run `store_path`.

    `resumed`, our own addition, says that the workspace believes that the agent had it already.
    Others are the `signature` of CI, and the `wish`. It, signature and paths are checked where they
    are used, so that a bad one is reported instead of dropped.
    """

    store_path: str
    id: str
    index: int
    rollback_script: Optional[str] = None
    resumed: bool = False
    signature: Any = None
    wish: Any = None

    @classmethod
    def from_json(cls, record: Any) -> Deployment:
        return cls(
            store_path=checked_field(record, "storePath", str),
            id=uuid_field(record, "id"),
            index=checked_field(record, "index", int),
            rollback_script=checked_field(record, "rollbackScript", str, optional=True),
            resumed=bool(checked_field(record, "resumed", bool, optional=True)),
            signature=record.get("signature"),
            wish=record.get("options"),
        )

    def to_json(self) -> dict[str, Any]:
        extra: dict[str, Any] = {"resumed": True} if self.resumed else {}
        own = {"signature": self.signature, "options": self.wish}
        extra.update({name: value for name, value in own.items() if value is not None})
        fixed = {"storePath": self.store_path, "id": self.id, "index": self.index}
        return {**fixed, "rollbackScript": self.rollback_script, **extra}


@dataclass(frozen=True)
class DeploymentStarted:
    """An agent began a deployment. Sent again with the closure's size in bytes once it is known."""

    id: str
    time: str
    closure_size: Optional[int] = None

    @classmethod
    def from_json(cls, record: Any) -> DeploymentStarted:
        return cls(
            id=uuid_field(record, "id"),
            time=checked_field(record, "time", str),
            closure_size=checked_field(record, "closureSize", int, optional=True),
        )

    def to_json(self) -> dict[str, Any]:
        tag = {"id": self.id, "tag": "DeploymentStarted", "time": self.time}
        return {"closureSize": self.closure_size, **tag}


@dataclass(frozen=True)
class DeploymentFinished:
    """A deployment ended on the machine."""

    id: str
    time: str
    has_succeeded: bool

    @classmethod
    def from_json(cls, record: Any) -> DeploymentFinished:
        return cls(
            has_succeeded=checked_field(record, "hasSucceeded", bool),
            id=uuid_field(record, "id"),
            time=checked_field(record, "time", str),
        )

    def to_json(self) -> dict[str, Any]:
        tag = {"id": self.id, "tag": "DeploymentFinished", "time": self.time}
        return {"hasSucceeded": self.has_succeeded, **tag}


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


ToAgent = Union[AgentRegistered, Deployment]
FromAgent = Union[DeploymentStarted, DeploymentFinished]


def encode_to_agent(command: ToAgent) -> str:
    """The frame that carries `command` on /ws."""
    tag = type(command).__name__
    inner = {"tag": tag, "contents": command.to_json()}
    return dumps({"method": tag, "command": inner, "agent": None, "id": fresh_id()})


def decode_to_agent(text: Union[str, bytes]) -> ToAgent:
    """The message of a frame on /ws. Raises Undecodable.

    The tag decides; `method` is ignored, as Cachix's client does.
    """
    command = checked_field(loads(text), "command", dict)
    tag, contents = checked_field(command, "tag", str), checked_field(command, "contents", dict)
    if tag == "AgentRegistered":
        return AgentRegistered.from_json(contents)
    if tag == "Deployment":
        return Deployment.from_json(contents)
    raise Undecodable(f"unknown tag `{brief(tag)}`")


def encode_from_agent(agent_id: str, command: FromAgent) -> str:
    """The frame that carries `command` on /ws-deployment."""
    message = {"agent": agent_id, "command": command.to_json(), "id": fresh_id()}
    return dumps({**message, "method": type(command).__name__})


def decode_from_agent(text: Union[str, bytes]) -> FromAgent:
    """The message of a frame on /ws-deployment. Raises Undecodable."""
    command = checked_field(loads(text), "command", dict)
    tag = checked_field(command, "tag", str)
    if tag == "DeploymentStarted":
        return DeploymentStarted.from_json(command)
    if tag == "DeploymentFinished":
        return DeploymentFinished.from_json(command)
    raise Undecodable(f"unknown tag `{brief(tag)}`")


# --- deploy.json ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """A deploy.json: the store path for each agent, and a rollback script for each system.

    Our own additions: the `wishes` and `signatures` of deployments, by agent, the `source`, what CI
    says about itself, and the `run` that an order goes on with.
    """

    agents: dict[str, str]
    rollback_scripts: dict[str, str]
    signatures: dict[str, Any] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)
    run: Optional[int] = None
    wishes: dict[str, Wish] = field(default_factory=dict)

    @classmethod
    def from_json(cls, record: Any) -> Spec:
        """Raises Undecodable, with a sentence that lists the values that are wrong."""
        if not isinstance(record, dict):
            raise Undecodable(f"a deploy.json must hold an object such as {EXAMPLE_SPEC}")
        agents, scripts = record.get("agents"), record.get("rollbackScript")
        if not isinstance(agents, dict) or not agents:
            example = f"an object with at least one agent, as in {EXAMPLE_SPEC}"
            raise Undecodable(f"`agents` must be {example}")
        if scripts is not None and not isinstance(scripts, dict):
            raise Undecodable(f"`rollbackScript` must be an object such as {EXAMPLE_SCRIPTS}")
        scripts = scripts or {}
        bad = [brief_value(name) for name in (*agents, *scripts) if not is_printable(name)]
        if bad:
            raise Undecodable(f"these names are empty or can't be printed: {listed(bad)}")
        values = [(f"agents.{name}", path) for name, path in agents.items()]
        values += [(f"rollbackScript.{name}", path) for name, path in scripts.items()]
        bad = [
            f"{at[:200]} is {brief_value(path)}" for at, path in values if not is_store_path(path)
        ]
        if bad:
            raise Undecodable(f"not a store path (/nix/store/HASH-NAME): {listed(bad)}")
        signatures = checked_field(record, "signatures", dict, optional=True) or {}
        wishes = decode_wishes(record.get("options"), agents)
        return cls(agents, scripts, signatures, wishes=wishes)

    @property
    def has_wishes(self) -> bool:
        """Whether any deployment is not a plain one."""
        return any(name in self.wishes for name in self.agents)

    def to_json(self) -> dict[str, Any]:
        extra: dict[str, Any] = {}
        extra.update({"rollbackScript": self.rollback_scripts} if self.rollback_scripts else {})
        extra.update({"signatures": self.signatures} if self.signatures else {})
        extra.update({"source": self.source} if self.source else {})
        extra.update({} if self.run is None else {"run": self.run})
        own = {name: self.wishes[name].to_json() for name in self.agents if name in self.wishes}
        extra.update({"options": {"agents": own}} if own else {})
        return {"agents": self.agents, **extra}
