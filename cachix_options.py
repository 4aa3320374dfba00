"""The command line of the agent and of `activate`: its usage, and its values, checked."""

from __future__ import annotations

import math
import os
import re
import socket
from dataclasses import dataclass, field
from typing import Any, Optional

import cachix_console
import cachix_plain
from activate.kinds.verdict import Policy
from cachix_cache import trusted_keys
from cachix_connection import Peer, Waits
from cachix_console import choice, positive, read_token, tell, write_secret
from cachix_protocol import UsageError, __version__, is_agent_name
from cachix_signed import SecretKey, Signer, deployment_keys

KEYS_VARIABLE = "CACHIX_AGENT_TRUSTED_KEYS"  # public keys, separated by blanks
DEPLOYMENT_KEYS_VARIABLE = "CACHIX_AGENT_DEPLOYMENT_KEYS"
MAX_RETURNS = 20  # as many deployments that have ended are kept
COMMANDS = ("agent", "activate", "key")
USAGE = """\
Cachix Deploy, open and self-hostable: the agent of a machine, and the command that CI deploys with.

Usage:
  cachix-deploy [options] [deploy] agent [NAME] [PROFILE] [--bootstrap] [--if-stopped]
                [--trusted-key=KEY]... [--deployment-key=KEY]...
  cachix-deploy [options] [deploy] activate SPEC [--agent=NAME]... [--async] [--wait]
                [--timeout=SECONDS]
  cachix-deploy [options] key create NAME FILE
  cachix-deploy --help
  cachix-deploy --version

Commands:
  agent     Stay connected to the workspace, and run what it deploys to this machine.
            NAME defaults to the host name, PROFILE to the profile of the deployed kind.
  activate  Deploy the store paths of SPEC (a deploy.json) to their agents, show their logs, and
            wait until all have ended.
  key create  Write a new key that signs deployments into FILE, which only you can read, and print
            its public key, NAME:KEY.

Options:
  --host=URL                    The workspace [default: https://cachix.org].
  --hostname=URL                The same, as older releases of Cachix's client call it.
  -c --config=FILE              Cachix's own configuration: accepted, and not read.
  --require-tls                 Refuse a workspace that is plain http on another machine
                                (CACHIX_DEPLOY_REQUIRE_TLS=1).
  --token-file=FILE             Read the token from FILE instead of the environment
                                (CACHIX_AGENT_TOKEN; CACHIX_ACTIVATE_TOKEN for activate).
  --trusted-key=KEY             Take the workspace's systems only with a signature by this key
                                (NAME:KEY), whatever key it names itself; may be repeated
                                (CACHIX_AGENT_TRUSTED_KEYS, separated by blanks).
  --deployment-key=KEY          Run only deployments that this key (NAME:KEY) has signed; may be
                                repeated (CACHIX_AGENT_DEPLOYMENT_KEYS, separated by blanks).
  --unsigned-rollback=N         Without a signature, return at most to one of the last N paths
                                that this agent has confirmed [default: 1].
  --signing-key=FILE            Sign what `activate` deploys by the key in FILE.
  --expires=SECONDS             How long the signature is valid; by default it never expires.
  --allow-downgrade             Sign also for machines that run what was signed later.
  --confirm-timeout=SECONDS     Time for a new system to reach the workspace [default: 120].
  --activation-timeout=SECONDS  Time for an activation, or a rollback script [default: 3600].
  --on-unit-failure=POLICY      rollback or tolerate: if units failed [default: rollback].
  --on-reboot-needed=POLICY     fail or boot: if only a reboot can help [default: fail].
  --bootstrap                   Deploy once to a machine whose own agent takes over, then exit.
  --if-stopped                  Exit with 0 if an agent of this name is running (for cron).
  -a --agent=NAME               Deploy to this agent of SPEC only; may be repeated.
  --async                       Start the deployments, and do not wait for them.
  --wait                        Wait as long as the workspace is frozen, instead of failing.
  --timeout=SECONDS             Give up waiting after this time; the deployments go on.
  -v --verbose                  Print debugging messages, and tracebacks of errors.
  -h --help                     Show this text.
  --version                     Show the version.

Exit status: 0 done; 1 failed (any rollback is a failure); 64 wrong usage;
69 workspace out of reach; 75 already running; 77 token refused.
"""


@dataclass(frozen=True)
class AgentOptions:
    """An agent's command line, checked."""

    peer: Peer
    profile: Optional[str]
    bootstrap: bool
    if_stopped: bool
    policy: Policy
    waits: Waits
    trusted_keys: tuple[str, ...] = ()
    deployment_keys: dict[str, bytes] = field(default_factory=dict)
    unsigned_rollback: int = 1

    @property
    def name(self) -> str:
        """The agent's name."""
        return str(self.peer.name)


def explain(words: list[str]) -> str:
    """Why a command line fits none of the forms. Arguments are not shown: they may be a token."""
    command = next((word for word in words if word in COMMANDS), None)
    if command is None:
        return "missing command: agent or activate"
    if command == "key":
        return "a key is made by `cachix-deploy key create NAME FILE`"
    if command == "activate" and words[-1] == command:
        return "activate needs a deploy.json"
    return f"unexpected arguments for {command}"


def parse(argv: list[str]) -> dict[str, Any]:
    """The command line as a dictionary. Raises UsageError, or SystemExit for --help."""
    return cachix_console.parse(argv, USAGE, f"cachix-deploy {__version__}", explain)


def host_of(options: dict[str, Any]) -> str:
    """The URL of the workspace, by either name of the option. Raises UsageError."""
    if options["--config"]:
        tell(f"{options['--config']} is not read: tokens come from the environment or --token-file")
    host = Peer.create(str(options["--hostname"] or options["--host"]), token="").host
    cachix_plain.check(host, options["--require-tls"])
    return host


def number(options: dict[str, Any], option: str, most: int) -> int:
    """The value of an option, from 0 to `most`. Raises UsageError."""
    text = str(options[option])
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) > most:
        raise UsageError(f"{option} must be a number from 0 to {most}, not {text[:40]!r}")
    return int(text)


def create_key(options: dict[str, Any]) -> int:
    """Write a new key and print its public key; the exit status. Raises Error."""
    key, path = SecretKey.create(options["NAME"]), options["FILE"]
    write_secret(key.text(), path)
    tell(f"the secret key is in {path}; agents get the public key as --deployment-key:")
    cachix_console.Screen().print(key.public_text())
    return 0


def signer(options: dict[str, Any]) -> Optional[Signer]:
    """How `activate` signs; None if it does not. Raises UsageError."""
    path = options["--signing-key"]
    if path is None:
        given = [name for name in ("--expires", "--allow-downgrade") if options[name]]
        if given:
            raise UsageError(f"{given[0]} says something of a signature: give --signing-key=FILE")
        return None
    seconds = math.ceil(positive(options, "--expires", "seconds")) if options["--expires"] else None
    return Signer(SecretKey.read(path), seconds, options["--allow-downgrade"])


def agent_options(options: dict[str, Any]) -> AgentOptions:
    """An agent's command line. Raises UsageError."""
    name = options["NAME"] or socket.gethostname().partition(".")[0]
    for argument, value in (("NAME", name), ("PROFILE", options["PROFILE"] or name)):
        if not is_agent_name(value):
            allowed = "letters, digits, `-`, `_` and `.`, at most 128 of them"
            raise UsageError(f"{argument} {value!r} is not usable: {allowed}")
    token = read_token("CACHIX_AGENT_TOKEN", options["--token-file"])
    waits = Waits.from_environment()
    policy = Policy(
        confirm_timeout=positive(options, "--confirm-timeout", "seconds"),
        activation_timeout=positive(options, "--activation-timeout", "seconds"),
        on_unit_failure=choice(options, "--on-unit-failure", ("rollback", "tolerate")),
        on_reboot_needed=choice(options, "--on-reboot-needed", ("fail", "boot")),
        unit_recheck=waits.unit_recheck,
        retry=waits.retry,
    )
    return AgentOptions(
        peer=Peer.create(host_of(options), token, name),
        profile=options["PROFILE"],
        bootstrap=options["--bootstrap"],
        if_stopped=options["--if-stopped"],
        policy=policy,
        waits=waits,
        trusted_keys=trusted_keys(options["--trusted-key"], os.environ.get(KEYS_VARIABLE)),
        deployment_keys=deployment_keys(
            options["--deployment-key"], os.environ.get(DEPLOYMENT_KEYS_VARIABLE)
        ),
        unsigned_rollback=number(options, "--unsigned-rollback", MAX_RETURNS),
    )
