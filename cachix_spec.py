"""The command line of `activate`, checked, and the deploy.json that it names."""

from __future__ import annotations

import json
import os
from typing import Any, Optional

import cachix_job
from activate.values import dataclass, field
from cachix_console import choice, positive, read_token, tell
from cachix_options import PushOptions, host_of, number, push_options, signer
from cachix_protocol import Error, Spec, Undecodable, UsageError, listed
from cachix_rollout import FAIL, SKIP, WAIT, Rollout, size
from cachix_signed import Signer


@dataclass(frozen=True)
class ActivateOptions:
    """The command line of `activate`, checked. `timeout` is in seconds.

    `source` is what CI says about itself. With `waits` a frozen workspace is waited for. `targets`
    are NAME=/nix/store/... in place of a deploy.json. With `json` stdout is for programs. With
    `push` their closures are pushed before.
    """

    host: str
    token: Optional[str]
    spec_path: str
    agents: tuple[str, ...] = ()
    asynchronous: bool = False
    timeout: Optional[float] = None
    signer: Optional[Signer] = None
    source: dict[str, str] = field(default_factory=dict)
    waits: bool = False
    targets: tuple[str, ...] = ()
    rollout: Rollout = Rollout()
    json: bool = False
    push: Optional[PushOptions] = None


def rollout(options: dict[str, Any]) -> Rollout:
    """The options of a roll-out. Raises UsageError."""
    batch = options["--batch"] or ""
    if batch:
        size(batch, 1)
    waits = [name for name in ("--canary", "--batch", "--rollback-succeeded") if options[name]]
    if options["--async"] and waits:
        raise UsageError(f"{waits[0]} waits for deployments, and --async does not")
    if options["--agent"] and options["--on"]:
        raise UsageError("--agent and --on both select agents: --on takes names too")
    return Rollout(
        canary=words(options["--canary"]),
        batch=batch,
        max_failures=number(options, "--max-failures", 10**6),
        pause=number(options, "--pause", 10**6),
        rolls_back=options["--rollback-succeeded"],
        offline=choice(options, "--offline", (WAIT, SKIP, FAIL)),
        unknown=choice(options, "--unknown", (FAIL, SKIP)),
        on=words(options["--on"]),
        force=options["--force"],
    )


def words(text: Optional[str]) -> tuple[str, ...]:
    """The words of a list with commas."""
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def activate_options(options: dict[str, Any]) -> ActivateOptions:
    """The command line of `activate`. Raises UsageError."""
    timeout = options["--timeout"]
    targets = options["SPEC"]
    return ActivateOptions(
        host=host_of(options),
        token=read_token("CACHIX_ACTIVATE_TOKEN", options["--token-file"]),
        spec_path=targets[0],
        targets=tuple(targets) if len(targets) > 1 or is_target(targets[0]) else (),
        rollout=rollout(options),
        json=options["--json"],
        agents=tuple(options["--agent"]),
        asynchronous=options["--async"],
        timeout=None if timeout is None else positive(options, "--timeout", "seconds"),
        signer=signer(options),
        source=cachix_job.source(os.environ, options["--message"]),
        waits=options["--wait"],
        push=push_options(options) if options["--push"] else None,
    )


def decode_spec(raw: bytes, name: str) -> Spec:
    """Decode and check a deploy.json, which messages call `name`. Raises Error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = sorted(key for key, _ in pairs)
        for key, following in zip(keys, keys[1:]):
            if key == following:
                twice = f"{name} has the key {json.dumps(key)} twice in one object"
                raise Error(f"{twice}, and only one would count")
        return dict(pairs)

    try:
        record = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique)
        spec = Spec.from_json(record)
    except Undecodable as error:
        raise Error(f"{name} can't be deployed: {error}") from None
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is 0x{raw[error.start]:02x}"
        raise Error(f"{name} is not UTF-8 text: {byte}") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise Error(f"{name} is not JSON: {place}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise Error(f"{name} is not JSON that can be read: {error}") from None
    for key in sorted(record.keys() - {"agents", "rollbackScript", "options"}):
        tell(f"warning: {name} has an unknown key, which is ignored: {json.dumps(key)}")
    return spec


def read_spec(options: ActivateOptions) -> Spec:
    """Read the deploy.json, and keep the chosen agents. Raises Error."""
    path = options.spec_path
    name = "the specification on stdin" if path == "-" else path
    if options.targets:
        name, spec = "the command line", decode_targets(options.targets)
    else:
        try:
            with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
                spec = decode_spec(file.read(), name)
        except OSError as error:
            raise Error(f"{name} can't be read: {error.strerror or error}") from None
    unknown = [agent for agent in options.agents if agent not in spec.agents]
    if unknown:
        present = listed(sorted(spec.agents))
        raise UsageError(f"no agent {listed(unknown)} in {name}, which has {present}")
    chosen = frozenset(options.agents or spec.agents)
    agents = {agent: each for agent, each in spec.agents.items() if agent in chosen}
    return Spec(agents, spec.rollback_scripts, wishes=spec.wishes)


# --- NAME=/nix/store/... --------------------------------------------------------------------------


def is_target(word: str) -> bool:
    """Whether an argument names an agent and its store path, and no file."""
    name, _, path = word.partition("=")
    return path.startswith("/nix/store/") and "/" not in name


def decode_targets(targets: tuple[str, ...]) -> Spec:
    """The specification that NAME=/nix/store/... arguments are. Raises UsageError."""
    agents: dict[str, str] = {}
    for word in targets:
        name, _, path = word.partition("=")
        if not is_target(word):
            hint = "several arguments must each be NAME=/nix/store/..."
            raise UsageError(f"activate takes one deploy.json: {hint}, not {word[:200]!r}")
        if name in agents:
            raise UsageError(f"agent {name} is named twice, and only one path would count")
        agents[name] = path
    try:
        return Spec.from_json({"agents": agents})
    except Undecodable as error:
        raise UsageError(str(error)) from None
