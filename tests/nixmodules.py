"""The modules in nix/, evaluated: units and plists, as the systems they are for write them.

A stand-in for nixpkgs' lib makes that possible anywhere. NIXPKGS_LIB, HOME_MANAGER and NIX_DARWIN
name checkouts of the real things, which then take its place.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from dataclasses import dataclass, field
from typing import Any, Optional

from hosts import PROJECT

MODULES = {
    "nixos": "nixos.nix workspace.nix",
    "darwin": "darwin.nix",
    "home-manager": "home-manager.nix",
}
REAL = {"nixpkgsLib": "NIXPKGS_LIB", "homeManager": "HOME_MANAGER", "nixDarwin": "NIX_DARWIN"}


class Refused(Exception):
    """Nix says no. The message is its error, without the trace."""


@dataclass(frozen=True)
class Evaluated:
    """The machine that a configuration gives. `failed` has the assertions that do not hold."""

    failed: list[str]
    units: dict[str, str] = field(default_factory=dict)
    plists: dict[str, Any] = field(default_factory=dict)
    etc: dict[str, str] = field(default_factory=dict)
    ports: list[int] = field(default_factory=list)
    nginx: dict[str, Any] = field(default_factory=dict)
    postgresql: dict[str, Any] = field(default_factory=dict)
    scripts: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    @property
    def argv(self) -> list[str]:
        """The agent's command line, as its service manager starts it."""
        if self.units:
            return exec_start(self.units["cachix-deploy"])
        words: list[str] = self.plists["cachix-deploy"]["ProgramArguments"]
        return shlex.split(words[2].partition(" && exec ")[2]) if words[0] == "/bin/sh" else words


def nix(expression: str) -> Any:
    """Evaluate an expression, in tests/, strictly. Raises Refused."""
    argv = ["nix-instantiate", "--eval", "--strict", "--json", "--expr", expression]
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "NIX_PATH": ""}
    done = subprocess.run(
        argv, cwd=PROJECT / "tests", env=env, capture_output=True, text=True, timeout=60
    )
    if done.returncode != 0:
        raise Refused(re.sub(r"\x1b\[[0-9;]*m", "", done.stderr))
    return json.loads(done.stdout)


def world(kind: str, *settings: str, **arguments: str) -> str:
    """The expression for a machine whose configuration has these settings, a module each."""
    given = {key: os.environ[name] for key, name in REAL.items() if os.environ.get(name)}
    words = " ".join(f"{key} = {json.dumps(value)};" for key, value in given.items())
    words += " ".join(f"{key} = {value};" for key, value in arguments.items())
    modules = [f"../nix/{name}" for name in MODULES[kind].split()]
    modules += [f"({{ lib, config, pkgs, ... }}: {{ {module} }})" for module in settings]
    return (
        f'import ./nixworld.nix {{ kind = "{kind}"; modules = [ {" ".join(modules)} ]; {words} }}'
    )


def evaluate(kind: str, *settings: str, **arguments: str) -> Evaluated:
    """A machine whose configuration has these settings, a module each. Raises Refused."""
    answer = nix(f"({world(kind, *settings, **arguments)}).evaluate")
    return Evaluated(failed=answer["failed"], **without_nulls(answer["result"]))


def without_nulls(value: Any) -> Any:
    """A value without the options that nobody has set."""
    if not isinstance(value, dict):
        return value
    return {key: without_nulls(item) for key, item in value.items() if item is not None}


def exec_start(unit: str) -> list[str]:
    """The words of a unit's ExecStart, by systemd's rules for double quotes, `%%` and `$$`."""
    line = re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    assert line
    words = re.findall(r'"(?:[^"\\]|\\.)*"', line[1])
    assert " ".join(words) == line[1]
    return [json.loads(word).replace("%%", "%").replace("$$", "$") for word in words]


def setting(unit: str, name: str) -> Optional[str]:
    """The value of a setting that a unit has once; None if it does not have it."""
    values = re.findall(rf"^{name}=(.*)$", unit, re.MULTILINE)
    assert len(values) < 2, values
    return values[0] if values else None
