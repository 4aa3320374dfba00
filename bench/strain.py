"""A strained workspace: logs that 500 viewers follow, and peers that drip or take their time.

The writers and the viewers have processes of their own, as have those that drip. Meanwhile narinfos
and the status of a deployment are asked for by this one.
"""

from __future__ import annotations

import os
import resource
import time

import requests
from _figures import figure, say
from fleet import PATH, Child, Usage, child, p99, serving, worker_of
from workspace_support import Server

from cachix_protocol import base32

SECONDS = float(os.environ.get("STRAIN", "15"))
DEPLOYMENTS, VIEWERS, LINES = 200, 500, 110  # lines of a deployment in a second
GOAL = 20_000  # lines a second, of the 22,000 that are sent
NAR = f"nar/{'b' * 52}.nar"
INFO = f"{base32(bytes(20))}.narinfo"
DRIPPING, DOWNLOADS, UPLOADS = 4000, 500, 50


def logs(server: Server, agent: str, ci: str) -> None:
    """Lines that are written, and seen."""
    with child("_crowd.py") as agents, child("_strain.py") as writers, child("_crowd.py") as crowd:
        place = {"port": server.port, "token": agent, "paths": ["/ws"]}
        agents.do(do="add", first=0, count=DEPLOYMENTS, **place)
        agents.until(DEPLOYMENTS)
        spec = {"agents": {f"agent-{number}": PATH for number in range(DEPLOYMENTS)}}
        bearer = {"Authorization": f"Bearer {ci}"}
        url = f"{server.url}/api/v2/deploy/activate"
        ordered = requests.post(url, json=spec, headers=bearer, timeout=60).json()["agents"]
        ids = [ordered[f"agent-{number}"]["id"] for number in range(DEPLOYMENTS)]
        paths = [f"/api/v1/deploy/log/{each}?view=true" for each in ids]
        crowd.do(do="lag", keep=True)
        crowd.do(do="add", first=0, count=VIEWERS, port=server.port, token=ci, paths=paths)
        work = {"kind": "log", "deployments": ids, "lines": LINES, "token": agent}
        writers.do(do="add", count=DEPLOYMENTS, port=server.port, **work)
        time.sleep(3)
        crowd.do(do="forget")
        begin, before = time.monotonic(), writers.do(do="state")
        time.sleep(SECONDS)
        after, seen = writers.do(do="state"), crowd.do(do="state", count=VIEWERS)
        took = time.monotonic() - begin
        taken = (after["answers"] - before["answers"]) * LINES / took
        figure("log lines taken", taken, "a second", GOAL, at_least=True)
        say(f"lines sent to {seen['open']} viewers: {seen['texts'] / took:.0f} a second")
        figure("from the writing of a line to a viewer, p99", p99(seen["lag"]), "s", 2)


def latency(server: Server, ci: str, deployment: str) -> tuple[float, float, int]:
    """p99 of narinfos and of status calls, in ms, and how many were asked for."""
    infos, states = [], []
    session, end = requests.Session(), time.monotonic() + SECONDS
    bearer = {"Authorization": f"Bearer {ci}"}
    while time.monotonic() < end:
        for url, values, headers in (
            (f"{server.url}/cache/main/{INFO}", infos, {}),
            (f"{server.url}/api/v1/deploy/deployment/{deployment}", states, bearer),
        ):
            begin = time.monotonic()
            answer = session.get(url, headers=headers, timeout=60)
            values.append((time.monotonic() - begin) * 1000)
            assert answer.status_code == 200, answer.text[:300]
        time.sleep(0.01)
    return p99(infos), p99(states), len(infos) + len(states)


def slow_peers(server: Server, agent: str, ci: str) -> None:
    """Peers that drip, or take their time."""
    server.command("cache", "create", "main")
    files = server.data / "cache" / "main"
    (files / "nar").mkdir(parents=True, exist_ok=True)
    (files / NAR).write_bytes(bytes(64 << 20))
    (files / INFO).write_text("StorePath: /nix/store/x\n")
    with child("_crowd.py") as agents, child("_strain.py") as strain:
        agents.do(do="add", first=0, count=1, port=server.port, token=agent, paths=["/ws"])
        agents.until(1)
        url, bearer = f"{server.url}/api/v2/deploy/activate", {"Authorization": f"Bearer {ci}"}
        spec = {"agents": {"agent-0": PATH}}
        answer = requests.post(url, json=spec, headers=bearer, timeout=60)
        deployment = answer.json()["agents"]["agent-0"]["id"]
        say_latency("at rest", latency(server, ci, deployment))
        burden(strain, server, ci)
        time.sleep(5)
        infos, states, count = latency(server, ci, deployment)
        state = strain.do(do="state")
        say_latency(f"beside {state['held']} slow peers", (infos, states, count))
        usage = Usage.of(worker_of(server))
        say(f"threads {usage.threads}, {usage.memory:.0f} MiB, hung up on {state['reconnected']}")
        figure("narinfos beside slow peers, p99", infos, "ms", 100)
        figure("status calls beside slow peers, p99", states, "ms", 100)


def burden(strain: Child, server: Server, ci: str) -> None:
    """Let all slow peers come."""
    port, nar = server.port, f"/cache/main/{NAR}"
    order = "/api/v2/deploy/activate"
    strain.do(do="add", kind="head", count=DRIPPING // 3, port=port)
    strain.do(do="add", kind="body", count=DRIPPING // 3, port=port, path=order)
    strain.do(do="add", kind="download", count=DRIPPING // 3, port=port, rate=10)
    strain.do(do="add", kind="download", count=DOWNLOADS, port=port, path=nar, rate=50_000)
    strain.do(do="add", kind="upload", count=UPLOADS, port=port, path="/cache/main/nar", token=ci)


def say_latency(when: str, values: tuple[float, float, int]) -> None:
    infos, states, count = values
    say(f"{when}: narinfos p99 {infos:.0f} ms, status calls {states:.0f} ms ({count} requests)")


def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for work in (logs, slow_peers):
        with serving(5000) as server:
            work(server, server.token("agent"), server.token("activate"))


if __name__ == "__main__":
    main()
