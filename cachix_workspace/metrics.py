"""Metrics for Prometheus: agents by state, deployments, steps, requests, bytes, ends of tokens."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from flask import Flask, g, request
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import Connection, func, select
from werkzeug.wrappers import Response

from cachix_protocol import PENDING, TERMINAL, loads, utc_now
from cachix_workspace import cache, fleet, sentences, states, tokens
from cachix_workspace.context import KEY, Workspace
from cachix_workspace.files import Store
from cachix_workspace.stores import store_of
from cachix_workspace.tables import deployments

PREFIX = "cachix_workspace"
STEPS = (1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0)  # seconds
REQUESTS = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0)
BYTES_INTERVAL = 60.0  # seconds between two looks at the caches' files


class Requests:
    """How long requests took, by blueprint, method and status."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.seconds = Histogram(
            f"{PREFIX}_http_seconds",
            "Seconds until an answer's head, by part of the workspace",
            ["part", "method", "status"],
            buckets=REQUESTS,
            registry=self.registry,
        )

    def watch(self, app: Flask) -> None:
        """Measure the requests of an application."""
        app.before_request(self._begin)
        app.after_request(self._end)

    def _begin(self) -> None:
        g.began = time.monotonic()

    def _end(self, answer: Response) -> Response:
        began = g.pop("began", None)
        if began is not None:
            part, status = request.blueprint or "none", str(answer.status_code)
            self.note(part, request.method, status, began)
        return answer

    def note(self, part: str, method: str, status: str, began: float) -> None:
        """Count a request that began at a moment of the monotonic clock."""
        self.seconds.labels(part, method, status).observe(time.monotonic() - began)


class Facts(Collector):
    """The figures of the database, read when they are asked for."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    def collect(self) -> Iterable[Metric]:
        """All metrics but for requests."""
        with self.workspace.database.read() as connection:
            yield self._agents(connection)
            yield from self._deployments(connection)
            yield self._steps(connection)
            yield from self._tokens(connection)
            names = [row.name for row in cache.list_all(connection)]
        family = GaugeMetricFamily(f"{PREFIX}_cache_bytes", "Bytes of a cache", labels=["cache"])
        for name in names:
            family.add_metric([name], sizes.of(self.workspace, name))
        yield family

    def _agents(self, connection: Connection) -> Metric:
        lost_after = self.workspace.settings.lost_after
        briefs = fleet.brief_of_all(connection, self.workspace.signs, lost_after)
        counts = Counter(brief.state.key for brief in briefs)
        family = GaugeMetricFamily(f"{PREFIX}_agents", "Agents by state", labels=["state"])
        for state in states.AGENT_STATES:
            family.add_metric([state.key], counts[state.key])
        family.add_metric(["paused"], sum(brief.paused_on is not None for brief in briefs))
        return family

    def _deployments(self, connection: Connection) -> Iterator[Metric]:
        what = (deployments.c.status, deployments.c.outcome)
        query = select(*what, func.count()).group_by(*what)
        counts: Counter[str] = Counter()
        waiting = 0
        for status, outcome, count in connection.execute(query):
            waiting += count if status == PENDING else 0
            counts[states.of_deployment(status, outcome).key] += count
        family = GaugeMetricFamily(
            f"{PREFIX}_deployments", "Deployments that are kept, by outcome", labels=["state"]
        )
        for state in states.DEPLOYMENT_STATES:
            family.add_metric([state.key], counts[state.key])
        yield family
        yield GaugeMetricFamily(f"{PREFIX}_queue", "Deployments that wait", value=waiting)
        size = select(func.coalesce(func.sum(deployments.c.log_size), 0))
        total = float(connection.execute(size).scalar_one())
        yield GaugeMetricFamily(f"{PREFIX}_log_bytes", "Bytes of all logs", value=total)

    def _steps(self, connection: Connection) -> Metric:
        """How long steps took, of the newest deployments that have ended."""
        query = select(deployments.c.steps, deployments.c.finished_on)
        ended = query.where(deployments.c.status.in_(TERMINAL) & deployments.c.steps.is_not(None))
        rows = connection.execute(ended.order_by(deployments.c.created_on.desc()).limit(2000))
        durations: dict[str, list[float]] = defaultdict(list)
        for steps, finished_on in rows:
            marks = [*loads(steps), ["", finished_on]]
            for (step, start), (_, end) in zip(marks, marks[1:]):
                seconds = sentences.seconds_between(start, end)
                if seconds is not None:
                    durations[step].append(seconds)
        family = HistogramMetricFamily(
            f"{PREFIX}_step_seconds",
            "Seconds of each step, of the newest 2,000 deployments",
            labels=["step"],
        )
        for step, times in sorted(durations.items()):
            buckets = [(str(most), sum(time <= most for time in times)) for most in STEPS]
            family.add_metric([step], [*buckets, ("+Inf", len(times))], sum(times))
        return family

    def _tokens(self, connection: Connection) -> Iterator[Metric]:
        now, family = (
            utc_now(),
            GaugeMetricFamily(
                f"{PREFIX}_token_expires_seconds",
                "Seconds until a valid token expires, for those that do",
                labels=["id", "kind"],
            ),
        )
        for token in tokens.list_all(connection):
            if token.expires_on is not None and token.state(now) == "valid":
                family.add_metric([str(token.id), token.kind], tokens.days_left(token) * 86_400)
        yield family


class Sizes:
    """The bytes of caches, looked up now and then: a cache may have many files."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[Store, tuple[float, float]] = {}

    def of(self, workspace: Workspace, name: str) -> float:
        """The bytes of a cache's files."""
        store, now = store_of(workspace.settings, name), time.monotonic()
        with self._lock:
            at, size = self._found.get(store, (-BYTES_INTERVAL, 0.0))
        if now - at >= BYTES_INTERVAL:
            size = float(sum(entry.size for entry in store.all_entries()))
            with self._lock:
                self._found[store] = (now, size)
        return size


sizes = Sizes()


def text(app: Flask, requests: Requests) -> bytes:
    """All metrics as Prometheus reads them."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Facts(app.extensions[KEY]))
    return bytes(generate_latest(registry) + generate_latest(requests.registry))
