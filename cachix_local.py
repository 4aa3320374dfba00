"""`rollback` and `activate-local`: what an operator does at the machine, without a workspace.

This command only orders, and follows: cachix_leader.py does it, in a process of its own.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from typing import Any, Optional

import cachix_leader
import cachix_program
from activate import environment, files, holder, journal, logfile, pipe, process, startup
from activate.agent import launch, local
from activate.text import printable
from cachix_cache import trusted_keys
from cachix_connection import Peer, Waits
from cachix_console import Screen, read_token, tell
from cachix_options import host_of, policy_of
from cachix_protocol import (
    PLAIN,
    Error,
    UsageError,
    checked_url,
    is_agent_name,
    is_store_path,
    nix_system,
)
from cachix_secret import OwnToken
from cachix_spec import decode_spec

TOKEN = "CACHIX_AGENT_TOKEN"
POLL = 0.1  # seconds between two looks at the log
LEADERS = 4  # at most so many processes lead one after another
READ_BYTES = 1 << 20


# --- orders ---------------------------------------------------------------------------------------


def rollback_command(options: dict[str, Any]) -> int:
    """Roll this machine back; the exit status. Raises Error.

    Its units may fail as in any rollback: to stay where the machine is would not be better.
    """
    order, waits = order_of(options, journal.ROLLBACK)
    to = options["--to"]
    if to is not None and not str(to).isdigit():
        order["path"] = store_path_of(str(to), "--to")
    elif to is not None:
        order["path"] = str(to)
    policy = policy_of(options, waits).changes()
    order["policy"] = {**policy, "on_unit_failure": "tolerate", "on_reboot_needed": "boot"}
    order["cancel"] = options["--cancel"]
    return Front(order, waits).run()


def activate_command(options: dict[str, Any]) -> int:
    """Run a path on this machine; the exit status. Raises Error.

    With a token the new system must reach the workspace, as in a deployment.
    """
    order, waits = order_of(options, journal.ACTIVATION)
    names = [*options["--agent"], order["name"]]
    order.update(content_of(options["SPEC"][0], names))
    order["substituter"] = substituter(options["--substituter"])
    order["keys"] = trusted_keys(options["--trusted-key"], None)
    if order["keys"] and order["substituter"] is None:
        raise UsageError("--trusted-key is for a --substituter=URL, which is missing")
    if options["--token-file"] or os.environ.get(TOKEN):
        peer = Peer.create(host_of(options), read_token(TOKEN, options["--token-file"]))
        peer.name = order["name"]
        OwnToken(order["state"], peer, False, tell)
        order.update(host=peer.host, token=peer.token)
    return Front(order, waits).run()


def order_of(options: dict[str, Any], do: str) -> tuple[dict[str, Any], Waits]:
    """The parts that any order has. Raises UsageError."""
    startup.protect(writes=False)
    environment.leave_others()
    if options["PROFILE"] is not None and not is_agent_name(options["PROFILE"]):
        raise UsageError(f"PROFILE {options['PROFILE']!r} is not usable: see --help")
    try:
        state = journal.state_directory()
        name = local.agent_of(state, own_records(state), socket.gethostname().partition(".")[0])
    except environment.NoHome as error:
        raise UsageError(str(error)) from None
    waits = Waits.from_environment()
    order = {
        **{"do": do, "state": state, "name": name, "profile": options["PROFILE"]},
        **PLAIN.to_json(whole=True),
        **{"path": None, "script": None, "cancel": False, "host": "", "token": ""},
        **{"substituter": None, "keys": [], "policy": policy_of(options, waits).changes()},
    }
    return order, waits


def own_records(state: str) -> list[journal.Record]:
    """The deployments in a state directory, the newest first. Raises Error if they are hidden."""
    from activate import history

    directory = os.path.join(state, "deployments")
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        files.make_private(state)
    except OSError as error:
        raise Error(f"{directory} can't be written ({error.strerror}): try as root") from None
    return [entry.record for entry in reversed(history.load_all(state)[0])]


def store_path_of(text: str, name: str) -> str:
    """The store path that an argument is, or links to. Raises UsageError."""
    path = text if is_store_path(text) else os.path.realpath(text)
    if not is_store_path(path):
        raise UsageError(f"{name} must be /nix/store/..., or a link to such a path, not {text!r}")
    return path


def content_of(spec: str, names: list[str]) -> dict[str, Any]:
    """What SPEC orders: path, rollback script, operation and reboot. Raises Error.

    A deploy.json is a file with one path for each agent: the first of `names` that it has counts.
    """
    if spec.endswith(".json") or is_object(spec):
        try:
            with open(spec, "rb") as file:
                content = decode_spec(file.read(), spec)
        except OSError as error:
            raise Error(f"{spec} can't be read: {error.strerror or error}") from None
        name = next((name for name in names if name in content.agents), None)
        if name is None:
            known = ", ".join(sorted(content.agents)[:20])
            raise UsageError(f"{spec} has no agent {names[0]}: give --agent=NAME, one of {known}")
        script = content.rollback_scripts.get(nix_system())
        wish = content.wishes.get(name, PLAIN)
        return {"path": content.agents[name], "script": script, **wish.to_json(whole=True)}
    return {"path": store_path_of(spec, "SPEC")}


def is_object(path: str) -> bool:
    """Whether a file holds an object in JSON, by its beginning: any file may be a store path."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(1000).lstrip().startswith(b"{")
    return False


def substituter(url: Optional[str]) -> Optional[str]:
    """The --substituter, which may also be a directory: file:///... Raises UsageError."""
    if url is None or (url.startswith("file:///") and url.isprintable() and " " not in url):
        return url
    return checked_url(url, "--substituter", "https://cache.example.org")


# --- following ------------------------------------------------------------------------------------


class Front:
    """The command in the foreground. It may end at any time: the leader goes on."""

    def __init__(self, order: dict[str, Any], waits: Waits) -> None:
        self.order, self.waits, self.screen = order, waits, Screen()
        self.directory = ""  # of the deployment, once there is one
        self.offset, self.rest = 0, b""
        self.end: Optional[str] = None

    def run(self) -> int:
        """Have the order executed, and follow it; the exit status. Raises Error."""
        try:
            for _ in range(LEADERS):
                self.follow(start(self.order, self.waits))
                if self.end is None and self.directory:
                    self.follow_orphan()
                if self.end is not None or not self.directory:
                    break
                self.order = {**self.order, "do": cachix_leader.SETTLE, "directory": self.directory}
        except KeyboardInterrupt:
            tell("this goes on: `cachix-deploy status` shows how it ends")
            raise
        if self.end is None:
            raise Error("the process that was started for this has ended, nothing is known of it")
        return self.conclude(*cachix_leader.status_and_words(self.end))

    def conclude(self, status: int, words: str) -> int:
        """Print how it ended; the exit status. Raises Error with that status if it failed."""
        if status:
            error = Error(words)
            error.status = status
            raise error
        self.screen.print(words)
        return 0

    def follow(self, leader: pipe.AgentEnd) -> None:
        """Show messages and log until the leader has ended."""
        while not leader.at_end and self.end is None:
            message = leader.listen(POLL)
            if isinstance(message, pipe.Entered):
                self.take(message.step, message.reason)
            if self.directory:
                self.show()
        self.show(final=True)

    def take(self, word: str, text: str) -> None:
        """Take a message of the leader."""
        if word == cachix_leader.SAY:
            tell(text)
        elif word == cachix_leader.ENTRY:
            self.directory = text
        elif word == cachix_leader.END:
            self.end = text

    def follow_orphan(self) -> None:
        """Follow a deployment whose leader was killed, as long as anybody leads it."""
        entry = journal.load(self.directory)
        while entry is not None and holder.is_led(entry):
            self.show()
            time.sleep(POLL)
        entry = journal.load(self.directory)
        self.show(final=True)
        if entry is not None and entry.record.step in journal.FINAL:
            entry.drop_roots()
            self.end = cachix_leader.conclusion(entry.record)

    def show(self, final: bool = False) -> None:
        """Print the lines of the log that are new."""
        try:
            with open(os.path.join(self.directory, "log"), "rb") as file:
                file.seek(self.offset)
                data = file.read(READ_BYTES)
        except OSError:  # there is none yet
            return
        lines, size = logfile.cut(data, len(data) + 1, final)
        self.offset += size
        for line in lines:
            self.screen.print(printable(line))


def start(order: dict[str, Any], waits: Waits) -> pipe.AgentEnd:
    """Start a leader in a session and, where systemd runs, a scope of its own. Raises Error."""
    argv = [*cachix_program.command("cachix_leader"), "by hand"]
    for command, timeout in ((launch.in_scope(argv), waits.ready), (argv, launch.READY_TIMEOUT)):
        child = spawn(command)
        if child.stdout is None or child.stdin is None:
            break
        leader = pipe.AgentEnd(child.stdout, child.stdin)
        if leader.is_ready(launch.READY_TIMEOUT if command == argv else timeout):
            leader.configure(order)
            return leader
        process.end(child)
    raise Error(f"the process for this was not ready within {launch.READY_TIMEOUT:.0f} s")


def spawn(argv: list[str]) -> subprocess.Popen[bytes]:
    """Start a program apart from our terminal, without our token. Raises Error."""
    try:
        with startup.former_limits():
            return subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd="/",
                pass_fds=cachix_program.files(),
                start_new_session=True,
                env=environment.for_switch(),
                bufsize=0,
            )
    except OSError as error:
        raise Error(f"a process for this could not be started: {error}") from None
