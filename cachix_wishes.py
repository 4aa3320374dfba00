"""The `options` of an order, our own addition: the operation, and whether the machine reboots."""

from __future__ import annotations

import contextlib
import json
from typing import Any, Optional

from activate.operation import NEVER, OPERATIONS, REBOOTS, SWITCH, contradiction
from activate.values import dataclass
from cachix_errors import Undecodable

EXAMPLE_SPEC = '{"agents": {"NAME": "/nix/store/..."}}'
EXAMPLE_SCRIPTS = '{"x86_64-linux": "/nix/store/..."}'
EXAMPLE_OPTIONS = '{"operation": "boot", "reboot": "when-needed"}'
MAX_LISTED = 20  # wrong values that one message names
WISHES = {"operation": OPERATIONS, "reboot": REBOOTS}
ABILITY = "operations"  # what an agent says of itself that knows them


def is_printable(name: str) -> bool:
    """Whether a name shows on a terminal as it is."""
    return bool(name.strip()) and name.isprintable()


def brief_value(value: Any) -> str:
    """A JSON value for a message. Lists and objects, which may be deep, only by their type."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    return json.dumps(value)[:200]


def listed(items: list[str]) -> str:
    """The first items for a message, and how many more there are."""
    more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return ", ".join(items[:MAX_LISTED]) + more


@dataclass(frozen=True)
class Wish:
    """How a deployment is to be run: docs/protocol.rst has the words."""

    operation: str = SWITCH
    reboot: str = NEVER

    @classmethod
    def from_json(cls, record: Any, place: str, default: Wish) -> Wish:
        """Read an object, called `place` in messages. Raises Undecodable for whatever is unknown.

        A word that is misspelled must not run as `switch`.
        """
        if not isinstance(record, dict):
            raise Undecodable(f"`{place}` must be an object such as {EXAMPLE_OPTIONS}")
        unknown = sorted(set(record) - set(WISHES))
        if unknown:
            names = listed([json.dumps(str(name)[:100]) for name in unknown])
            raise Undecodable(f"`{place}` has only {' and '.join(WISHES)}, not {names}")
        values = {**default.to_json(whole=True), **record}
        for name, words in WISHES.items():
            if values[name] not in words:
                known = ", ".join(words)
                raise Undecodable(
                    f"`{place}.{name}` must be one of {known}, not {brief_value(values[name])}"
                )
        if problem := contradiction(values["operation"], values["reboot"]):
            raise Undecodable(f"`{place}`: {problem}")
        return cls(values["operation"], values["reboot"])

    @classmethod
    def known(cls, record: Any) -> Optional[Wish]:
        """The wish of a `Deployment`; None if this release does not know it."""
        with contextlib.suppress(Undecodable):
            return PLAIN if record is None else cls.from_json(record, "options", PLAIN)
        return None

    def to_json(self, whole: bool = False) -> dict[str, str]:
        """What differs from the defaults; or all of it."""
        return {
            name: value for name, value in vars(self).items() if whole or value != vars(PLAIN)[name]
        }

    @property
    def is_plain(self) -> bool:
        """Whether this is what every agent and every workspace does."""
        return self == PLAIN


PLAIN = Wish()


def decode_wishes(record: Any, agents: dict[str, Any]) -> dict[str, Wish]:
    """The wishes of an order's `options`, by agent, where they are not plain.

    Raises Undecodable.
    """
    if record is None:
        return {}
    if not isinstance(record, dict):
        raise Undecodable(f"`options` must be an object such as {EXAMPLE_OPTIONS}")
    own = record.get("agents", {})
    rest = {name: value for name, value in record.items() if name != "agents"}
    common = Wish.from_json(rest, "options", PLAIN)
    if not isinstance(own, dict):
        raise Undecodable("`options.agents` must be an object with an object for each agent")
    strangers = sorted(str(name)[:128] for name in own if name not in agents)
    if strangers:
        raise Undecodable(f"`options.agents` names what `agents` does not: {listed(strangers)}")
    wishes = {
        name: Wish.from_json(own.get(name, {}), f"options.agents.{name[:128]}", common)
        for name in agents
    }
    return {name: wish for name, wish in wishes.items() if not wish.is_plain}
