"""The gate of an agent: signed deployments only, where its operator has named keys for that."""

from __future__ import annotations

import hashlib
import json
import os
import time
from typing import Any, Callable, Optional

from activate import files
from activate.journal import Journal, Record
from activate.values import dataclass
from cachix_protocol import Error, Undecodable, Wish, nix_system
from cachix_signed import Signature, Statement


@dataclass(frozen=True)
class Executed:
    """The signed deployment with the highest sequence that was executed here."""

    sequence: int
    digest: str  # of its statement


class Gate:
    """Decides about the deployments of one agent.

    `keys` are public keys by name; without any, everything is accepted. The last `returns` paths
    that this agent has confirmed may be deployed again without a signature.
    """

    def __init__(
        self, state: str, keys: dict[str, bytes], returns: int, tell: Callable[[str], None]
    ) -> None:
        self.state, self.keys, self.returns, self.tell = state, keys, returns, tell
        if keys:
            import cachix_ed25519  # noqa: F401  # while its file is there

    def problem(self, record: Record, before: list[Journal]) -> str:
        """Why a deployment may not be executed; empty if it may. See `check`."""
        try:
            self.check(record, before)
        except Error as error:
            return str(error)
        return ""

    def pass_through(self, record: Record, before: list[Journal]) -> None:
        """Check once more, right before the machine is changed, and note it. Raises Error."""
        self.check(record, before)
        self.note(record)

    def check(self, record: Record, before: list[Journal]) -> None:
        """Raise Error unless a deployment may be executed. `before` are all that have a journal."""
        if not self.keys:
            return
        if record.signature is None:
            self._check_return(record, before)
            return
        signature = signature_of(record)
        statement = signature.statement
        self._check_signature(signature)
        if record.rollback_script != statement.rollback_scripts.get(nix_system()):
            raise refusal("its rollback script is not the one that was signed")
        if statement.expires is not None and statement.expires <= time.time():
            moment = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(statement.expires))
            raise refusal(f"its signature expired on {moment}, by this machine's clock")
        self._check_sequence(statement)

    def _check_signature(self, signature: Signature) -> None:
        import cachix_ed25519

        statement = signature.statement
        key = self.keys.get(signature.key)
        if key is None:
            names = ", ".join(sorted(self.keys))
            raise refusal(f"it is signed by the key {signature.key[:100]!r}, and not by {names}")
        if not cachix_ed25519.verify(key, statement.to_bytes(), signature.value):
            whose = f"agent {statement.agent} of {statement.host}, {statement.store_path}"
            whose += "".join(f", {word}" for word in statement.wish.to_json().values())
            raise refusal(f"its signature by {signature.key} is not one for {whose}")

    def _check_sequence(self, statement: Statement) -> None:
        last = self._load(statement.agent).get(statement.host)
        if last is None:
            return
        if statement.sequence == last.sequence and digest(statement) != last.digest:
            raise refusal("another deployment of the same signed sequence was executed")
        if statement.sequence < last.sequence and not statement.allow_downgrade:
            older = f"signed sequence {statement.sequence} is older than {last.sequence}"
            raise refusal(f"its {older}, which was executed: sign it with --allow-downgrade")

    def _check_return(self, record: Record, before: list[Journal]) -> None:
        """Raise Error unless an unsigned deployment only returns to what was confirmed here."""
        mine = [
            entry.record
            for entry in reversed(before)
            if entry.record.is_confirmed
            and (entry.record.agent, entry.record.host) == (record.agent, record.host)
        ]
        scripts: dict[str, Optional[str]] = {}
        for earlier in mine:
            scripts.setdefault(earlier.store_path, earlier.rollback_script)
        # the newest one is where the machine is: no return counts for it
        allowed = list(scripts)[: self.returns + 1] if self.returns else []
        if record.store_path not in allowed:
            what = "unsigned, and none of the last paths that this agent confirmed"
            raise refusal(f"it is {what} (--unsigned-rollback={self.returns})")
        if not Wish(record.operation, record.reboot).is_plain:
            raise refusal("it is unsigned, and asks for another operation, or for a reboot")
        if record.rollback_script not in (None, scripts[record.store_path]):
            raise refusal("it is unsigned, and its rollback script is not the one of that time")

    def note(self, record: Record) -> None:
        """Note that a deployment which passed is executed now. Raises Error."""
        if not self.keys or record.signature is None:
            return
        statement = signature_of(record).statement
        known = self._load(record.agent)
        last = known.get(statement.host)
        if last is None:
            what = f"no earlier one is on record in {self.state} to compare it with"
            self.tell(f"signed deployment of sequence {statement.sequence} is accepted: {what}")
        elif last.sequence >= statement.sequence:
            return
        known[statement.host] = Executed(statement.sequence, digest(statement))
        content = {host: vars(executed) for host, executed in known.items()}
        try:
            files.write_durably(self._path(record.agent), json.dumps(content).encode())
        except OSError as error:
            raise refusal(f"its sequence can't be noted in {self.state}: {error}") from None

    def _path(self, agent: str) -> str:
        return os.path.join(self.state, f"executed-{agent}.json")

    def _load(self, agent: str) -> dict[str, Executed]:
        """The highest sequence executed, by workspace. An unreadable file counts as lost."""
        try:
            with open(self._path(agent), "rb") as file:
                content = json.loads(file.read(1 << 20))
            return {str(host): _executed(value) for host, value in content.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return {}


def _executed(value: Any) -> Executed:
    return Executed(int(value["sequence"]), str(value["digest"]))


def signature_of(record: Record) -> Signature:
    """The signature that came with a deployment. Raises Error if it can't be read."""
    wish = Wish(record.operation, record.reboot)
    place = (record.host, record.agent, record.store_path, wish)
    try:
        return Signature.from_json(record.signature, *place)
    except Undecodable as error:
        raise refusal(f"its signature can't be read: {error}") from None


def digest(statement: Statement) -> str:
    """The identity of a statement."""
    return hashlib.sha256(statement.to_bytes()).hexdigest()


def refusal(problem: str) -> Error:
    """The error for a deployment that is not accepted."""
    return Error(f"this deployment is not accepted: {problem}; nothing was changed")


def remark(record: Record, before: list[Journal]) -> str:
    """A remark on a deployment with a lower number than an earlier one; else empty."""
    mine = [
        entry.record.index
        for entry in before
        if (entry.record.agent, entry.record.host) == (record.agent, record.host)
    ]
    last = max(mine, default=0)
    if record.index >= last:
        return ""
    why = "the workspace was restored from a backup, or repeats an old order"
    return f"deployment {record.index} comes after deployment {last}: {why}"
