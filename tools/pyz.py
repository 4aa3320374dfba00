"""Build the agent and the CI command, with all they need, into one file for Python 3.9 or newer."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
# The dependencies come from the environment that the tests run in: the same versions.
PINNED = "requirements-agent.txt"


def check_versions() -> None:
    """End with an error if anything is not as pinned, so that nothing else is ever released."""
    try:
        with open(os.path.join(ROOT, PINNED)) as file:
            pins = re.findall(r"^([\w.-]+)==(\S+)", file.read(), re.M)
    except FileNotFoundError:  # part of the sources: nobody releases from that
        print(f"warning: {PINNED} is missing, so that no version is checked", file=sys.stderr)
        return
    for name, pinned in pins:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "missing"
        if version != pinned:
            sys.exit(
                f"error: {name} is {version} here, and {PINNED} has {pinned}: run `make clean`,"
                " then `make setup`"
            )


def main(target: str) -> None:
    """Write the zip application `target`, which appears whole or not at all."""
    from cachix_workspace import program  # needs the standard library alone

    check_versions()
    os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
    program.build(program.sources(), f"{target}.new")
    os.chmod(f"{target}.new", 0o755)
    os.rename(f"{target}.new", target)


if __name__ == "__main__":
    main(sys.argv[1])
