"""The commands at the machine for a user who is not root, and what they say that needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import closures
import pytest
from caches import Cache
from hosts import PROJECT, SYSTEM, Host

pytestmark = [
    pytest.mark.long,
    pytest.mark.promise(1),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else"),
]
Command = Callable[..., "subprocess.CompletedProcess[str]"]
USER = "nobody"


@pytest.fixture
def as_user(host: Host, cache: Cache) -> Command:
    """Run a command of the program as an ordinary user with a home, on a machine with a NixOS."""
    host.install(cache.url, cache.key.public, closures.nixos(cache, "old"))
    for place in (host.directory, *host.directory.parents):
        if str(place).startswith("/tmp/"):
            os.chmod(place, 0o755)
    home = host.directory / USER
    for place in ("", "state", "nix", "nix/profiles"):
        (home / place).mkdir()
        shutil.chown(home / place, USER)
    pyz = host.directory / "cachix-deploy.pyz"  # the Python of the tests may be root's own
    build = [sys.executable, str(PROJECT / "tools/pyz.py"), str(pyz)]
    subprocess.run(build, check=True, capture_output=True)
    env = {"HOME": str(home), "XDG_STATE_HOME": str(home / "state"), "STATE_DIRECTORY": ""}
    env.update(XDG_CACHE_HOME=str(home / "cache"), USER=USER)

    def run(*words: str, **more: str) -> Any:
        drop = ["setpriv", f"--reuid={USER}", "--clear-groups", "--inh-caps=-all"]
        return host.run([*drop, "/usr/bin/python3", str(pyz), *words], env={**env, **more})

    return run


def test_status_says_what_runs_and_what_root_sees(as_user: Command, host: Host) -> None:
    host.path("/run/booted-system").symlink_to(str(host.running()))
    done = as_user("status")
    assert done.returncode == 0, done.stderr
    assert f"  runs        {host.running()}" in done.stdout
    assert "root can see what boots next" in done.stdout


def test_a_system_is_not_rolled_back_by_an_ordinary_user(as_user: Command, host: Host) -> None:
    before, calls = host.profile(), host.record()
    done = as_user("rollback")
    assert done.returncode == 1
    assert done.stderr == "error: there is no profile that this user may change: try as root\n"
    named = as_user("rollback", "system", f"--to={host.running()}")
    assert named.returncode == 1 and named.stderr.endswith("may change: try as root\n")
    assert (host.profile(), host.record()) == (before, calls)


def test_a_system_is_not_activated_by_an_ordinary_user(
    as_user: Command, host: Host, cache: Cache
) -> None:
    path = closures.nixos(cache, "new")
    host.fetch(cache.url, cache.key.public, path)
    before, calls = host.profile(), host.record()
    done = as_user("activate-local", path)
    assert done.returncode == 1
    assert "try as root" in done.stderr and SYSTEM in done.stderr, done.stderr
    assert (host.profile(), host.record()) == (before, calls)


def test_check_names_a_remedy(as_user: Command) -> None:
    done = as_user("check")
    assert done.returncode == 1
    assert "PROBLEM" in done.stdout and "Traceback" not in done.stdout + done.stderr


def test_an_own_state_of_root_is_not_touched(as_user: Command, tmp_path: Path) -> None:
    done = as_user("rollback", STATE_DIRECTORY="/var/lib/of-root-alone")
    assert done.returncode == 1
    assert "can't be written" in done.stderr and "try as root" in done.stderr
