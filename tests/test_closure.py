"""Store paths that Nix takes for valid, and that are gone from the disk or have lost contents."""

import os
import shutil
import subprocess
import time

import closures
import pytest
from caches import Executable

from activate import nix
from activate.agent import closure

pytestmark = pytest.mark.promise(2)


def fetch(machine, *paths):
    """Let the machine's Nix have closures."""
    machine.workspace.push(*paths)
    machine.host.fetch(machine.workspace.cache_url, machine.files.key.public, *paths)


def remove(host, path):
    """Take a store path from the disk, but not from Nix's database."""
    subprocess.run(["chmod", "-R", "u+w", str(host.path(path))], check=True)
    shutil.rmtree(host.path(path)) if host.path(path).is_dir() else host.path(path).unlink()
    assert host.valid(path)


def empty(host, path, file):
    """Let a program lose its contents."""
    os.chmod(host.path(path) / file, 0o755)
    (host.path(path) / file).write_bytes(b"")


def part_of(machine, path):
    """A store path that `path` refers to."""
    return next(one for one in machine.files.closure(path) if "-part-0-" in one)


MAKE = {"plain": closures.plain, "home": closures.home_manager, "nixos": closures.nixos}


@pytest.mark.parametrize("gone", ["path", "part", "script"])
@pytest.mark.parametrize("kind", MAKE)
def test_it_is_downloaded_again(make_machine, kind, gone):
    machine = make_machine(check=kind == "nixos")
    machine.host.path("/nix/var/nix/profiles/per-user/root").mkdir(parents=True, exist_ok=True)
    path = MAKE[kind](machine.files, machine.name)
    script = closures.script(machine.files, machine.name, "exit 0")
    fetch(machine, path, script)
    lost = {"path": path, "part": part_of(machine, path), "script": script}[gone]
    remove(machine.host, lost)
    outcome = machine.deploy(path, script)
    assert outcome.status == "Succeeded", outcome
    assert f"gone from the disk, downloading again: {lost}\n" in outcome.log
    assert os.path.lexists(machine.host.path(lost))
    if kind == "home":
        assert machine.host.current_home() == path, "its kind was guessed"
    else:
        assert machine.host.profile() == path


@pytest.mark.parametrize("gone", ["path", "part"])
def test_it_can_not_be_downloaded_again(make_machine, cache, gone):
    """The workspace's cache does not have it: the deployment ends, and nothing was changed."""
    machine = make_machine()
    first = closures.nixos(machine.files, f"{machine.name}-1")
    assert machine.deploy(first).status == "Succeeded"
    path = closures.nixos(cache, f"{machine.name}-2")
    machine.host.fetch(cache.url, cache.key.public, path)
    lost = path if gone == "path" else next(p for p in cache.closure(path) if "-part-0-" in p)
    remove(machine.host, lost)
    outcome = machine.deploy(path, push=False)
    assert (outcome.status, outcome.step) == ("Failed", "failed")
    assert outcome.reason.startswith(f"{lost} is gone from the disk, although Nix takes it for")
    assert f"`nix-store --repair-path {lost}`; nothing was changed" in outcome.reason
    assert machine.host.running() == first and len(machine.host.record()) == 2


@pytest.mark.parametrize(
    ("kind", "program"), [("nixos", "bin/switch-to-configuration"), ("home", "activate")]
)
def test_a_program_that_has_lost_its_contents_is_not_run(make_machine, kind, program):
    machine = make_machine(check=kind == "nixos")
    machine.host.path("/nix/var/nix/profiles/per-user/root").mkdir(parents=True, exist_ok=True)
    first = MAKE[kind](machine.files, f"{machine.name}-1")
    assert machine.deploy(first).status == "Succeeded"
    path = MAKE[kind](machine.files, f"{machine.name}-2")
    fetch(machine, path)
    empty(machine.host, path, program)
    calls = machine.host.record()
    outcome = machine.deploy(path)
    assert (outcome.status, outcome.step) == ("Failed", "failed")
    assert outcome.reason.startswith(f"{path}/{program} is empty")
    assert machine.host.record() == calls


def test_an_empty_rollback_script(machine):
    path = closures.plain(machine.files, machine.name)
    script = machine.files.add("empty-script", Executable(""))
    outcome = machine.deploy(path, script)
    assert (outcome.status, outcome.step) == ("Failed", "failed")
    assert outcome.reason.startswith(f"{script} is empty")
    assert machine.host.profile() is None


def test_two_thousand_paths_take_a_few_milliseconds(host, cache, monkeypatch):
    """Nix answers while the switch process starts; what is left is one look at each path."""
    path = closures.chain(cache, 2000)
    host.fetch(cache.url, cache.key.public, path)
    names = host.output("nix-store", "--query", "--requisites", path).split()
    paths = [str(host.path(name)) for name in names]
    monkeypatch.setattr(nix, "requisites", lambda roots, timeout: paths)
    began = time.process_time()
    assert len(paths) == 2001 and closure.Closure([path]).missing() == []
    assert time.process_time() - began < 0.05  # 4 ms, but for a machine that is busy
    shutil.rmtree(paths[7]) if os.path.isdir(paths[7]) else os.unlink(paths[7])
    assert closure.Closure([path]).missing() == [paths[7]]
