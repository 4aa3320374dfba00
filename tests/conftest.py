"""What tests ask for by name. All of it lives in the test's own temporary directory and ends with the test."""

from __future__ import annotations

import contextlib
import gc
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from caches import Cache
from hosts import Host
from live import Workspace
from machines import Machine
from peer import Peer

pytest.register_assert_rewrite("invariants", "chains")  # so that they say what was wrong


def pytest_addoption(parser: pytest.Parser) -> None:
    """For tests/faults, whose own conftest.py comes too late for that, and for the summary below."""
    parser.addoption(
        "--faults", action="store_true", help="all cases of tests/faults, and a summary by promise"
    )
    parser.addoption(
        "--seconds", type=float, default=60.0, help="for how long random schedules are drawn"
    )
    parser.addoption("--seed", type=int, help="the first schedule's, instead of a random one")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """How many cases were run, and how many of each promise; which random schedules."""
    reports = [
        report
        for found in terminalreporter.stats.values()
        for report in found
        if hasattr(report, "when")
    ]
    for report in reports:
        seeds = [seed for name, seed in getattr(report, "user_properties", []) if name == "soak"]
        if seeds and report.when == "call":
            terminalreporter.line(f"soak: {len(seeds)} schedules, seeds {seeds[0]} to {seeds[-1]}")
    if not config.getoption("--faults"):
        return
    ended = {
        name: terminalreporter.stats.get(name, [])
        for name in ("passed", "failed", "error", "skipped")
    }
    run = [report for report in ended["passed"] if report.when == "call"]
    bad = list(ended["failed"] + ended["error"])
    terminalreporter.section("faults")
    for number in range(1, 16):
        mine = [
            report for report in run if ("promise", number) in map(tuple, report.user_properties)
        ]
        broken = [
            report for report in bad if ("promise", number) in map(tuple, report.user_properties)
        ]
        terminalreporter.line(f"promise {number:2}: {len(mine):4} cases held, {len(broken)} failed")
    terminalreporter.line(
        f"{len(run) + len(bad)} cases, {len(bad) or 'none'} failed, {len(ended['skipped'])} skipped"
    )


@pytest.fixture
def no_collector() -> Iterator[None]:
    """For what nests too deep: finalizers of earlier tests' rubbish would fail at the bottom of that recursion."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def make_host(tmp_path: Path) -> Iterator[Callable[..., Host]]:
    """Hosts by name: `make_host("second")`."""
    with contextlib.ExitStack() as stack:
        yield lambda name="host": stack.enter_context(Host(tmp_path / name))


@pytest.fixture
def host(make_host: Callable[..., Host]) -> Host:
    """A host."""
    return make_host()


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    """A binary cache that can misbehave; add to it with the functions of `closures`."""
    made = Cache(tmp_path / "cache")
    yield made
    made.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    """A workspace that follows the test's script."""
    with Peer() as made:
        yield made


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A real workspace with a public cache, one for all tests: give agents names of their own (`name`)."""
    made = Workspace(tmp_path_factory.mktemp("workspace"))
    try:
        made.serve()
        made.cache()
        yield made
    finally:
        made.kill()


@pytest.fixture
def make_workspace(tmp_path: Path) -> Iterator[Callable[..., Workspace]]:
    """Workspaces for one test alone, which may stop them: `make_workspace(private=True)`."""
    made: list[Workspace] = []

    def make(name: str = "workspace", private: bool = False) -> Workspace:
        made.append(Workspace(tmp_path / name))
        made[-1].serve()
        made[-1].cache(private=private)
        return made[-1]

    yield make
    for workspace in made:
        workspace.kill()


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """An agent's name that no other test has."""
    return (
        re.sub(r"[^0-9A-Za-z]+", "-", request.node.name).strip("-")[:80]
        + "-"
        + uuid.uuid4().hex[:6]
    )


@pytest.fixture
def make_machine(
    make_host: Callable[..., Host], live: Workspace, name: str
) -> Iterator[Callable[..., Machine]]:
    """A machine with a connected agent: `make_machine("--on-unit-failure=tolerate")`; checked when the test ends."""
    made: list[Machine] = []
    checked: list[Machine] = []

    def make(
        *args: str, workspace: Workspace = live, host: str = "host", check: bool = True, **kw: Any
    ) -> Machine:
        own_name = f"{name}-{len(made)}" if made else name
        made.append(Machine(make_host(host), workspace, own_name, *args, **kw))
        checked.extend(made[-1:] if check else [])
        return made[-1]

    yield make
    for machine in checked:
        machine.check()


@pytest.fixture
def machine(make_machine: Callable[..., Machine]) -> Machine:
    """A machine with a connected agent at the shared live workspace."""
    return make_machine()
