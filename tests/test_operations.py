"""docs/operations.rst is true: its commands are run as written, with other directories."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from hosts import PROJECT, command
from workspace_support import environment, wait_for

TEXT = (PROJECT / "docs" / "operations.rst").read_text()
BLOCK = r"^\.\. code-block:: sh\n(?:    :name: (\w+)\n)?\n((?:    .*\n|\n)+)"
STUBS = """
set -eu
cachix-workspace() { "$PROGRAM" "$@"; }
systemctl() { :; }
"""


@pytest.mark.slow
def test_the_commands_of_the_operators(tmp_path: Path) -> None:
    data = tmp_path / "lib" / "cachix-workspace"
    program = command("cachix-workspace")[0]
    variables = {**environment(), "CACHIX_WORKSPACE_DATA": str(data), "PROGRAM": program}
    subprocess.run([program, "init"], env=variables, check=True, capture_output=True)
    names = []
    for name, block in re.findall(BLOCK, TEXT, flags=re.M):
        script = re.sub(r"^    ", "", block, flags=re.M)
        script = script.replace("/var/backups", f"{tmp_path}/backups")
        script = STUBS + script.replace("/var/lib", f"{tmp_path}/lib")
        if name:
            names.append(name)
            serve(script, variables, tmp_path / "out")
            continue
        result = subprocess.run(
            ["bash", "-c", script], env=variables, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 0, (script, result)
    assert names == ["serve"] and (tmp_path / "lib" / "cachix-workspace.old").exists()


def serve(script: str, variables: dict[str, str], out: Path) -> None:
    """Start a server, and end it once it listens."""
    script = script.replace("workspace serve", "workspace serve --listen=127.0.0.1:0")
    with open(out, "wb") as file:
        process = subprocess.Popen(
            ["bash", "-c", script], env=variables, stderr=file, start_new_session=True
        )
    try:
        wait_for(lambda: "listening on" in out.read_text())
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(10)


def test_files_that_it_names_are_there() -> None:
    for path in re.findall(r"contrib/[\w.-]+", TEXT):
        assert (PROJECT / path).exists(), path
