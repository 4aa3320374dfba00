"""Steps and outcomes of deployments, requests to cancel, and what the API says of them."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from workspace_support import OURS, ROOT, STORE_PATHS, Peer, running, wait_for

from activate import journal, outcomes
from cachix_workspace import reports
from cachix_workspace.reports import Report

RUNNING, SUCCEEDED, FAILED, CANCELLED = "InProgress", "Succeeded", "Failed", "Cancelled"
DOCS = (ROOT / "docs" / "protocol.rst").read_text()
CACHIX_FIELDS = {
    *("id", "index", "createdOn", "startedOn", "finishedOn"),
    *("storePath", "closureSize", "status"),
}


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with running() as server:
        yield Peer(server)


def order(peer: Peer, name: str, path: int = 0) -> str:
    return peer.activate({name: STORE_PATHS[path]})[name]


def cancel(peer: Peer, deployment: str) -> tuple[int, dict[str, object]]:
    answer = peer.http("POST", f"/api/v1/deploy/deployment/{deployment}/cancel")
    return answer.status_code, answer.json()


# --- steps and outcomes ---------------------------------------------------------------------------


def test_the_words_are_those_of_the_agent_and_of_the_document() -> None:
    assert set(reports.STEPS) == journal.STEPS
    assert set(reports.UNTOUCHED_STEPS) == journal.HARMLESS
    assert set(reports.OUTCOMES) == outcomes.ALL
    for word in (*reports.STEPS, *reports.OUTCOMES):
        assert f"``{word}``" in DOCS, word


def test_the_document_has_every_field_that_is_added(peer: Peer, name: str) -> None:
    peer.registered(name)
    facts = set(peer.status(order(peer, name)))
    section = DOCS.partition("For those who wait")[2].partition("Cancelling")[0]
    assert set(re.findall(r"^``(\w+)``  ", section, re.M)) == facts - CACHIX_FIELDS
    assert facts > CACHIX_FIELDS


@pytest.mark.parametrize("outcome", reports.OUTCOMES)
def test_an_outcome_is_kept(peer: Peer, name: str, outcome: str) -> None:
    agent = peer.registered(name, **OURS)
    deployment = order(peer, name)
    agent.expect_text()
    assert peer.report(name, deployment, RUNNING, step="checking").json()["step"] == "checking"
    status = SUCCEEDED if outcome in ("succeeded", "reboot-needed") else FAILED
    peer.report(name, deployment, status, step="rolled-back", outcome=outcome, reason="why")
    facts = peer.status(deployment)
    assert (facts["status"], facts["outcome"], facts["reason"]) == (status, outcome, "why")
    result = peer.http("GET", f"/api/v1/deploy/deployments?agent={name}&outcome={outcome}").json()
    assert [each["id"] for each in result["deployments"]] == [deployment]
    assert result["deployments"][0] == facts


@pytest.mark.parametrize("value", ["", "x", 1, None, [], {}, True, "\ud800", "a" * 100_000])
def test_a_report_with_another_word_counts_all_the_same(
    peer: Peer, name: str, value: object
) -> None:
    peer.registered(name)
    deployment = order(peer, name)
    more = {"step": value, "outcome": value}
    assert peer.report(name, deployment, RUNNING, **more).status_code == 200
    assert peer.report(name, deployment, SUCCEEDED, **more).status_code == 200
    facts = peer.status(deployment)
    assert (facts["status"], facts["step"], facts["outcome"]) == (SUCCEEDED, None, None)


def test_an_agent_that_says_neither(peer: Peer, name: str) -> None:
    peer.registered(name)
    deployment = order(peer, name)
    peer.report(name, deployment, RUNNING)
    peer.report(name, deployment, FAILED)
    facts = peer.status(deployment)
    assert (facts["step"], facts["outcome"], facts["agentVersion"]) == (None, None, None)


def test_a_running_deployment_has_no_outcome() -> None:
    record = {"status": RUNNING, "time": "t", "outcome": "succeeded", "step": "ready"}
    assert Report.from_json(record) == Report(RUNNING, "t", step="ready")


# --- agents ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("user_agent", "version"),
    [
        ("cachix-deploy/0.1.0", "0.1.0"),
        ("cachix-deploy/9", "9"),
        ("cachix 1.11.1", None),
        ("xcachix-deploy/1", None),
        ("", None),
        ("cachix-deploy", None),
        ("cachix-deploy/", None),
        ("cachix-deploy/0.2.0 (linux)", "0.2.0"),
        ("cachix-deploy/0.2.0+operations", "0.2.0"),
    ],
)
def test_the_version_of_an_agent_of_ours(peer: Peer, user_agent: str, version: str) -> None:
    name = "version-" + re.sub("[^0-9a-z.-]", "-", user_agent)
    agent = peer.registered(name, **{"User-Agent": user_agent})
    facts = peer.status(order(peer, name))
    assert (facts["agent"], facts["agentVersion"], facts["agentOnline"]) == (name, version, True)
    listed = peer.server.command("agent", "list")
    program = "1.11.1" if version is None else f"cachix-deploy {version}"
    assert re.search(rf"^{name} +online +x86_64-linux +{re.escape(program)} +\S+$", listed, re.M)
    agent.close()


def test_an_agent_that_is_offline(peer: Peer, name: str) -> None:
    agent = peer.registered(name)
    deployment = order(peer, name)
    assert peer.status(deployment)["agentOfflineSince"] is None
    agent.close()
    facts = wait_for(lambda: (s := peer.status(deployment))["agentOnline"] is False and s)
    assert facts["agentOfflineSince"] >= facts["createdOn"]


# --- lists ----------------------------------------------------------------------------------------


def test_the_newest_deployments_come_first(peer: Peer, name: str) -> None:
    peer.registered(name)
    answer = [order(peer, name, path) for path in range(3)]
    url = f"/api/v1/deploy/deployments?agent={name}"

    def listed(more: str = "") -> list[str]:
        return [each["id"] for each in peer.http("GET", url + more).json()["deployments"]]

    assert listed() == answer[::-1] and listed("&limit=2") == answer[:0:-1]
    assert listed("&status=Pending") == answer[2:] and listed("&status=Cancelled") == answer[1::-1]
    assert listed("&outcome=succeeded") == [] and listed("&limit=0") == []
    replaced = peer.status(answer[0])
    assert replaced["reason"] == "replaced by deployment 2"
    assert peer.http("GET", url, peer.agent_token).status_code == 403
    for wrong in ("&limit=x", "&limit=-1", "&limit=1001"):
        refused = peer.http("GET", url + wrong)
        assert refused.status_code == 400 and "`limit` must be a number" in refused.json()["error"]
    for word in ("status", "outcome"):
        for wrong in ("", "pending", "nonsense"):
            refused = peer.http("GET", f"{url}&{word}={wrong}")
            assert refused.status_code == 400
            assert f"`{word}` must be one of " in refused.json()["error"]


@pytest.mark.parametrize("index", [0, 99, 1 << 31, 10**30])
def test_an_index_that_there_is_not(peer: Peer, name: str, index: int) -> None:
    peer.registered(name)
    order(peer, name)
    answer = peer.http("GET", f"/agents/{name}/deployments/{index}")
    assert answer.status_code == 404 and f"no deployment {index}" in answer.json()["error"]


# --- cancelling -----------------------------------------------------------------------------------


def test_what_waits_is_cancelled_at_once(peer: Peer, name: str) -> None:
    peer.registered(name)
    deployment = order(peer, name)
    for _ in range(2):
        status, facts = cancel(peer, deployment)
        assert status == 200 and facts["status"] == CANCELLED and facts["cancelRequested"] is None


@pytest.mark.parametrize("step", reports.UNTOUCHED_STEPS)
def test_what_runs_is_cancelled_by_its_agent(peer: Peer, name: str, step: str) -> None:
    peer.registered(name, **OURS)
    deployment = order(peer, name)
    peer.report(name, deployment, RUNNING, step="received")
    first = cancel(peer, deployment)
    assert first[0] == 200 and first[1]["status"] == RUNNING and first[1]["cancelRequested"]
    assert cancel(peer, deployment) == first
    answer = peer.report(name, deployment, RUNNING, step=step)
    assert answer.status_code == 409 and answer.json()["status"] == CANCELLED
    facts = peer.status(deployment)
    assert (facts["reason"], facts["cancelRequested"], facts["cancelRefused"]) == (
        "cancelled",
        None,
        None,
    )


@pytest.mark.parametrize(
    ("status", "step"),
    [(RUNNING, "activating"), (RUNNING, "rolling-back"), (SUCCEEDED, "succeeded"), (FAILED, None)],
)
def test_a_request_that_came_too_late_is_dropped(
    peer: Peer, name: str, status: str, step: str | None
) -> None:
    """The machine runs the new path, so the deployment is not shown as cancelled."""
    peer.registered(name, **OURS)
    deployment = order(peer, name)
    peer.report(name, deployment, RUNNING, step="ready")
    assert cancel(peer, deployment)[0] == 200
    assert peer.report(name, deployment, status, step=step).status_code == 200
    facts = peer.status(deployment)
    assert facts["status"] == status and facts["cancelRequested"] is None and facts["cancelRefused"]
    assert cancel(peer, deployment)[0] == 409
    assert peer.report(name, deployment, SUCCEEDED).status_code == (
        409 if status == FAILED else 200
    )


# What an agent may report of a deployment that was cancelled: what leaves it cancelled, as nothing
# was changed, and what shows that the agent went on.
UNTOUCHED_REPORTS = [
    *[(RUNNING, step, None) for step in (None, *reports.UNTOUCHED_STEPS)],
    *[(FAILED, step, None) for step in (None, "ready", "cancelled", "superseded")],
    (FAILED, "failed", "nothing-changed"),
]
TOUCHED_REPORTS = [
    *[(RUNNING, step, None) for step in ("activating", "checking", "committing", "rolling-back")],
    *[(SUCCEEDED, step, None) for step in (None, "succeeded")],
    *[(FAILED, step, step) for step in ("rolled-back", "rollback-failed")],
    *[(FAILED, "failed", outcome) for outcome in (None, "changed-by-others", "state-lost")],
]


@pytest.mark.parametrize("how", ["waiting", "replaced", "running"])
def test_a_cancelled_deployment_that_the_agent_went_on_with(
    peer: Peer, name: str, how: str
) -> None:
    """It heard of that too late, or never. The machine's system counts more than the request."""
    for number, (status, step, outcome) in enumerate(TOUCHED_REPORTS):
        if how == "running" and step is None:  # an agent that has said a step says one at the end
            continue
        agent = f"{name}-{number}"
        peer.registered(agent, **OURS)
        deployment = cancelled(peer, agent, how)
        for status_, step_, outcome_ in UNTOUCHED_REPORTS:
            report = {"step": step_, "outcome": outcome_, "reason": "why"}
            assert peer.report(agent, deployment, status_, **report).status_code == 409
            assert peer.status(deployment)["status"] == CANCELLED
        report = {"step": step, "outcome": outcome, "reason": "why"}
        for _ in range(2):
            assert peer.report(agent, deployment, status, **report).status_code == 200
        facts = peer.status(deployment)
        assert (facts["status"], facts["outcome"]) == (status, outcome)
        assert facts["cancelRefused"] and facts["cancelRequested"] is None
        assert (facts["reason"], facts["finishedOn"] is None) == (
            (None, True) if status == RUNNING else ("why", False)
        )


def cancelled(peer: Peer, name: str, how: str) -> str:
    """A deployment that was cancelled while it waited, by a newer one, or by the 409."""
    deployment = order(peer, name)
    if how == "replaced":
        order(peer, name, 1)
    if how == "running":
        peer.report(name, deployment, RUNNING, step="ready")
    if how != "replaced":
        assert cancel(peer, deployment)[0] == 200
    if how == "running":
        assert peer.report(name, deployment, RUNNING, step="ready").status_code == 409
    assert peer.status(deployment)["status"] == CANCELLED
    return deployment


def test_an_older_deployment_that_comes_back_ends_no_newer_one(peer: Peer, name: str) -> None:
    peer.registered(name, **OURS)
    older = cancelled(peer, name, "replaced")
    newer = peer.http("GET", f"/agents/{name}/deployments/2").json()["id"]
    peer.report(name, newer, RUNNING, step="received")
    assert peer.report(name, older, RUNNING, step="committing").status_code == 200
    assert peer.status(newer)["status"] == RUNNING
    assert peer.report(name, older, SUCCEEDED, step="succeeded").status_code == 200
    assert peer.report(name, newer, SUCCEEDED, step="succeeded").status_code == 200


def test_an_agent_that_says_no_step_can_not_be_cancelled(peer: Peer, name: str) -> None:
    peer.registered(name)
    deployment = order(peer, name)
    peer.report(name, deployment, RUNNING)
    status, facts = cancel(peer, deployment)
    assert (status, facts) == (409, {"error": "this agent can't be cancelled once it has started"})
    assert peer.status(deployment)["status"] == RUNNING


def test_a_report_without_a_step_decides_nothing(peer: Peer, name: str) -> None:
    peer.registered(name, **OURS)
    deployment = order(peer, name)
    peer.report(name, deployment, RUNNING, step="ready")
    cancel(peer, deployment)
    assert peer.report(name, deployment, RUNNING, closureSize=5).status_code == 200
    assert peer.status(deployment)["cancelRequested"]
