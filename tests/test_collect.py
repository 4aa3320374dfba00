"""Garbage collection of a cache: what stays, what goes, and what comes while it works."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import closures
import pytest
from caches import Files
from workspace_support import OURS, Peer, Server, running

from cachix_workspace import collect, holdings
from cachix_workspace.cache import CacheRow
from cachix_workspace.settings import Settings

DAYS = 86_400.0
ROW = CacheRow(1, "main", True, "main-1", "", "")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path / "data")


@pytest.fixture
def files(settings: Settings) -> Files:
    return Files(settings.data / "cache" / "main")


def age(files: Files, days: float = 10) -> None:
    """Let all files be from some days ago."""
    then = time.time() - days * DAYS
    for path in files.directory.glob("**/*"):
        os.utime(path, (then, then))


def info_of(files: Files, path: str) -> Path:
    return files.directory / f"{path[11:43]}.narinfo"


def nars(files: Files) -> int:
    return len(list((files.directory / "nar").iterdir()))


def present(files: Files, *paths: str) -> list[bool]:
    return [info_of(files, path).exists() for path in paths]


def run(settings: Settings, *needed: str, days: float = 7) -> collect.Plan:
    plan = collect.plan(settings, ROW, needed, days)
    collect.carry_out(settings, ROW, plan)
    return plan


def test_a_closure_stays_and_all_else_goes(settings: Settings, files: Files) -> None:
    system, other = closures.nixos(files, 1), closures.nixos(files, 2)
    alone = files.add("alone", b"alone\n")
    age(files)
    before = nars(files)
    plan = run(settings, system)
    assert present(files, system, other, alone) == [True, False, False]
    assert other in plan.removed and system not in plan.removed and plan.size > 0
    stay = list(files.directory.glob("*.narinfo"))
    assert len(stay) == plan.kept and nars(files) == plan.kept < before
    for path in stay:  # nothing that stays lacks a part
        text = path.read_text()
        references = [line[12:].split() for line in text.splitlines() if line[:11] == "References:"]
        assert all((files.directory / f"{one[:32]}.narinfo").exists() for one in references[0])
    assert run(settings, system).removed == []


@pytest.mark.parametrize("what", ["narinfo", "nar", "neither"])
def test_late_pushes_stay_with_their_closures(settings: Settings, files: Files, what: str) -> None:
    top = files.add("top", closures.plain(files, 1).encode())
    age(files)
    if what == "narinfo":
        os.utime(info_of(files, top))
    if what == "nar":  # a push has asked for it
        assert holdings.lacking(settings, ROW, [top[11:43]]) != []  # by no key of this cache
        for path in (files.directory / "nar").iterdir():
            os.utime(path)
    run(settings)
    assert present(files, top) == [what != "neither"]


def test_a_push_that_is_not_complete_stays(settings: Settings, files: Files) -> None:
    files.add("old", b"old\n")
    age(files)
    fresh, old = (files.directory / "nar" / f"{letter * 52}.nar" for letter in "ab")
    for path in (fresh, old):
        path.write_bytes(b"a NAR whose narinfo comes next")
    os.utime(old, (1, 1))
    run(settings, days=0)
    assert fresh.exists() and not old.exists() and nars(files) == 1


def test_a_file_that_is_written_meanwhile_stays(settings: Settings, files: Files) -> None:
    first, second = files.add("first", b"1\n"), files.add("second", b"2\n")
    age(files)
    plan = collect.plan(settings, ROW, [], 7)
    os.utime(info_of(files, first))
    for file in plan.files:
        if file.name.startswith("nar/"):
            os.utime(files.directory / file.name)
    assert len(plan.removed) == 2
    collect.carry_out(settings, ROW, plan)
    assert present(files, first, second) == [True, False] and nars(files) == 2


def test_files_that_are_gone_already_are_no_failure(settings: Settings, files: Files) -> None:
    files.add("first", b"1\n")
    age(files)
    plan = collect.plan(settings, ROW, [], 7)
    for file in plan.files:
        (files.directory / file.name).unlink()
    assert collect.carry_out(settings, ROW, plan) == 0


def test_references_upstream_and_damaged_narinfos(settings: Settings, files: Files) -> None:
    top = files.add("top", b"top\n", [f"/nix/store/{'z' * 32}-upstream"])
    broken = files.directory / f"{'y' * 32}.narinfo"
    broken.write_text("StorePath: nonsense\n")
    age(files)
    plan = run(settings, top, f"/nix/store/{'x' * 32}-elsewhere")
    assert (plan.kept, plan.removed) == (1, ["y" * 32]) and not broken.exists()


# --- by command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workspace() -> Iterator[tuple[Server, Files]]:
    with running() as server:
        server.command("cache", "create", "main")
        yield server, Files(server.data / "cache" / "main")


@pytest.mark.long
def test_deployments_and_pins_are_roots(workspace: tuple[Server, Files]) -> None:
    server, files = workspace
    peer = Peer(server)
    agent = peer.registered("web", **OURS)
    systems = [closures.nixos(files, number) for number in range(6)]
    script = closures.script(files, "check", "true")
    for system in systems[1:4]:
        deployment = peer.activate({"web": system}, {"x86_64-linux": script})["web"]
        peer.report("web", deployment, "Succeeded")
    agent.close()
    age(files)
    server.command("cache", "pin", "main", systems[5])
    listed = json.loads(server.command("cache", "show", "main", "--json"))
    assert listed["pins"] == [systems[5]]
    dry = server.command("cache", "gc", "main", "--keep-deployments=2", "--dry-run").split()
    assert set(systems) & set(dry) == {systems[0], systems[4]}  # what ran before counts
    assert all(present(files, *systems, script))
    gone = server.command("cache", "gc", "main", "--keep-deployments=2").split()
    assert set(gone) == set(dry)
    expected = [False, True, True, True, False, True, True]
    assert present(files, *systems, script) == expected
    server.command("cache", "unpin", "main", systems[5])
    answer = json.loads(server.command("cache", "gc", "main", "--keep-deployments=1", "--json"))
    assert systems[5] in answer["removed"] and systems[1] in answer["removed"]
    assert present(files, *systems, script) == [False, False, True, True, False, False, True]
    actions = {one["action"] for one in json.loads(server.command("audit", "--json"))}
    assert {"cache pin", "cache unpin", "cache gc"} <= actions
