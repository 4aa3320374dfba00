"""Worlds for the tests of faults, and the selection of their cases."""

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
# `make test` runs a test with up to MOST cases whole, else each EACHth case, and `make test-slow`
# the LATER ones after each of them, also of tests that are long. EACH is coprime to the numbers of
# faults and of times, so that each of these has its turn.
MOST, EACH, LATER = 5, 13, 3


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Note each case's promises for the summary, and leave out what only `make faults` runs."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        numbers = {number for mark in item.iter_markers("promise") for number in mark.args}
        item.user_properties += [("promise", number) for number in sorted(numbers)]
        if HERE in item.path.parents:
            test = f"{item.path}::{getattr(item, 'originalname', item.name)}"
            cases.setdefault(test, []).append(item)
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.timeout(config.getoption("--seconds") + 300))
    items.sort(key=lambda item: not (item.get_closest_marker("soak") or is_patient(item)))
    if config.getoption("--faults"):
        return
    long = config.getoption("--long")
    sampled = {
        item: number % EACH in (range(1, 1 + LATER) if long else (0,))
        for items in cases.values()
        if len(items) > MOST
        for number, item in enumerate(items)
    }
    stays = [
        long and sampled.get(item, True) if is_long(item) else sampled.get(item, not long)
        for item in items
    ]
    if config.getoption("--last-failed"):  # these few have been selected by the run before
        stays = [long or not is_long(item) for item in items]
    left_out = [item for item, stay in zip(items, stays) if not stay]
    if left_out:
        items[:] = [item for item, stay in zip(items, stays) if stay]
        config.hook.pytest_deselected(items=left_out)


def is_patient(item: pytest.Item) -> bool:
    """Whether a test may take so long that it is begun among the first."""
    mark = item.get_closest_marker("timeout")
    return mark is not None and mark.args[:1] == (600,)


def is_long(item: pytest.Item) -> bool:
    """Whether a test is left to `make test-slow`."""
    return bool(item.get_closest_marker("long") or item.get_closest_marker("soak"))


@pytest.fixture(scope="session")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory for machines: in memory, in this process' own mount namespace, if possible."""
    directory = tmp_path_factory.mktemp("disks")
    if os.geteuid() != 0 or not disk.own_mounts():
        yield directory
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8g", "none", str(directory)], check=True)
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=False)


@pytest.fixture(scope="session")
def power(disks: Path) -> bool:
    """Whether disks can lose unsynced data here. Otherwise a power loss only kills processes."""
    try:
        probe = disk.Disk(disks / "probe.img", disks / "probe")
        probe.lose_power()
        probe.close()
    except (OSError, subprocess.CalledProcessError) as error:
        warnings.warn(f"no unsynced data is lost with the power here: {error}", stacklevel=1)
        return False
    return True


@pytest.fixture
def make_world(
    request: pytest.FixtureRequest, disks: Path, power: bool, live: Workspace
) -> Iterator[Callable[..., World]]:
    """Make machines with a connected agent that run a first system: `make_world("darwin")`.

    `make_world.close()` closes them early, for a test that makes many, one after another.
    """
    worlds: list[World] = []
    directories: list[Path] = []

    def make(
        kind: str = "nixos", start: bool = True, workspace: Workspace = live, **more: Any
    ) -> World:
        directory = disks / uuid.uuid4().hex[:12]
        directory.mkdir()
        directories.append(directory)
        name = f"faults-{directory.name}"
        world = World(directory, workspace, name, kind, power=power, **more)
        worlds.append(world)
        prepare(world)
        if start:
            world.start()
            world.connected()
        return world

    def close() -> None:
        report = getattr(request.node, "report", None)
        for world in worlds:
            if report is not None and report.failed:
                show(world)
            world.close()
        for directory in directories:
            shutil.rmtree(directory, ignore_errors=True)
        worlds.clear()
        directories.clear()

    make.close = close  # type: ignore[attr-defined]
    yield make
    close()


def prepare(world: World) -> None:
    """Make the machine run a first system as if it always had."""
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
    """End a case: check the invariants, deploy once more, and check them again."""

    def finish(world: World, version: str = "next") -> None:
        world.heal()
        assert_invariants(world)
        deployment = scenes.deploy(world, version)
        assert world.ended(deployment) == "succeeded", world.workspace.deployment(deployment)
        assert_invariants(world)

    return finish


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Scripted]:
    """A workspace that sends what the test asks for: `make_world(workspace=scripted)`."""
    workspace = Scripted(tmp_path / "cache")
    yield workspace
    workspace.close()


@pytest.fixture
def held(make_world: Callable[..., World]) -> Callable[..., tuple[World, str]]:
    """Make a machine, and a deployment whose activation waits for `chains.go_on`.

    `held(workspace=scripted)` passes its arguments on to `make_world`.
    """

    def make(**more: Any) -> tuple[World, str]:
        world = make_world(**{"args": chains.PATIENT, **more})
        deployment = world.deploy(chains.system(world, chains.HOLD), scenes.script(world.files))
        wait_until(lambda: "test second" in world.story(), 30, "the activation")
        return world, deployment

    return make


def show(world: World) -> None:
    """Print what helps to understand a failed case."""
    print("problems:", *world.problems, *world.overlaps, sep="\n  ")
    print("\n".join(["visits:", *(f"  {visit}  -> {visit.order}" for visit in world.visits)]))
    if world.agents:
        print("agent:\n" + world.agent.text()[-6000:])
    for deployment, entry in world.journals().items():
        print(f"journal: {entry}")
        with contextlib.suppress(OSError, AssertionError):  # it may have ended, or know nothing
            print("log:\n" + world.workspace.text(deployment)[-3000:])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.when == "call":
        item.report = report  # type: ignore[attr-defined]
    return report
