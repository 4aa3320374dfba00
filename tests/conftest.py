"""The fixtures of all tests. They live in the test's own temporary directory and end with it."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

import clusters
import pytest
from caches import Cache
from containers import Missing, root_tree
from hosts import Host
from live import Workspace
from machines import Machine
from peer import Peer

if TYPE_CHECKING:
    from management_support import Client
    from newcomer import Newcomer
    from pages_support import Browser
    from workspace_support import Server

pytest.register_assert_rewrite("invariants", "chains")  # so that their failures show the values
PROMISES = range(1, 16)
SLOW_FIXTURES = {"make_host", "disks", "reader", "tree", "python39"}  # need Nix, root, downloads
# start a server or a command for nearly every test
SLOW_FILES = re.compile(
    r"test_(dial|hostile|modules|webhooks|pages.*|browser.*|workspace_(?!command$|units$).*)"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of tests/faults, whose own conftest.py is loaded too late for that."""
    parser.addoption(
        "--faults", action="store_true", help="all cases of tests/faults, and a summary by promise"
    )
    parser.addoption(
        "--long", action="store_true", help="what `make test` leaves out: `make test-slow`"
    )
    parser.addoption(
        "--postgresql", action="store_true", help="workspaces have PostgreSQL, not SQLite"
    )
    parser.addoption(
        "--seconds", type=float, default=60.0, help="for how long to draw random schedules"
    )
    parser.addoption("--seed", type=int, help="seed of the first schedule (default: a random one)")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that `make quick` leaves out, before pytest selects by marker."""
    for item in items:
        needs = SLOW_FIXTURES.intersection(getattr(item, "fixturenames", ()))
        if item.config.getoption("--postgresql") and item.get_closest_marker("sqlite"):
            item.add_marker(pytest.mark.skip(reason="it is about the file of SQLite"))
        if needs or SLOW_FILES.fullmatch(item.path.stem):
            item.add_marker("slow")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the random schedules, and with --faults the number of cases of each promise."""
    stats = terminalreporter.stats
    for report in [report for reports in stats.values() for report in reports]:
        seeds = properties(report, "soak")
        if seeds and report.when == "call":
            terminalreporter.line(f"soak: {len(seeds)} schedules, seeds {seeds[0]} to {seeds[-1]}")
    if not config.getoption("--faults"):
        return
    passed = [report for report in stats.get("passed", []) if report.when == "call"]
    failed = stats.get("failed", []) + stats.get("error", [])
    terminalreporter.section("faults")
    for number in PROMISES:
        objects, broken = (
            sum(number in properties(report, "promise") for report in reports)
            for reports in (passed, failed)
        )
        terminalreporter.line(f"promise {number:2}: {objects:4} cases held, {broken} failed")
    skipped = len(stats.get("skipped", []))
    terminalreporter.line(
        f"{len(passed) + len(failed)} cases, {len(failed) or 'none'} failed, {skipped} skipped"
    )


def properties(report: object, name: str) -> list[Any]:
    """Return a test's properties of a name; none for warnings and for errors at collection."""
    return [value for key, value in getattr(report, "user_properties", ()) if key == name]


@pytest.fixture(scope="session", autouse=True)
def database(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --postgresql, a cluster in which each workspace has its database."""
    if not request.config.getoption("--postgresql"):
        yield
        return
    clusters.require()
    with clusters.in_use():
        yield


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Switch the garbage collector off: finalizers would fail at the bottom of a deep recursion."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def make_host(tmp_path: Path) -> Iterator[Callable[..., Host]]:
    """Make hosts by name: `make_host("second")`."""
    with contextlib.ExitStack() as stack:
        yield lambda name="host": stack.enter_context(Host(tmp_path / name))


@pytest.fixture
def host(make_host: Callable[..., Host]) -> Host:
    """A host, without an agent."""
    return make_host()


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    """A binary cache that can misbehave; add to it with the functions of `closures`."""
    cache = Cache(tmp_path / "cache")
    yield cache
    cache.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    """A workspace that follows the test's script."""
    with Peer() as peer:
        yield peer


@pytest.fixture(scope="session")
def tree() -> Path:
    """The root tree of all containers. Without it the tests are skipped, except in a CI."""
    try:
        return root_tree()
    except Missing as missing:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A real workspace with a public cache. All tests share it: use agent names from `name`."""
    workspace = Workspace(tmp_path_factory.mktemp("workspace"))
    try:
        workspace.serve()
        workspace.cache()
        yield workspace
    finally:
        workspace.kill()


@pytest.fixture
def make_workspace(tmp_path: Path) -> Iterator[Callable[..., Workspace]]:
    """Make workspaces for one test alone, which may stop them: `make_workspace(private=True)`."""
    workspaces: list[Workspace] = []

    def make(name: str = "workspace", private: bool = False) -> Workspace:
        workspace = Workspace(tmp_path / name)
        workspaces.append(workspace)
        workspace.serve()
        workspace.cache(private=private)
        return workspace

    yield make
    for workspace in workspaces:
        workspace.kill()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A real workspace's server that the tests of a module share: use agent names from `name`."""
    from workspace_support import running

    with running() as server:
        yield server


@pytest.fixture(scope="module")
def browser(server: Server) -> Browser:
    """An administrator of `server`, whose browser runs no script."""
    from pages_support import Browser

    return Browser(server)


@pytest.fixture(scope="module")
def admin(server: Server) -> Client:
    """A client of `server`'s management API with an admin token."""
    from management_support import Client

    return Client(server, server.token("admin"))


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """An agent's name that no other test has."""
    words = re.sub(r"[^0-9A-Za-z]+", "-", request.node.name).strip("-")
    return f"{words[:80]}-{uuid.uuid4().hex[:6]}"


@pytest.fixture
def make_machine(
    make_host: Callable[..., Host], live: Workspace, name: str
) -> Iterator[Callable[..., Machine]]:
    """Make machines with a connected agent: `make_machine("--on-unit-failure=tolerate")`.

    Each is checked when the test ends, unless it is made with `check=False`.
    """
    machines: list[tuple[Machine, bool]] = []

    def make(
        *args: str, workspace: Workspace = live, host: str = "host", check: bool = True, **kw: Any
    ) -> Machine:
        own_name = f"{name}-{len(machines)}" if machines else name
        machine = Machine(make_host(host), workspace, own_name, *args, **kw)
        machines.append((machine, check))
        return machine

    yield make
    for machine, check in machines:
        if check:
            machine.check()


@pytest.fixture
def machine(make_machine: Callable[..., Machine]) -> Machine:
    """A machine with a connected agent at the shared live workspace."""
    return make_machine()


@pytest.fixture
def newcomer(tmp_path: Path, host: Host) -> Iterator[Newcomer]:
    """A person with a browser before a workspace that nobody has signed in to."""
    from browser import browsing, need_browser
    from newcomer import Newcomer

    need_browser()
    workspace = Workspace(tmp_path / "workspace")
    workspace.serve()
    try:
        with browsing(tmp_path / "browser") as browser:
            yield Newcomer(workspace, browser, host)
    finally:
        workspace.kill()
