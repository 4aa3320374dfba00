"""What a database does for agents: one statement or transaction of each kind, SQLite's beside
PostgreSQL's, and news between two nodes. docs/scale.rst calculates with these figures.

Both sync each commit to the same disk. Transactions of PostgreSQL also run in eight threads, as
those of several nodes do; SQLite has one writer.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import clusters
from _figures import directory, say

from cachix_protocol import IN_PROGRESS, Spec, dumps
from cachix_workspace import agents, claims, deployments, logs, nodes, orders
from cachix_workspace.agents import Arrived
from cachix_workspace.database import Database, Lock, open_database
from cachix_workspace.notify import DUE, PostgreSQL
from cachix_workspace.orders import Actor
from cachix_workspace.reports import Report
from cachix_workspace.settings import Settings

AGENTS, THREADS, SECONDS = 1000, 8, 2.0
NAMES = [f"agent-{number:04}" for number in range(AGENTS)]
PATH = "/nix/store/" + 32 * "a" + "-system"
TIME = "2026-11-24T01:02:03.000004Z"
NEWS = 300  # of which the delay is measured
MANY = 20_000  # ids that are told at once


class Side:
    """A database with agents, of which each has a deployment."""

    def __init__(self, name: str, database: Database) -> None:
        self.name, self.database = name, database
        with database.write() as connection:
            for name in NAMES:
                agents.register(connection, name, "x86_64-linux", "1", "1", place=("node", 1))
        self.ids = self.read(lambda connection: [row.id for row in agents.list_all(connection)])
        self.rows: list[deployments.DeploymentRow] = []
        self.numbers = list(range(2, AGENTS + 2))

    def read(self, function: Callable[[Any], Any]) -> Any:
        with self.database.read() as connection:
            return function(connection)

    def write(self, function: Callable[[Any], Any], lock: Lock = Lock.ROWS) -> Any:
        with self.database.write(lock) as connection:
            return function(connection)

    def arrive(self) -> None:
        here = {id: Arrived(number, TIME) for id, number in zip(self.ids, self.numbers)}
        self.write(lambda connection: agents.mark_here(connection, "node", here))

    def order(self) -> None:
        spec = Spec.from_json({"agents": dict.fromkeys(NAMES, PATH)})
        made = self.write(lambda c: orders.order(c, spec, Actor("bench")), Lock.SHARED)
        self.rows = list(made.rows.values())

    def claim(self) -> None:
        claimed = self.write(lambda c: claims.claim(c, "node", self.numbers, self.rows))
        assert len(claimed) == AGENTS

    def report(self, number: int) -> None:
        step = ("received", "downloading", "ready", "activating")[number // AGENTS % 4]
        row = self.rows[number % AGENTS]
        report = Report.from_json({"status": IN_PROGRESS, "time": TIME, "step": step})

        def apply(connection: Any) -> None:
            own = deployments.find_own(connection, NAMES[number % AGENTS], row.id)
            deployments.apply_report(connection, own, report)

        self.write(apply)

    def log(self, number: int) -> None:
        lines = [dumps({"line": f"a line of a log {n}", "time": TIME}) for n in range(10)]
        row = self.rows[number % AGENTS]

        def append(connection: Any) -> None:
            own = deployments.find_own(connection, NAMES[number % AGENTS], row.id)
            logs.append(connection, own, None, lines)

        self.write(append)


def seconds(function: Callable[[], Any]) -> float:
    """The median of five runs."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def rate(function: Callable[[int], None], threads: int) -> float:
    """How often a second some threads call a function, with numbers of their own."""
    counts, end = [0] * threads, time.monotonic() + SECONDS

    def run(place: int) -> None:
        while time.monotonic() < end:
            function(place * (AGENTS // threads) + counts[place])
            counts[place] += 1

    workers = [threading.Thread(target=run, args=(place,)) for place in range(threads)]
    begin = time.monotonic()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.monotonic() - begin)


def show(name: str, unit: str, sqlite: float, postgresql: float) -> None:
    ratio = postgresql / sqlite
    say(
        f"{name}: SQLite {sqlite:.1f} {unit}, PostgreSQL {postgresql:.1f} {unit}, ratio {ratio:.2f}"
    )


def compare(one: Side, other: Side) -> None:
    per_agent = 1e6 / AGENTS
    for name, what in (
        ("arrivals of 1,000 agents, each", Side.arrive),
        ("an order for 1,000 agents, each", Side.order),
        ("claims of 1,000 deployments, each", Side.claim),
    ):
        times = [seconds(lambda side=side, what=what: what(side)) for side in (one, other)]
        show(name, "µs", *(per_agent * each for each in times))
    for name, what_for in (("reports", Side.report), ("appends of 10 lines", Side.log)):
        rates = [
            rate(lambda number, side=side, what=what_for: what(side, number), 1)
            for side in (one, other)
        ]
        show(f"{name}, one after the other", "a second", *rates)
        many = rate(lambda number, what=what_for: what(other, number), THREADS)
        say(f"{name} of PostgreSQL in {THREADS} threads: {many:.0f} a second")
    look = [
        seconds(
            lambda side=side: side.read(
                lambda c: (agents.with_orders(c, "node"), agents.moved(c, "node", side.ids))
            )
        )
        for side in (one, other)
    ]
    show("a look for lost news, 1,000 agents", "ms", *(1e3 * each for each in look))


def news(database: Database) -> None:
    """How late another node hears, and how many ids a second."""
    heard, moments = threading.Semaphore(0), dict[str, float]()

    def hear(kind: str, ids: tuple[str, ...]) -> None:
        now = time.perf_counter()
        for each in ids:
            moments[each] = now
            heard.release()

    one, other = (PostgreSQL(database.connect_apart, name) for name in ("one", "other"))
    one.start(lambda kind, ids: None, lambda _: None)
    other.start(hear, lambda _: None)
    assert one.is_connected.wait(10) and other.is_connected.wait(10)
    delays = []
    for number in range(NEWS):
        begin = time.perf_counter()
        one.publish(DUE, [f"single-{number}"])
        assert heard.acquire(timeout=10)
        delays.append(1e3 * (moments[f"single-{number}"] - begin))
        time.sleep(0.005)
    cuts = statistics.quantiles(delays, n=100)
    say(f"news reach another node after {cuts[49]:.1f} ms (median), {cuts[98]:.1f} ms (p99)")
    begin = time.perf_counter()
    one.publish(DUE, [f"{number:036}" for number in range(MANY)])
    for _ in range(MANY):
        assert heard.acquire(timeout=30)
    say(f"{MANY / (time.perf_counter() - begin):.0f} ids a second reach another node")
    one.close()
    other.close()


@contextlib.contextmanager
def sides(place: Path) -> Iterator[tuple[Side, Side]]:
    """Both databases."""
    cluster = clusters.Cluster("max_connections=50")
    sqlite = open_database(Settings(place / "data"), create=True)
    settings = Settings(place / "other", database=cluster.create())
    postgresql = open_database(settings, create=True)
    try:
        yield Side("SQLite", sqlite), Side("PostgreSQL", postgresql)
    finally:
        sqlite.close()
        postgresql.close()
        cluster.remove()


def beats(database: Database) -> None:
    """What it costs that a node says that it lives."""
    settings = Settings(Path("x"), has_shared_directory=True)
    with database.write() as connection:
        start = nodes.enter(connection, settings, "node")

    def beat() -> None:
        with database.write(Lock.ROWS) as connection:
            nodes.beat(connection, settings, "node", start)
            nodes.bury(connection, settings)

    say(f"a node's word that it lives: {1e3 * seconds(beat):.1f} ms")


def main() -> None:
    if clusters.programs() is None:
        say("PostgreSQL is missing: `make .make/postgresql` installs it")
        return
    with directory() as place, sides(place) as (one, other):
        compare(one, other)
        beats(other.database)
        news(other.database)


if __name__ == "__main__":
    main()
