"""Worlds for the tests of faults, and which of their cases are run."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import chains
import disk
import pytest
import scenes
from hosts import wait_until
from invariants import assert_invariants
from live import Workspace
from scripted import Scripted
from world import World

HERE = Path(__file__).parent
MOST = 12  # cases of one test that `make test` runs whole
EACH = 5  # of more cases it runs each fifth: coprime to how many faults and times there are, so that all have a turn


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Note each case's promises where the summary finds them, and leave out what only `make faults` runs."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        numbers = {number for mark in item.iter_markers("promise") for number in mark.args}
        item.user_properties += [("promise", number) for number in sorted(numbers)]
        if HERE in item.path.parents:
            cases.setdefault(f"{item.path}::{getattr(item, 'originalname', item.name)}", []).append(
                item
            )
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.timeout(config.getoption("--seconds") + 300))
    items.sort(key=lambda item: item.get_closest_marker("soak") is None)  # the longest first
    if config.getoption("--faults"):
        return
    left = [
        item
        for found in cases.values()
        if len(found) > MOST
        for i, item in enumerate(found)
        if i % EACH
    ]
    if left:
        items[:] = [item for item in items if item not in set(left)]
        config.hook.pytest_deselected(items=left)


@pytest.fixture(scope="session")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory for machines, in memory and in a mount namespace of this process' own where that can be had."""
    directory = tmp_path_factory.mktemp("disks")
    if os.geteuid() != 0 or not disk.own_mounts():
        yield directory
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8g", "none", str(directory)], check=True)
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=False)


@pytest.fixture(scope="session")
def power(disks: Path) -> bool:
    """Whether disks can lose power here. Elsewhere a power loss takes all but what is on the disk."""
    try:
        probe = disk.Disk(disks / "probe.img", disks / "probe")
        probe.lose_power()
        probe.close()
    except (OSError, subprocess.CalledProcessError) as error:
        warnings.warn(f"a power loss takes no unsynced data here: {error}", stacklevel=1)
        return False
    return True


@pytest.fixture
def make_world(
    request: pytest.FixtureRequest, disks: Path, power: bool, live: Workspace
) -> Iterator[Callable[..., World]]:
    """A machine with a connected agent that runs a first system; its invariants are looked at when the test ends."""
    made: list[World] = []
    directories: list[Path] = []

    def make(
        kind: str = "nixos", start: bool = True, workspace: Workspace = live, **more: Any
    ) -> World:
        directory = disks / uuid.uuid4().hex[:12]
        directory.mkdir()
        directories.append(directory)
        name = f"faults-{directory.name}"
        made.append(World(directory, workspace, name, kind, power=power, **more))
        prepare(made[-1])
        if start:
            made[-1].start()
            made[-1].connected()
        return made[-1]

    def close() -> None:
        report = getattr(request.node, "report", None)
        for world in made:
            if report is not None and report.failed:
                show(world)
            world.close()
        for directory in directories:
            shutil.rmtree(directory, ignore_errors=True)
        made.clear()
        directories.clear()

    make.close = close  # type: ignore[attr-defined]  # for a test that makes many, one after another
    yield make
    close()


def prepare(world: World) -> None:
    """Let the machine have run a first system all the time."""
    first = scenes.KINDS[world.kind](world.files, "first")
    if world.kind == "home_manager":
        world.workspace.push(first)
        world.host.fetch(world.workspace.cache_url, world.files.key.public, first)
        world.host.path("/nix/var/nix/profiles/per-user/root").mkdir(parents=True, exist_ok=True)
        world.host.output(f"{first}/activate")
        subprocess.run(["sync", "-f", str(world.directory / "disk")], check=True)
        world.visits.clear()
    else:
        world.install(first)
    assert world.running() == world.profile() == first


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    """A NixOS machine."""
    return make_world()


@pytest.fixture
def finish() -> Callable[[World], None]:
    """The end of every case: the invariants, and another deployment after which they hold too."""

    def finish(world: World, version: str = "next") -> None:
        world.heal()
        assert_invariants(world)
        deployment = scenes.deploy(world, version)
        assert world.ended(deployment) == "succeeded", world.workspace.deployment(deployment)
        assert_invariants(world)

    return finish


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Scripted]:
    """A workspace that sends what the test wants: `make_world(workspace=scripted)`."""
    made = Scripted(tmp_path / "cache")
    yield made
    made.close()


@pytest.fixture
def held(make_world: Callable[..., World]) -> Callable[..., tuple[World, str]]:
    """A machine, and a deployment whose activation waits for `chains.go_on`: `held(workspace=scripted)`."""

    def make(**more: Any) -> tuple[World, str]:
        world = make_world(**{"args": chains.PATIENT, **more})
        deployment = world.deploy(chains.system(world, chains.HOLD), scenes.script(world.files))
        wait_until(lambda: "test second" in world.story(), 30, "the activation")
        return world, deployment

    return make


def show(world: World) -> None:
    """What helps where a case has failed."""
    print("problems:", *world.problems, *world.overlaps, sep="\n  ")
    print("\n".join(["visits:", *(f"  {visit}  -> {visit.order}" for visit in world.visits)]))
    if world.agents:
        print("agent:\n" + world.agent.text()[-6000:])
    for deployment, entry in world.journals().items():
        print(f"journal: {entry}")
        with contextlib.suppress(OSError):  # the workspace may have ended
            print("log:\n" + world.workspace.text(deployment)[-3000:])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.when == "call":
        item.report = report  # type: ignore[attr-defined]
    return report
