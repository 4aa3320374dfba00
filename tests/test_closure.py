"""Store paths that Nix takes for valid, and that are gone from the disk or have lost contents."""

import os
import shutil
import sqlite3
import subprocess

import closures
import pytest
from caches import Executable

from activate import nix
from activate.agent import closure, database

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


@pytest.fixture
def store(host, cache, monkeypatch):
    """A closure of 201 paths, in the database of a host that is read as if it were this one's."""
    path = closures.chain(cache, 200)
    host.fetch(cache.url, cache.key.public, path)
    monkeypatch.setattr(database, "DIRECTORY", str(host.path("/nix/var/nix/db")))
    return host, path


def test_the_database_says_what_nix_says(store):
    host, path = store
    expected = host.output("nix-store", "--query", "--requisites", path).split()
    assert sorted(database.requisites([path])) == sorted(expected)
    part = next(one for one in expected if one != path)
    assert database.requisites([part]) == [part]
    assert sorted(database.requisites([part, path])) == sorted(expected)


def test_the_size_of_a_closure(store):
    host, path = store
    words = host.output("nix", "path-info", "--closure-size", path, *nix.EXPERIMENTAL).split()
    assert database.closure_size(path) == int(words[1])
    assert database.closure_size("/nix/store/" + "a" * 32 + "-none") is None


def test_the_whole_closure_is_named_once(store):
    host, path = store
    paths = database.requisites([path])
    assert len(paths) == len(set(paths)) == 201
    assert all(os.path.lexists(host.path(one)) for one in paths)


def forbid(monkeypatch, directory):
    (directory / "schema").write_text("11")


def variable(monkeypatch, directory):
    monkeypatch.setenv("NIX_STATE_DIR", "/elsewhere")


def damage(monkeypatch, directory):
    (directory / "db.sqlite").write_bytes(b"\xff" * 8192)


def remove_all(monkeypatch, directory):
    shutil.rmtree(directory)


@pytest.mark.parametrize("how", [forbid, variable, damage, remove_all])
def test_a_database_that_can_not_be_trusted_is_not_read(store, monkeypatch, how):
    host, path = store
    how(monkeypatch, host.path("/nix/var/nix/db"))
    assert database.requisites([path]) is None
    monkeypatch.setattr(nix, "requisites", lambda paths, timeout: [path, "/nix/store/gone"])
    assert "/nix/store/gone" in closure.missing([path])


def test_a_path_that_is_not_valid_has_no_closure(store):
    assert database.requisites([store[1], "/nix/store/" + "a" * 32 + "-none"]) is None


def test_a_database_that_another_process_has_locked(store):
    host, path = store
    writer = sqlite3.connect(host.path("/nix/var/nix/db/db.sqlite"), isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    assert len(database.requisites([path]) or [None] * 201) == 201
    writer.execute("ROLLBACK")
    writer.close()
