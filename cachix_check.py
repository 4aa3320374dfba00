"""The command `check`: the needs of a deployment, each with its remedy."""

from __future__ import annotations

import base64
import contextlib
import email.utils
import json
import os
import shutil
import time
from collections.abc import Iterator
from typing import Any, Callable, Optional

import cachix_cache
from activate import environment, journal, kinds, nix
from activate.agent import failure, linger, local, mark, present, single
from activate.kinds import boot
from activate.process import CommandFailed, ask
from activate.text import clean, format_size, one_line
from activate.values import dataclass
from cachix_connection import Peer, Waits, http, reach
from cachix_console import Screen, read_token
from cachix_options import host_of
from cachix_protocol import Cache, Error, Refused, Undecodable, UsageError
from cachix_secret import OwnToken

GOOD, WARNING, PROBLEM = "ok", "warning", "problem"
SIGNS = {GOOD: "ok     ", WARNING: "warning", PROBLEM: "PROBLEM"}
LEAST_STORE, LEAST_BOOT = 2 << 30, 64 << 20  # bytes that should be free
MOST_SKEW = 60.0  # seconds between our clock and that of the workspace
TIMEOUT = 10.0  # seconds for each question to the network
ABSENT_HASH = "0" * 32
ABSENT = (
    f"{nix.STORE}/{ABSENT_HASH}-cachix-deploy-check"  # asked for only to see whether Nix answers
)
# An activation inherits these settings of the agent's unit; these values confine nothing.
CONFINING = {
    "ProtectSystem": ("no",),
    "ProtectHome": ("no",),
    "PrivateTmp": ("no",),
    "PrivateDevices": ("no",),
    "PrivateMounts": ("no",),
    "NoNewPrivileges": ("no",),
    "ProtectKernelModules": ("no",),
    "RestrictSUIDSGID": ("no",),
    "DynamicUser": ("no",),
}


@dataclass(frozen=True)
class Line:
    """A thing that was looked at, and the remedy if it is not as it must be."""

    name: str
    state: str
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Facts:
    """The subject of the checks: command line, state directory and agent."""

    options: dict[str, Any]
    state: str
    name: str
    host: str
    note: dict[str, Any]  # the mark of the agent


def judged(name: str, good: bool, text: str, remedy: str, bad: str = PROBLEM) -> Line:
    """A line with a remedy only if it is needed."""
    return Line(name, GOOD, text) if good else Line(name, bad, text, remedy)


# --- this machine ---------------------------------------------------------------------------------


def check_nix(facts: Facts) -> Iterator[Line]:
    """Nix, the store, and whether the daemon trusts this user."""
    remedy = "install Nix, or put its directory into PATH"
    try:
        version = ask(["nix-store", "--version"], TIMEOUT)[1].strip()
        messages = ask(["nix-store", "--check-validity", ABSENT], TIMEOUT)[2]
    except CommandFailed as error:
        yield Line("nix", PROBLEM, str(error), remedy)
        return
    yield judged("nix", bool(version), version or "nix-store does not say its version", remedy)
    trouble = failure.classify(messages)
    fails = trouble in ("daemon", "permission", "read-only")
    hint = "start nix-daemon, and let this user use it (`allowed-users` in nix.conf)"
    text = one_line(messages) if fails else f"{nix.STORE} answers"
    yield judged("store", not fails, text, hint)
    user, trusted = environment.user(), is_trusted()
    text = f"user {user} is {'' if trusted else 'not '}trusted"
    hint = f"the cache's key and token are ignored: add {user} to trusted-users in nix.conf"
    yield judged("trust", trusted, text, hint)


def is_trusted() -> bool:
    """Whether Nix takes keys and caches from this user."""
    if nix.may_forbid_substitution():
        return True
    import grp

    words = nix.show_config().get("trusted-users", "root").split()
    groups = []
    for number in (os.getegid(), *os.getgroups()):
        with contextlib.suppress(KeyError):
            groups.append(f"@{grp.getgrgid(number).gr_name}")
    return bool({"*", environment.user(), *groups} & set(words))


def check_directories(facts: Facts) -> Iterator[Line]:
    """State and profile can be written."""
    parent = facts.state
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent)
    yield judged("state", os.access(parent, os.W_OK), facts.state, "run this as the agent's user")
    match = present.detect(facts.options["PROFILE"])
    if match is None:
        yield Line("profile", WARNING, "there is none yet that this user may change", "")
    else:
        yield Line("profile", GOOD, f"{match[1]} ({match[0].NAME})")


def check_space(facts: Facts) -> Iterator[Line]:
    """Room for closures, and for kernels."""
    free, inodes = failure.space()
    text = f"{format_size(free)} and {inodes} inodes are free in {nix.STORE}"
    hint = "collect garbage: nix-collect-garbage --delete-older-than 30d"
    yield judged("space", free >= LEAST_STORE and inodes > 10000, text, hint, WARNING)
    for place in present.BOOT_DIRECTORIES:
        if os.path.ismount(place):
            left = shutil.disk_usage(place).free
            hint = "remove old generations, then run `switch-to-configuration boot`"
            text = f"{format_size(left)} are free in {place}"
            yield judged("boot", left >= LEAST_BOOT, text, hint, WARNING)


def check_agent(facts: Facts) -> Iterator[Line]:
    """The agent runs, and is started by a boot."""
    owner = single.owner(facts.state, facts.name)
    runs = owner is not None and not owner.is_gone
    text = (
        f"{facts.name} runs (pid {owner.pid})" if owner and runs else f"{facts.name} does not run"
    )
    yield judged("agent", runs, text, "start it: systemctl start cachix-deploy", WARNING)
    for kind in kinds.KINDS:
        system = kind.running_path(kind.profile_path(None))
        if kind.NAME in boot.UNITS and system is not None and os.path.lexists(system):
            words = boot.warning(kind.NAME, system)
            hint = "enable the module `services.cachix-deploy`, and deploy that"
            yield judged(
                "reboot", not words, words or "an agent is started by a boot", hint, WARNING
            )
            break
    if owner is not None and runs and owner.pid.isdigit():
        yield from check_unit(int(owner.pid))
    if os.geteuid() != 0 and os.path.isdir("/run/systemd/system"):
        user = environment.user()
        lingers = os.path.exists(os.path.join(linger.LINGERING, user))
        text = "units of this user run without a login" if lingers else "its units end at log-out"
        yield judged("linger", lingers, text, f"loginctl enable-linger {user}", WARNING)


def check_unit(pid: int) -> Iterator[Line]:
    """The unit of an agent: what confines it confines its activations."""
    unit = unit_of(pid)
    if not unit or not os.path.isdir("/run/systemd/system"):
        return
    with contextlib.suppress(CommandFailed):
        names = ",".join(CONFINING)
        lines = ask(["systemctl", "show", unit, f"--property={names}"], 5)[1].splitlines()
        pairs = [line.partition("=")[::2] for line in lines]
        bad = [f"{k}={v}" for k, v in pairs if k in CONFINING and v not in ("", *CONFINING[k])]
        hint = f"remove these settings from {unit}: each activation inherits them"
        yield judged("unit", not bad, f"{unit}: {', '.join(bad) or 'not confined'}", hint)


def unit_of(pid: int) -> str:
    """The systemd unit that a process runs in; empty if there is none."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cgroup", encoding="ascii") as file:
        names = [name for name in file.read().split("/") if name.strip().endswith(".service")]
        return names[-1].strip() if names else ""
    return ""


# --- the workspace --------------------------------------------------------------------------------


def check_workspace(facts: Facts) -> Iterator[Line]:
    """The token, the way to the workspace, its clock, and its cache."""
    try:
        token = read_token("CACHIX_AGENT_TOKEN", facts.options["--token-file"])
    except UsageError as error:
        if is_connected(facts):  # its token is its own, as that of a unit's credentials
            text = f"the agent has one, and is connected to {facts.host}"
            yield Line("token", GOOD, text)
            peer = Peer.create(facts.host, "", facts.name)
            yield from check_clock(peer)
            yield from check_cache(facts, peer)
        else:
            hint = "name the agent's --token-file, or make one: cachix-workspace token create agent"
            yield Line("token", PROBLEM, str(error), hint)
        return
    peer = Peer.create(facts.host, token, facts.name)
    OwnToken(facts.state, peer, False, lambda message: None)
    yield Line("token", GOOD, "there is one")
    start = time.monotonic()
    try:
        reach(peer, Waits.from_environment().connect)
    except Refused as error:
        yield Line("workspace", PROBLEM, str(error), "give this machine a valid token")
        return
    except Error as error:
        remedy = "look at name server, firewall and proxy; `curl -v` shows more"
        yield Line("workspace", PROBLEM, str(error), remedy)
        return
    took = f"{(time.monotonic() - start) * 1000:.0f} ms"
    yield Line("workspace", GOOD, f"{peer.host} takes the token and websockets ({took})")
    yield from check_clock(peer)
    yield from check_cache(facts, peer)


def is_connected(facts: Facts) -> bool:
    """Whether the agent runs, and says that it is connected."""
    owner = single.owner(facts.state, facts.name)
    is_its_own = owner is not None and owner.pid == str(facts.note.get("pid"))
    return is_its_own and "lost" not in facts.note


def check_clock(peer: Peer) -> Iterator[Line]:
    """Signatures of orders expire by this machine's clock, and so do certificates."""
    with contextlib.suppress(Error, ValueError, TypeError):
        date = http(peer, "GET", "/", TIMEOUT).headers["Date"]
        skew = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
        text = f"{abs(skew):.0f} s {'before' if skew > 0 else 'behind'} the workspace's"
        yield judged("clock", abs(skew) <= MOST_SKEW, text, "start a time service", WARNING)


def check_cache(facts: Facts, peer: Peer) -> Iterator[Line]:
    """The cache of the last registration: usable, there, and its key accepted."""
    if facts.note.get("cache") is None:
        yield Line("cache", WARNING, "not known before the agent has connected", "start it")
        return
    try:
        offer = cachix_cache.offer(peer.host, Cache.from_json(facts.note["cache"]))
    except (Error, Undecodable) as error:
        yield Line("cache", PROBLEM, str(error), "set --public-url of the workspace")
        return
    yield look_into(peer, offer)
    pinned = cachix_cache.trusted_keys(
        facts.options["--trusted-key"], os.environ.get("CACHIX_AGENT_TRUSTED_KEYS")
    )
    accepted = not pinned or bool(set(pinned) & set(offer.keys))
    text = " ".join(offer.keys)
    hint = "none of the --trusted-key is the cache's: nothing that it serves will run"
    yield judged("key", accepted, text, hint)


def look_into(peer: Peer, offer: cachix_cache.Offer) -> Line:
    """Whether a cache can be read, by the credentials that a download would have."""
    hint = "look at name server, firewall and the cache's server"
    if offer.is_public or not offer.is_near:
        command = ["nix", "store", "ping", "--store", offer.url, *nix.EXPERIMENTAL]
        messages = one_line(ask(command, 3 * TIMEOUT)[2])
        note = "" if offer.is_public else ", private: the machine's netrc-file must name it"
        is_bad = "error:" in messages
        return judged("cache", not is_bad, messages if is_bad else offer.url + note, hint)
    if not peer.token:
        text = f"{offer.url} is private, and the agent's token is not known here"
        return Line("cache", WARNING, text, "run this with the agent's --token-file")
    # as Nix sends it; to Nix itself 403 means that a path is missing
    password = base64.b64encode(f":{peer.token}".encode()).decode()
    headers = {"Authorization": f"Basic {password}"}
    try:
        place = Peer(offer.url, peer.token)
        answer = http(place, "GET", f"/{ABSENT_HASH}.narinfo", TIMEOUT, headers=headers)
    except Error as error:
        return Line("cache", PROBLEM, str(error), hint)
    if answer.status in (401, 403):
        text = f"{offer.url} refuses the agent's token (HTTP {answer.status})"
        return Line("cache", PROBLEM, text, "give the agent a token for this cache")
    is_read = answer.status in (200, 404)
    text = f"{offer.url} is private, and takes the agent's token"
    return judged("cache", is_read, text if is_read else f"HTTP {answer.status}", hint)


# --- command --------------------------------------------------------------------------------------

CHECKS: tuple[Callable[[Facts], Iterator[Line]], ...] = (
    check_nix,
    check_directories,
    check_space,
    check_agent,
    check_workspace,
)


def look(facts: Facts) -> Iterator[Line]:
    """All checks, one after another. One that fails by itself is a problem, too."""
    for check in CHECKS:
        try:
            yield from check(facts)
        except UsageError:
            raise
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            yield Line(check.__name__[len("check_") :], PROBLEM, text, "")


def check_command(options: dict[str, Any]) -> int:
    """Print what was looked at; the exit status is 1 if there is a problem. Raises UsageError."""
    import socket

    environment.leave_others()
    screen, lines = Screen(), []
    state = journal.state_directory()
    name = local.agent_of(state, [], socket.gethostname().partition(".")[0])
    note = mark.load(os.path.join(state, f"registered-{name}.json"))
    known: Optional[str] = note.get("host") if options["--host"] is None else None
    host = known or host_of(options)
    for line in look(Facts(options, state, name, str(host), note)):
        lines.append(line)
        if not options["--json"]:
            screen.print(f"{SIGNS[line.state]}  {line.name:<10} {clean(line.text)}")
            if line.remedy:
                screen.print(f"         {'':<10} -> {line.remedy}")
    if options["--json"]:
        screen.print(json.dumps([vars(line) for line in lines]))
    return 1 if any(line.state == PROBLEM for line in lines) else 0
