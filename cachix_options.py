"""The command line of the agent and of `activate`: its usage, and its values, checked."""

from __future__ import annotations

import math
import os
import re
import socket
from typing import Any, Optional

import cachix_console
import cachix_plain
from activate import process, window
from activate.kinds.verdict import Policy
from activate.values import dataclass, field
from cachix_cache import trusted_keys
from cachix_connection import Peer, Waits
from cachix_console import choice, positive, read_token, tell, write_secret
from cachix_protocol import UsageError, __version__, checked_url, is_agent_name
from cachix_signed import SecretKey, Signer, deployment_keys

HOSTED = "https://cachix.org"
HOST_VARIABLE = "CACHIX_HOST"
KEYS_VARIABLE = "CACHIX_AGENT_TRUSTED_KEYS"  # public keys, separated by blanks
DEPLOYMENT_KEYS_VARIABLE = "CACHIX_AGENT_DEPLOYMENT_KEYS"
MAX_RETURNS = 20  # as many deployments that have ended are kept
COMMANDS = (
    "agent",
    "activate",
    "push",
    "key",
    "status",
    "check",
    "doctor",
    "rollback",
    "activate-local",
)
NEEDS = {"activate": "deploy.json", "push": "path", "activate-local": "store path"}
USAGE = """\
Cachix Deploy, open and self-hostable: the agent of a machine, and the command that CI deploys with.

Usage:
  cachix-deploy [options] [deploy] agent [NAME] [PROFILE] [--bootstrap] [--if-stopped]
                [--trusted-key=KEY]... [--deployment-key=KEY]... [--reboot-window=TIMES]
                [--post-deploy=PATH] [--metrics-file=PATH]
  cachix-deploy [options] [deploy] activate SPEC... [--agent=NAME]... [--on=LIST]
                [--canary=LIST] [--batch=SIZE] [--max-failures=N] [--pause=SECONDS] [--force]
                [--rollback-succeeded] [--offline=WORD] [--unknown=WORD] [--message=TEXT] [--json]
                [--async] [--wait] [--timeout=SECONDS] [--push] [--upstream=URL]...
  cachix-deploy [options] [deploy] push PATH... [--upstream=URL]...
  cachix-deploy [options] [deploy] status [--json]
  cachix-deploy [options] [deploy] (check | doctor) [--json] [--trusted-key=KEY]...
  cachix-deploy [options] [deploy] rollback [PROFILE] [--to=TARGET] [--cancel]
  cachix-deploy [options] [deploy] activate-local SPEC [PROFILE] [--agent=NAME]
                [--substituter=URL] [--trusted-key=KEY]...
  cachix-deploy [options] key create NAME FILE
  cachix-deploy --help
  cachix-deploy --version

Commands:
  agent     Stay connected to the workspace, and run what it deploys to this machine.
            NAME defaults to the host name, PROFILE to the profile of the deployed kind.
  activate  Deploy the store paths of SPEC (a deploy.json, or NAME=/nix/store/... for each agent)
            to their agents, show their logs, and wait until all have ended.
  push      Upload the closure of each PATH (or what a deploy.json names) to the workspace's cache,
            signed by the cache's key, but for the parts that an upstream cache has.
  status    Show the agents of this machine, what it runs, and its last deployments.
  check     Look at all that a deployment needs, and name a remedy for what is not as it
            must be (also called doctor).
  rollback  Return this machine to the path that was confirmed before the present one. The way back
            goes on when the terminal is lost.
  activate-local  Run a path on this machine, without a workspace, as a deployment would: checked,
            and rolled back if it fails. SPEC is /nix/store/..., a link to it, or a deploy.json.
  key create  Write a new key that signs deployments into FILE, which only you can read, and print
            its public key, NAME:KEY.

Options:
  --host=URL                    The workspace (CACHIX_HOST), by default https://cachix.org.
  --hostname=URL                The same, as older releases of Cachix's client call it.
  -c --config=FILE              Cachix's own configuration: accepted, and not read.
  --require-tls                 Refuse a workspace that is plain http on another machine
                                (CACHIX_DEPLOY_REQUIRE_TLS=1).
  --token-file=FILE             Read the token from FILE instead of the environment
                                (CACHIX_AGENT_TOKEN; CACHIX_ACTIVATE_TOKEN for activate and push).
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
  --reboot-window=TIMES         Times in which a deployment that asks for it may reboot the machine,
                                by its clock, such as "Mon..Fri 02:00-04:00".
  --post-deploy=PATH            Run this program once after each deployment has ended, however it
                                has ended: docs/agent.rst has its environment.
  --metrics-file=PATH           Keep metrics in this file (NAME.prom), for node_exporter's
                                textfile collector.
  --bootstrap                   Deploy once to a machine whose own agent takes over, then exit.
  --if-stopped                  Exit with 0 if an agent of this name is running (for cron).
  -a --agent=NAME               Deploy to this agent of SPEC only; may be repeated.
  --on=LIST                     Deploy to the agents of SPEC that a LIST of names, globs and labels
                                selects (labels in a workspace of yours), with commas between.
  --canary=LIST                 Deploy to these agents first, and go on only if they succeed.
  --batch=SIZE                  Deploy to SIZE agents at a time (a number, or a share such as 10%),
                                to the next ones when all of these have succeeded.
  --max-failures=N              Go on until more than N agents have failed [default: 0].
  --pause=SECONDS               Time between two batches [default: 0].
  --force                       In batches, deploy also to agents that run their path already.
  --rollback-succeeded          Where a roll-out stops, take back those that had succeeded.
  --offline=WORD                wait for agents that are offline, skip them (they deploy later), or
                                fail before anything is deployed [default: wait].
  --unknown=WORD                fail, or skip agents that the workspace does not know
                                [default: fail].
  --message=TEXT                The title of this run in a workspace of yours, in place of the
                                commit's.
  --json                        Print JSON: of activate an object a line (docs/activate-json.rst),
                                else one object.
  --to=TARGET                   Roll back to this store path, or to what the deployment of this
                                number ran.
  --cancel                      Cancel a deployment that is under way instead of refusing.
  --substituter=URL             Download also from this cache.
  --push                        Push what SPEC names before it is deployed.
  --cache=NAME                  Push to this cache; by default to the one that agents use.
  --cache-key=FILE              Sign what is pushed by the key in FILE instead of the environment
                                (CACHIX_SIGNING_KEY, with or without `NAME:`).
  --upstream=URL                Do not push what this cache has; may be repeated, `none` for no
                                cache at all [default: https://cache.nixos.org].
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
    post_deploy: Optional[str] = None
    metrics_file: Optional[str] = None

    @property
    def name(self) -> str:
        """The agent's name."""
        return str(self.peer.name)


@dataclass(frozen=True)
class PushOptions:
    """How to push: to which cache, by the key in which file, and what is left to upstreams."""

    cache: Optional[str] = None
    key_file: Optional[str] = None
    upstreams: tuple[str, ...] = ()


def push_options(options: dict[str, Any]) -> PushOptions:
    """The options of a push. Raises UsageError."""
    example = "https://cache.nixos.org"
    given = [url for url in dict.fromkeys(options["--upstream"]) if url != "none"]
    upstreams = tuple(checked_url(url, "--upstream", example) for url in given)
    return PushOptions(options["--cache"], options["--cache-key"], upstreams)


def explain(words: list[str]) -> str:
    """Why a command line fits none of the forms. Arguments are not shown: they may be a token."""
    command = next((word for word in words if word in COMMANDS), None)
    if command is None:
        return "missing command: agent or activate"
    if command == "key":
        return "a key is made by `cachix-deploy key create NAME FILE`"
    if command in NEEDS and words[-1] == command:
        return f"{command} needs a {NEEDS[command]}"
    return f"unexpected arguments for {command}"


def parse(argv: list[str]) -> dict[str, Any]:
    """The command line as a dictionary. Raises UsageError, or SystemExit for --help."""
    return cachix_console.parse(argv, USAGE, f"cachix-deploy {__version__}", explain)


def host_of(options: dict[str, Any]) -> str:
    """The URL of the workspace, by either name of the option. Raises UsageError."""
    if options["--config"]:
        tell(f"{options['--config']} is not read: tokens come from the environment or --token-file")
    named = options["--hostname"] or options["--host"]
    given = (os.environ.get(HOST_VARIABLE) or HOSTED) if named is None else str(named)
    host = Peer.create(given, token="").host
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


def policy_of(options: dict[str, Any], waits: Waits) -> Policy:
    """The decisions of an operator on how to deploy. Raises UsageError."""
    return Policy(
        confirm_timeout=positive(options, "--confirm-timeout", "seconds"),
        activation_timeout=positive(options, "--activation-timeout", "seconds"),
        on_unit_failure=choice(options, "--on-unit-failure", ("rollback", "tolerate")),
        on_reboot_needed=choice(options, "--on-reboot-needed", ("fail", "boot")),
        unit_recheck=waits.unit_recheck,
        retry=waits.retry,
        reboot_window=reboot_window(options["--reboot-window"]),
    )


def reboot_window(text: Optional[str]) -> str:
    """The --reboot-window; empty without one. Raises UsageError."""
    try:
        if text is not None:
            window.parse(text)
    except process.Error as error:
        raise UsageError(f"--reboot-window: {error}") from None
    return text or ""


def absolute(options: dict[str, Any], option: str) -> Optional[str]:
    """The path in an option, which must be absolute: the agent runs in `/`. Raises UsageError."""
    path = options[option]
    if path is not None and not str(path).startswith("/"):
        raise UsageError(f"{option} must be an absolute path, not {path[:100]!r}")
    return None if path is None else str(path)


def agent_options(options: dict[str, Any]) -> AgentOptions:
    """An agent's command line. Raises UsageError."""
    name = options["NAME"] or socket.gethostname().partition(".")[0]
    for argument, value in (("NAME", name), ("PROFILE", options["PROFILE"] or name)):
        if not is_agent_name(value):
            allowed = "letters, digits, `-`, `_` and `.`, at most 128 of them"
            raise UsageError(f"{argument} {value!r} is not usable: {allowed}")
    token = read_token("CACHIX_AGENT_TOKEN", options["--token-file"])
    waits = Waits.from_environment()
    return AgentOptions(
        peer=Peer.create(host_of(options), token, name),
        profile=options["PROFILE"],
        bootstrap=options["--bootstrap"],
        if_stopped=options["--if-stopped"],
        policy=policy_of(options, waits),
        waits=waits,
        trusted_keys=trusted_keys(options["--trusted-key"], os.environ.get(KEYS_VARIABLE)),
        deployment_keys=deployment_keys(
            options["--deployment-key"], os.environ.get(DEPLOYMENT_KEYS_VARIABLE)
        ),
        unsigned_rollback=number(options, "--unsigned-rollback", MAX_RETURNS),
        post_deploy=absolute(options, "--post-deploy"),
        metrics_file=absolute(options, "--metrics-file"),
    )
