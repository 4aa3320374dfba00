"""Deployment of a tiny path that is in the store: our agent against the two Nix commands for it.

The agent runs as it is installed here, so with the system's Python, and as dist/cachix-deploy.pyz.
"""

from __future__ import annotations

import http.client
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from _figures import Light, directory, figure, say, spread
from _programs import PYZ, ways
from caches import Cache
from closures import plain
from hosts import PROJECT, Host, Program
from live import TERMINAL, Workspace

from activate import files

ROUNDS, WARM_UPS = 21, 3
TARGET, WHOLE_TARGET = 20.0, 30.0  # ms more than the commands alone; Cachix's own agent takes 26
STEPS = ("received", "downloading", "ready", "activating", "checking", "committing", "succeeded")
STEPS_OF_SWITCH = "from activate.switch import steps"  # imports the rest
PROFILES = "/nix/var/nix/profiles"


class Shell:
    """A shell that stays open in a host, so that only its commands count."""

    def __init__(self, host: Host) -> None:
        script = 'while read -r line; do eval "$line" >/dev/null 2>&1; echo $?; done'
        self.process = host.popen(
            ["/bin/sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def time(self, line: str) -> float:
        """Run a command line, which must succeed; return how many seconds it took."""
        assert self.process.stdin is not None and self.process.stdout is not None
        start = time.monotonic()
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        status = self.process.stdout.readline()
        seconds = time.monotonic() - start
        assert status == b"0\n", f"{line} ended with status {status!r}"
        return seconds

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(10)


class Real:
    """Deployments by our own workspace."""

    def __init__(self, workspace: Workspace, agent: str) -> None:
        self.workspace, self.agent = workspace, agent
        address = workspace.url.removeprefix("http://")
        self.connection = http.client.HTTPConnection(address, timeout=30)
        self.headers = {
            "Authorization": f"Bearer {workspace.token('activate')}",
            "Content-Type": "application/json",
        }

    def call(self, method: str, path: str, body: object = None) -> dict[str, object]:
        text = None if body is None else json.dumps(body)
        self.connection.request(method, path, text, self.headers)
        return dict(json.loads(self.connection.getresponse().read()))

    def time(self, path: str) -> float:
        """Deploy a path; return the seconds until a final status, which is read every 10 ms."""
        start = time.monotonic()
        answer: dict[str, dict[str, dict[str, str]]] = self.call(  # type: ignore[assignment]
            "POST", "/api/v2/deploy/activate", {"agents": {self.agent: path}}
        )
        place = f"/api/v1/deploy/deployment/{answer['agents'][self.agent]['id']}"
        while (now := self.call("GET", place))["status"] not in TERMINAL:
            assert time.monotonic() < start + 60, f"{place} does not end"
            time.sleep(0.01)
        seconds = time.monotonic() - start
        assert now["status"] == "Succeeded", now
        return seconds


def moments(host: Host, deployment_id: str, calls: list[tuple[float, str]]) -> dict[str, float]:
    """Return when each step and each request came, in milliseconds.

    Steps count from `received` on, requests from the Deployment frame on.
    """
    times: dict[str, float] = host.journal(deployment_id)["times"]
    result = {name: 1000 * (times[name] - times["received"]) for name in STEPS if name in times}
    for moment, call in calls:
        number = 1 + sum(name.startswith(f"{call} #") for name in result)
        result[f"{call} #{number}"] = 1000 * moment
    return result


def main() -> None:
    with directory() as place, Host(place / "host") as host:
        workspace = serve(place / "workspace")
        cache = Cache(place / "cache", workspace.files.key)  # which the agents trust
        paths = [plain(cache, version) for version in (1, 2)]
        host.fetch(cache.url, cache.key.public, *paths)
        for number, path in enumerate(paths):
            root = ["--add-root", f"/nix/var/kept-{number}", "--indirect"]
            host.output("nix-store", "--realise", path, *root)
        try:
            for number, (way, words) in enumerate(ways(place / "venv").items()):
                compare(host, cache, workspace, way, f"{number}", words, paths)
        finally:
            workspace.stop()
            cache.close()


def serve(place: Path) -> Workspace:
    """Start our own workspace."""
    place.mkdir()
    workspace = Workspace(place)
    workspace.serve()
    workspace.cache()
    return workspace


def compare(
    host: Host,
    cache: Cache,
    workspace: Workspace,
    way: str,
    name: str,
    words: list[str],
    paths: list[str],
) -> None:
    """Run two agents in a way, one for each kind of workspace, and measure them."""
    with Light() as light:
        light.cache = cache.wire()
        agents = [
            start(host, [*words, f"--host={url}", "agent", f"{kind}-{name}"], token)
            for kind, url, token in (
                ("light", light.url, "bench"),
                ("real", workspace.url, workspace.token("agent")),
            )
        ]
        try:
            missed = measure(host, way, light, Real(workspace, f"real-{name}"), paths)
            if missed:
                say_why(host, words)
        except AssertionError:
            say("\n".join(agent.text() for agent in agents))
            raise
        finally:
            for agent in agents:
                agent.stop()


def start(host: Host, argv: list[str], token: str) -> Program:
    """Start an agent, and wait until it is registered."""
    agent = host.start(f"agent-{argv[-1]}", argv, {"CACHIX_AGENT_TOKEN": token})
    agent.wait_for("is connected to")
    return agent


def measure(host: Host, way: str, light: Light, real: Real, paths: list[str]) -> bool:
    """Time the commands, and both agents, in turns; print their figures. Whether one is missed."""
    shell = Shell(host)
    raw: list[float] = []
    ours: list[float] = []
    whole: list[float] = []
    when: list[dict[str, float]] = []
    for number in range(WARM_UPS + ROUNDS):
        path = paths[number % 2]  # never the one before, so that each makes a generation
        raw_time = shell.time(f"nix-store -r {path} && nix-env -p {PROFILES}/raw --set {path}")
        deployment_id, our_time, calls = light.time(path)
        time.sleep(0.1)  # its switch process ends
        whole_time = real.time(path)
        time.sleep(0.1)
        if number >= WARM_UPS:
            raw.append(1000 * raw_time)
            ours.append(1000 * our_time)
            whole.append(1000 * whole_time)
            when.append(moments(host, deployment_id, calls))
    shell.close()
    say(f"deployment of a tiny path in the store, {way}, ms, median (quartiles) of {ROUNDS} rounds")
    say(f"  raw `nix-store -r PATH && nix-env -p P --set PATH`: {spread(raw)}")
    say(f"  ours, from the Deployment frame to the final report: {spread(ours)}")
    say(f"  ours with our own workspace, from POST activate to the final status: {spread(whole)}")
    are_met = []
    for what, times, target in (("frame", ours, TARGET), ("POST", whole, WHOLE_TARGET)):
        more = statistics.median(time - base for time, base in zip(times, raw))
        are_met.append(figure(f"  {way}, from the {what} on, minus raw", more, "ms", target))
    say_where_the_time_goes(when)
    return not all(are_met)


def say_why(host: Host, words: list[str]) -> None:
    """Print what the switch process costs by itself, and what the disk does, in this way."""
    library = str(PYZ if str(PYZ) in words else PROJECT)
    code = f"import gc, sys; gc.disable(); sys.path.insert(0, {library!r})"
    code += "; import cachix_switch; from activate import startup; startup.protect()"
    starts = [
        ("Python alone {:.0f}", [words[0], "-I", "-S", "-c", "pass"]),
        ("with its imports {:.0f}", [words[0], "-I", "-S", "-c", f"{code}; {STEPS_OF_SWITCH}"]),
    ]
    texts = []
    for text, argv in starts:
        times = [clocked(subprocess.run, argv) for _ in range(ROUNDS)]
        texts.append(text.format(statistics.median(times)))
    place = str(host.directory)
    probe = (f"{place}/probe", b"x" * 1000)
    write = statistics.median(clocked(files.write_durably, *probe) for _ in range(ROUNDS))
    sync = statistics.median(clocked(files.sync, [place]) for _ in range(ROUNDS))
    say(
        f"    missed because of: the start of the switch process, beside nix-store: "
        f"{', '.join(texts)} ms; {len(STEPS)} writes of the journal: {len(STEPS) * write:.0f} ms; "
        f"2 syncs of the file system: {2 * sync:.0f} ms"
    )


def clocked(call: Callable[..., object], *arguments: object) -> float:
    """Return how many milliseconds a call takes."""
    start = time.monotonic()
    call(*arguments)
    return 1000 * (time.monotonic() - start)


def say_where_the_time_goes(rounds: list[dict[str, float]]) -> None:
    """Print the median of each step and each request over all rounds that have it."""
    values: dict[str, list[float]] = {}
    for moments_of_round in rounds:
        for name, moment in moments_of_round.items():
            values.setdefault(name, []).append(moment)
    medians = {name: statistics.median(moments) for name, moments in values.items()}
    say("  where the time goes, ms:")
    steps = [f"{name} {medians[name]:.0f}" for name in STEPS if name in medians]
    say("    steps, after `received`: " + ", ".join(steps))
    requests = sorted((moment, name) for name, moment in medians.items() if "#" in name)
    texts = [f"{name} {moment:.0f} ({len(values[name])} times)" for moment, name in requests]
    say("    requests, after the frame: " + ", ".join(texts))


if __name__ == "__main__":
    main()
