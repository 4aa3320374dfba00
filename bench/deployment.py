"""Deployment of a tiny path that the store has: our agent against the two Nix commands that do the same by hand."""

from __future__ import annotations

import http.client
import json
import statistics
import subprocess
import time
from pathlib import Path

from _figures import Light, directory, figure, say, spread
from caches import Cache
from closures import plain
from hosts import Host, Program
from live import TERMINAL, Workspace

ROUNDS, WARM_UPS = 21, 3
TARGET = 30.0  # ms more than the commands alone; Cachix's own agent takes 38
STEPS = ("received", "downloading", "ready", "activating", "checking", "committing", "succeeded")
PROFILES = "/nix/var/nix/profiles"


class Shell:
    """A shell that stays open in a host, so that only the commands it is given count."""

    def __init__(self, host: Host) -> None:
        script = 'while read -r line; do eval "$line" >/dev/null 2>&1; echo $?; done'
        self.process = host.popen(
            ["/bin/sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def time(self, line: str) -> float:
        """Seconds that a command line takes, which must succeed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        begin = time.monotonic()
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        status = self.process.stdout.readline()
        took = time.monotonic() - begin
        assert status == b"0\n", f"{line} ended with status {status!r}"
        return took


class Real:
    """Deployments by way of our own workspace."""

    def __init__(self, workspace: Workspace, agent: str) -> None:
        self.workspace, self.agent = workspace, agent
        self.connection = http.client.HTTPConnection(
            workspace.url.removeprefix("http://"), timeout=30
        )
        self.headers = {
            "Authorization": f"Bearer {workspace.token('activate')}",
            "Content-Type": "application/json",
        }

    def call(self, method: str, path: str, body: object = None) -> dict[str, object]:
        self.connection.request(
            method, path, None if body is None else json.dumps(body), self.headers
        )
        return dict(json.loads(self.connection.getresponse().read()))

    def time(self, path: str) -> float:
        """Seconds from POST activate to a final status, asked for every 5 ms."""
        begin = time.monotonic()
        answer: dict[str, dict[str, dict[str, str]]] = self.call(  # type: ignore[assignment]
            "POST", "/api/v2/deploy/activate", {"agents": {self.agent: path}}
        )
        place = f"/api/v1/deploy/deployment/{answer['agents'][self.agent]['id']}"
        while self.call("GET", place)["status"] not in TERMINAL:
            assert time.monotonic() < begin + 60, f"{place} does not end"
            time.sleep(0.005)
        return time.monotonic() - begin


def steps(host: Host, deployment_id: str, calls: list[tuple[float, str]]) -> dict[str, float]:
    """Milliseconds after the deployment was received at which each step came, and after the frame for each request."""
    times: dict[str, float] = host.journal(deployment_id)["times"]
    known = {name: 1000 * (times[name] - times["received"]) for name in STEPS if name in times}
    for moment, what in calls:
        number = 1 + sum(name.startswith(f"{what} #") for name in known)
        known[f"{what} #{number}"] = 1000 * moment
    return known


def main() -> None:
    with directory() as place, Host(place / "host") as host, Light() as light:
        cache = Cache(place / "cache")
        light.cache = cache.wire()
        paths = [plain(cache, version) for version in (1, 2)]
        host.fetch(cache.url, cache.key.public, *paths)
        for link, path in enumerate(paths):  # that the store keeps them
            host.output(
                "nix-store", "--realise", path, "--add-root", f"/nix/var/kept-{link}", "--indirect"
            )
        agents = [host.agent("light", light.url, "bench", "ours")]
        agents[0].wait_for("is connected to")
        workspace = serve(place / "workspace", cache)
        agents.append(host.agent("real", workspace.url, workspace.token("agent"), "real"))
        agents[1].wait_for("is connected to")
        try:
            measure(host, light, Real(workspace, "real"), paths)
        except AssertionError:
            say("\n".join(agent.text() for agent in agents))
            raise
        finally:
            end(agents, workspace)
            cache.close()


def serve(place: Path, cache: Cache) -> Workspace:
    """Our own workspace."""
    place.mkdir()
    workspace = Workspace(place)
    workspace.serve()
    workspace.cache()
    return workspace


def end(agents: list[Program], workspace: Workspace) -> None:
    for agent in agents:
        agent.stop()
    workspace.stop()


def measure(host: Host, light: Light, real: Real, paths: list[str]) -> None:
    shell = Shell(host)
    raw: list[float] = []
    ours: list[float] = []
    whole: list[float] = []
    when: list[dict[str, float]] = []
    for number in range(WARM_UPS + ROUNDS):
        path = paths[number % 2]  # another than before, so that each makes a generation
        took_raw = shell.time(f"nix-store -r {path} && nix-env -p {PROFILES}/raw --set {path}")
        deployment_id, took, calls = light.time(path)
        time.sleep(0.1)  # its switch process ends
        took_whole = real.time(path)
        time.sleep(0.1)
        if number >= WARM_UPS:
            raw.append(1000 * took_raw)
            ours.append(1000 * took)
            whole.append(1000 * took_whole)
            when.append(steps(host, deployment_id, calls))
    say(
        f"deployment of a present tiny path, ms, median (quartiles) of {ROUNDS} rounds, taken in turns"
    )
    say(f"  raw `nix-store -r PATH && nix-env -p P --set PATH`: {spread(raw)}")
    say(f"  ours, from the Deployment frame to the final report: {spread(ours)}")
    say(f"  ours with our own workspace, from POST activate to the final status: {spread(whole)}")
    middle = statistics.median(raw)
    figure("  ours", statistics.median(ours), "ms", middle + TARGET)
    figure("  ours minus raw", statistics.median(o - r for o, r in zip(ours, raw)), "ms", TARGET)
    say("  where the time goes, ms:")
    known = list(dict.fromkeys(name for one in when for name in one))
    medians = {name: statistics.median(one[name] for one in when if name in one) for name in known}
    said = [f"{name} {medians[name]:.0f}" for name in STEPS if name in medians]
    say("    steps, after `received`: " + ", ".join(said))
    requests = sorted((value, name) for name, value in medians.items() if "#" in name)
    said = [
        f"{name} {value:.0f} ({sum(name in one for one in when)} times)" for value, name in requests
    ]
    say("    requests, after the frame: " + ", ".join(said))


if __name__ == "__main__":
    main()
