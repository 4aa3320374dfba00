"""The process that leads what is begun by hand. It lives on when the terminal of that is lost.

It leads as an agent does: with the same journal, locks, switch process, checks and rollback.

from the command   CONFIG (JSON)
to the command     "ready", "say MESSAGE", "entry DIRECTORY", "end STATUS MESSAGE"
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import time
from collections.abc import Iterator
from typing import Any, Callable, Optional

import cachix_program
from activate import history, holder, journal, kinds, lock, nix, outcomes, pipe, startup
from activate.agent import conductor, local, signatures
from activate.agent.hooks import AgentHooks
from activate.operation import DRY_ACTIVATE, TEST
from activate.text import hide
from cachix_connection import Peer, Waits, reach
from cachix_protocol import AlreadyRunning, Error, fresh_id
from cachix_proxy import for_nix
from cachix_reported import prune

SAY, ENTRY, END = "say", "entry", "end"  # words on the pipe
SETTLE = "settle"  # go on with a deployment whose leader was killed
END_PATIENCE = 3600.0  # seconds for the disk to take the end
LOCK_PATIENCE = 5.0  # seconds for a process that has just ended a deployment to let go


class Leader:
    """Leads one order to its end."""

    def __init__(self, config: dict[str, Any], front: pipe.SwitchEnd) -> None:
        self.config, self.front, self.state = config, front, str(config["state"])
        waits, token = Waits.from_environment(), str(config["token"])
        host = str(config["host"]) if token else ""
        switch = {"host": host, "token": token, "name": config["name"], "policy": config["policy"]}
        self.conductor = conductor.Conductor(
            AgentHooks(
                config=switch,
                switch_command=cachix_program.command("cachix_switch"),
                switch_files=cachix_program.files(),
                scope_timeout=waits.ready,
                download_timeout=waits.download,
                stop=threading.Event(),
                source=self.source,
                still_wanted=lambda entry: None,
                changed=lambda: None,
                measured=lambda entry, size: None,
                tell=lambda message: front.report(SAY, message),
                reach=looker(host, token, str(config["name"])),
            )
        )

    def run(self) -> None:
        """Do what was ordered, and tell how it ended. Raises Error if nothing was begun."""
        do, directory = self.config["do"], self.config.get("directory")
        if do == SETTLE:
            entry = journal.load(str(directory))
            if entry is None:
                raise Error("it ended before it was begun, and nothing was changed")
        else:
            with contextlib.suppress(OSError):
                lock.take(holder.by_hand_path(self.state), LOCK_PATIENCE)  # until this process ends
            cancelled = self.make_room()
            if do == journal.ROLLBACK and not self.config["path"] and is_back(cancelled):
                self.front.report(END, f"0 {described(cancelled[-1].record)}")
                return
            self.wait_for_locks()
            entry = self.prepare(do)
        self.front.report(ENTRY, entry.directory)
        self.lead(entry)

    def lead(self, entry: journal.Journal) -> None:
        """Lead a deployment to its end, and stay until that is written: the disk may be full."""
        with contextlib.suppress(OSError):
            lock.take(holder.leader_path(entry))  # for as long as this process lives
        self.conductor.settle(entry)
        entry.reload()
        prune(self.state)
        self.front.report(END, conclusion(entry.record))
        deadline = time.monotonic() + END_PATIENCE
        while self.conductor.ends.unwritten and time.monotonic() < deadline:
            time.sleep(local.POLL)

    def make_room(self) -> list[journal.Journal]:
        """End what has not ended, if that is wanted; what was cancelled. Raises AlreadyRunning."""
        others = local.under_way(self.state)
        for entry in [entry for entry in others if is_stale(entry)]:
            self.conductor.settle(entry)
            others.remove(entry)
        if others and not self.config["cancel"]:
            record = others[-1].record
            hint = "wait for its end, or give --cancel (with `rollback`)"
            raise AlreadyRunning(f"{outcomes.title(record)} is under way ({record.step}): {hint}")
        for entry in others:
            self.front.report(SAY, f"cancelling {outcomes.title(entry.record)}")
            local.cancel(entry)
            self.conductor.settle(entry)
        return others

    def wait_for_locks(self) -> None:
        """Wait a moment for locks of a former deployment. Raises AlreadyRunning."""
        deadline = time.monotonic() + LOCK_PATIENCE
        profiles = self.profiles()
        while held := next(filter(None, map(local.foreign_holder, profiles)), ""):
            if time.monotonic() > deadline:
                raise AlreadyRunning(f"another program deploys to this machine: it holds {held}")
            time.sleep(local.POLL)

    def records(self) -> list[journal.Record]:
        """All deployments that this machine knows, the newest first."""
        return [entry.record for entry in reversed(history.load_all(self.state)[0])]

    def profiles(self) -> list[str]:
        """The profile to change; empty as long as it is not known."""
        with contextlib.suppress(Error):
            return [local.profile_of(self.records(), self.config["profile"])[1]]
        return []

    def prepare(self, do: str) -> journal.Journal:
        """The journal of what is to be done. Nothing is written yet. Raises Error."""
        records, config = self.records(), self.config
        profile_name, path = config["profile"], config["path"]
        if do == journal.ROLLBACK:
            kind, profile, profile_name = local.profile_of(records, profile_name)
            if not os.access(os.path.dirname(profile), os.W_OK):
                raise Error(f"{profile} belongs to another user: try as root")
            path = local.target_of(records, kind, profile, str(path or ""))
            if not signatures.present([path]):
                raise Error(f"{path} is not in the store: `cachix-deploy activate-local {path}`")
        else:
            if profile_name is None and records:
                profile_name = records[0].profile_name
            require_own_profile(str(path), profile_name)
        record = journal.Record(
            id=fresh_id(),
            index=0,
            agent=config["name"],
            host="",
            store_path=str(path),
            rollback_script=config["script"],
            profile_name=profile_name,
            sequence=history.next_sequence(history.load_all(self.state)[0]),
            by_hand=do,
            needs_workspace=bool(config["token"]),
            operation=config["operation"],
            reboot=config["reboot"],
        )
        return journal.Journal(os.path.join(self.state, "deployments", record.id), record)

    @contextlib.contextmanager
    def source(self) -> Iterator[nix.Source]:
        """Where Nix may download from: the machine's own substituters, and the given one."""
        from activate import environment

        environment.proxies = for_nix()
        configured = nix.show_config().get("trusted-public-keys", "").split()
        given = tuple(self.config["keys"])
        own = tuple(key for key in configured if not key.startswith("cache.nixos.org-"))
        keys = tuple(dict.fromkeys([*configured, *given]))
        yield nix.Source(self.config["substituter"], keys, signers=given or own)


def looker(host: str, token: str, name: str) -> Callable[[float], None]:
    """A look at the workspace, for a switch process that asks for one."""

    def look(timeout: float) -> None:
        if not token:
            raise Error("it was begun without a token for the workspace")
        reach(Peer(host, token, name), timeout)

    return look


def require_own_profile(path: str, profile_name: Optional[str]) -> None:
    """Raise Error if this user may not deploy a path, of which the kind is known already."""
    if os.path.lexists(path):
        profile = kinds.detect(path).profile_path(profile_name)
        place = os.path.dirname(profile)
        if os.path.isdir(place) and not os.access(place, os.W_OK):
            raise Error(f"{profile} belongs to another user: try as root")


def is_stale(entry: journal.Journal) -> bool:
    """Whether something by hand was interrupted before it changed anything."""
    record = entry.record
    return bool(record.by_hand) and record.step in journal.HARMLESS and not holder.is_led(entry)


def is_back(cancelled: list[journal.Journal]) -> bool:
    """Whether the end of a cancelled deployment was the rollback that was wanted."""
    if not cancelled:
        return False
    record = cancelled[-1].record
    had_begun = journal.ACTIVATING in record.times
    return had_begun and record.step not in (journal.SUCCEEDED, journal.ROLLBACK_FAILED)


def described(record: journal.Record) -> str:
    """How a cancelled deployment ended."""
    return f"{outcomes.title(record)} was cancelled ({record.step}): {record.reason}"


def conclusion(record: journal.Record) -> str:
    """The exit status, and how it ended, in words."""
    if record.step not in journal.FINAL:
        return "1 it has not ended: an agent that starts goes on with it"
    note = f" ({record.reason})" if record.reason else ""
    if record.step != journal.SUCCEEDED:
        return f"1 {record.step}{note}"
    if record.operation == DRY_ACTIVATE:
        return f"0 a dry run of {record.store_path}: nothing was changed"
    if outcomes.of(record) == outcomes.REBOOT_NEEDED:
        return f"0 {record.reason or f'{record.store_path} is what starts next'}"
    if record.operation == TEST:
        return f"0 this machine runs {record.store_path} until the next boot{note}"
    word = "rolled back to" if record.by_hand == journal.ROLLBACK else "this machine runs"
    return f"0 {word} {record.store_path}{note}"


def status_and_words(text: str) -> tuple[int, str]:
    """The exit status and the words of an END."""
    status, _, words = text.partition(" ")
    return int(status), words


def main() -> int:
    """Lead what the command at the other end of stdin and stdout orders; the exit status."""
    front = pipe.SwitchEnd(io.FileIO(0, closefd=False), io.FileIO(1, "w", closefd=False))
    front.report(pipe.READY)
    config: Optional[dict[str, Any]] = front.wait_for_config()
    if config is None:
        return 0
    hide(config["token"])
    startup.protect()
    os.set_blocking(1, False)  # nobody has to listen
    try:
        Leader(config, front).run()
    except (Error, OSError) as error:
        front.report(END, f"{getattr(error, 'status', 1)} {error}")
    except Exception as error:
        front.report(END, f"1 {type(error).__name__}: {error}")
    return 0
