"""`/healthz` and `/metrics`, and the dashboard that shows them."""

from __future__ import annotations

import json
import re

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families
from workspace_support import DEADLINE, OURS, ROOT, STORE_PATHS, Peer, Server, running


@pytest.fixture(scope="module")
def peer(server: Server) -> Peer:
    return Peer(server)


def get(server: Server, path: str, token: str = "") -> requests.Response:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return requests.get(server.url + path, headers=headers, timeout=DEADLINE)


def samples(server: Server, token: str) -> dict[tuple[str, str], float]:
    """The values, by name and by the values of all labels, sorted."""
    values = {}
    for family in text_string_to_metric_families(get(server, "/metrics", token).text):
        for sample in family.samples:
            values[sample.name, ",".join(sorted(sample.labels.values()))] = sample.value
    return values


def test_health_needs_no_token(server: Server) -> None:
    answer = get(server, "/healthz")
    assert (answer.status_code, answer.json()) == (200, {"ok": True})


@pytest.mark.sqlite
def test_a_workspace_without_its_database_is_not_well() -> None:
    with running() as server:
        assert get(server, "/healthz").status_code == 200
        for path in server.data.glob("workspace.db*"):
            with path.open("r+b") as file:  # not truncated: the server has a part in its memory
                file.write(
                    (b"no database" * (path.stat().st_size // 11 + 1))[: path.stat().st_size]
                )
        assert get(server, "/healthz").status_code == 503


def test_metrics_need_a_token_of_their_own_kind(server: Server, peer: Peer) -> None:
    assert get(server, "/metrics").status_code == 401
    assert get(server, "/metrics", peer.ci_token).status_code == 403
    token = server.command("token", "create", "metrics").strip()
    assert get(server, "/metrics", token).status_code == 200
    assert get(server, "/api/v1/agents", token).status_code == 403
    assert get(server, "/api/v1/deploy/deployments", token).status_code == 403
    server.command("cache", "create", "private", "--private")
    assert get(server, f"/cache/private/{'a' * 32}.narinfo", token).status_code == 403


def test_metrics_count_what_there_is(server: Server, peer: Peer) -> None:
    token = server.new_token("metrics", days=2)[1]
    peer.registered("web", **OURS)
    peer.registered("db", **OURS)
    failed = peer.activate({"web": STORE_PATHS[0]})["web"]
    peer.report("web", failed, "InProgress", step="received", time="2026-01-01T00:00:00Z")
    peer.log("web", failed, 0, ["a line"])
    peer.report("web", failed, "Failed", outcome="nothing-changed", time="2026-01-01T00:00:05Z")
    peer.activate({"db": STORE_PATHS[0]})
    result = samples(server, token)
    assert result["cachix_workspace_agents", "failed"] == 1
    assert result["cachix_workspace_deployments", "nothing-changed"] == 1
    assert result["cachix_workspace_queue", ""] == 1
    assert result["cachix_workspace_log_bytes", ""] > 10
    assert result["cachix_workspace_step_seconds_bucket", "3.0,received"] == 0
    assert result["cachix_workspace_step_seconds_bucket", "10.0,received"] == 1
    left = [value for (name, _), value in result.items() if name.endswith("expires_seconds")]
    assert any(100_000 < value < 200_000 for value in left)
    assert any(name == "cachix_workspace_http_seconds_count" for name, _ in result)


def test_the_dashboard_shows_what_there_is(server: Server, peer: Peer) -> None:
    server.command("cache", "create", "public")
    peer.registered("shown", **OURS)
    deployment = peer.activate({"shown": STORE_PATHS[0]})["shown"]
    for status, step in (("InProgress", "received"), ("Succeeded", "succeeded")):
        peer.report("shown", deployment, status, step=step, time="2026-01-01T00:00:00Z")
    get(server, "/healthz")
    names = {name for name, _ in samples(server, server.new_token("metrics", days=1)[1])}
    board = json.loads((ROOT / "contrib" / "grafana-dashboard.json").read_text())
    facts = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"cachix_workspace_\w+", target["expr"])
    }
    assert len(facts) >= 8 and facts <= names
