"""Agents' reports on their machines: accepted, refused, kept, shown by pages; their effects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse
from workspace_support import STORE_PATHS

from activate import outcomes
from activate.agent.present import WORDS
from cachix_protocol import FAILED, SUCCEEDED, Spec
from cachix_report_state import MachineState
from cachix_workspace import (
    agents,
    audit,
    deployments,
    machine_state,
    orders,
    owners,
    states,
    tokens,
)
from cachix_workspace.agents import AgentRow
from cachix_workspace.app import create_app
from cachix_workspace.context import Workspace, workspace_of
from cachix_workspace.deployments import DeploymentRow
from cachix_workspace.fleet import Brief, brief_of_all
from cachix_workspace.orders import Actor
from cachix_workspace.reports import Report
from cachix_workspace.settings import Settings
from cachix_workspace.states import Facts

OLD, NEW, OTHER = STORE_PATHS[:3]
PROFILE = "/nix/var/nix/profiles/system"
SAID = {
    "running": OLD,
    "runningSince": "2026-11-01T10:00:00.000000Z",
    "profile": PROFILE,
    "kind": "nixos",
    "agentVersion": "0.1.0",
    "rebootNeeded": False,
}
TIME = "2026-11-24T01:02:03.000000Z"


@dataclass
class Place:
    """A workspace with the agents `web` and `db`, each of which has a token of its own."""

    workspace: Workspace
    client: FlaskClient
    secrets: dict[str, str]

    def agent(self, name: str = "web") -> AgentRow:
        with self.workspace.database.read() as connection:
            return agents.find(connection, name)

    def put(
        self, body: Any, name: str = "web", secret: str = "", agent_id: str = "", **headers: str
    ) -> TestResponse:
        token = self.secrets[secret or name]
        path = f"/api/v1/deploy/agent/{agent_id or self.agent(name).id}/state"
        all_headers = {"Authorization": f"Bearer {token}", "name": name, **headers}
        return self.client.put(path, json=body, headers=all_headers)

    def topics(self, after: int) -> list[str]:
        """The topics that pages got since then."""
        change = self.workspace.feed.wait(after, 0)
        assert change is not None
        return change[1]

    def report(self, status: str, outcome: str, path: str = NEW) -> DeploymentRow:
        """Let `web` be deployed a path, and report how that has ended."""
        with self.workspace.database.write() as connection:
            row = orders.order(connection, Spec({"web": path}, {}), Actor("t")).rows["web"]
            report = Report(status, TIME, outcome=outcome)
            return deployments.apply_report(connection, row, report)[0]

    def state(self) -> str:
        """How `web` stands, as pages show it."""
        agent = self.agent()
        with self.workspace.database.read() as connection:
            newest = deployments.list_some(connection, 1, agent="web")
        facts = Facts(
            has_connected=True,
            connected=True,
            ended=newest[0].status if newest else None,
            outcome=newest[0].outcome if newest else None,
            running=agent.running,
            deployed=agent.deployed,
            needs_reboot=agent.reboot_since is not None,
        )
        return states.of_agent(facts).key


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    app = create_app(Settings(tmp_path, "http://ws.test"))
    workspace, secrets = workspace_of(app), {}
    workspace.news.start(workspace.hear, lambda _: None)  # as `start_threads` does
    with workspace.database.write() as connection:
        for name in ("web", "db"):
            number, secrets[name] = tokens.create(connection, "agent", agents=name)
            token = tokens.get(connection, number)
            assert token is not None
            row = agents.register(connection, name, "x86_64-linux", "1.11.1", "0.1.0")
            owners.admit(connection, token, row)
        for kind in ("activate", "admin"):
            secrets[kind] = tokens.create(connection, kind)[1]
    yield Place(workspace, app.test_client(), secrets)
    workspace.database.close()


@pytest.mark.parametrize(
    ("action", "words"),
    [("rollback", "rolled back by hand"), ("activation", "activated by hand"), ("other", "")],
)
def test_what_was_done_by_hand_is_in_the_audit_once(place: Place, action: str, words: str) -> None:
    """The page of events shows it as soon as the workspace can be reached again."""
    said = {**SAID, "byHand": {"action": action, "time": TIME, "reason": None}, "drift": None}
    place.put(SAID)
    for _ in range(2):
        assert place.put({**said, "running": NEW}).status_code == 200
    with place.workspace.database.read() as connection:
        entries = [entry for entry in audit.list_some(connection, 50) if "hand" in entry.action]
    wanted = [("agent web", words, NEW)] if words else []
    assert [(entry.actor, entry.action, entry.detail) for entry in entries] == wanted
    assert place.put({**said, "byHand": "rollback"}).status_code == 400


@pytest.mark.parametrize(
    ("action", "word"),
    [("rollback", "rolled back by hand"), ("activation", "activated by hand"), ("x", "changed by")],
)
def test_pages_say_what_was_done_by_hand(place: Place, action: str, word: str) -> None:
    """Until the next deployment."""
    place.report(SUCCEEDED, "succeeded", OLD)
    place.put({**SAID, "byHand": {"action": action, "time": TIME, "reason": None}, "running": NEW})

    def brief() -> Brief:
        with place.workspace.database.read() as connection:
            agents_ = brief_of_all(connection, place.workspace.signs, 60, ["web"])
        return agents_[0]

    assert brief().state.key == "by-hand" and brief().state.word.startswith(word)
    place.report(SUCCEEDED, "succeeded", OLD)
    assert brief().state.key == "well" and place.agent().by_hand is None


def test_the_words_are_those_of_the_agent() -> None:
    assert set(machine_state.KINDS) == set(WORDS.values())
    text = MachineState(OLD, TIME, PROFILE, "nixos", True).to_json()
    assert set(text) == set(SAID)
    taken = machine_state.MachineState.from_json(text)
    assert taken == machine_state.MachineState(OLD, TIME, PROFILE, "nixos", True)
    assert states.REBOOT.key == outcomes.REBOOT_NEEDED  # by which `waits_for_boot` goes


# --- taken ----------------------------------------------------------------------------------------


def test_what_an_agent_says_is_kept_and_told_once(place: Place) -> None:
    before = place.workspace.feed.last
    answer = place.put(SAID)
    assert (answer.status_code, answer.json) == (200, {})
    agent = place.agent()
    assert (agent.running, agent.profile, agent.kind) == (OLD, PROFILE, "nixos")
    assert (agent.running_since, agent.reboot_since) == (SAID["runningSince"], None)
    assert agent.state_on is not None
    assert place.topics(before) == ["agents", f"agent:{agent.id}"]
    before = place.workspace.feed.last
    assert place.put(SAID).status_code == 200
    assert place.topics(before) == []
    assert place.agent("db").running is None


def test_since_when_changes_with_the_path_only(place: Place) -> None:
    place.put(SAID)
    place.put({**SAID, "runningSince": "2026-11-02T10:00:00.000000Z", "kind": "profile"})
    agent = place.agent()
    assert (agent.running_since, agent.kind) == (SAID["runningSince"], "profile")
    place.put({**SAID, "running": NEW, "runningSince": "2026-11-03T10:00:00.000000Z"})
    assert place.agent().running_since == "2026-11-03T10:00:00.000000Z"


@pytest.mark.parametrize("since", [None, "yesterday", "9999-01-01T00:00:00Z", "x" * 5000])
def test_a_time_that_can_not_be_is_that_of_the_report(place: Place, since: str | None) -> None:
    place.put({**SAID, "runningSince": since})
    agent = place.agent()
    assert agent.running_since == agent.state_on


def test_a_reboot_that_is_needed_is_needed_since_the_first_word_of_it(place: Place) -> None:
    place.put({**SAID, "rebootNeeded": True})
    first = place.agent().reboot_since
    assert first is not None
    place.put({**SAID, "rebootNeeded": True, "running": NEW})
    assert place.agent().reboot_since == first
    place.put(SAID)
    assert place.agent().reboot_since is None


def test_a_machine_without_a_profile(place: Place) -> None:
    nothing = dict.fromkeys(("running", "runningSince", "profile", "kind"))
    assert place.put({**nothing, "rebootNeeded": False}).status_code == 200
    agent = place.agent()
    assert (agent.running, agent.running_since, agent.kind) == (None, None, None)
    assert agent.state_on is not None


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"running": "/etc/passwd"}, "running"),
        ({"running": f"{OLD}/../../x"}, "running"),
        ({"running": 1}, "running"),
        ({"profile": "profiles/system"}, "profile"),
        ({"profile": "/" + "x" * 300}, "profile"),
        ({"profile": "/a\nb"}, "profile"),
        ({"profile": "/\ud800"}, "profile"),
        ({"profile": []}, "profile"),
        ({"kind": "windows"}, "kind"),
        ({"kind": {}}, "kind"),
        ({"runningSince": 5}, "runningSince"),
        ({"agentVersion": 1}, "agentVersion"),
        ({"rebootNeeded": "yes"}, "rebootNeeded"),
        ({"rebootNeeded": None}, "rebootNeeded"),
    ],
)
def test_a_wrong_value_is_named(place: Place, changes: dict[str, Any], word: str) -> None:
    answer = place.put({**SAID, **changes})
    assert answer.status_code == 400
    assert f"`{word}`" in answer.json["error"]
    assert place.agent().state_on is None


@pytest.mark.parametrize("body", [None, [], "x", 1, []])
def test_a_body_that_is_no_object(place: Place, body: Any) -> None:
    assert place.put(body).status_code == 400


def test_a_body_that_is_too_large(place: Place) -> None:
    assert place.put({**SAID, "more": "x" * (1 << 14)}).status_code == 413


def test_an_agent_speaks_for_itself_only(place: Place) -> None:
    other = place.agent("db").id
    assert place.put(SAID, agent_id=other).status_code == 403
    assert place.put(SAID, name="db", secret="web").status_code == 403
    for kind in ("activate", "admin"):
        assert place.put(SAID, secret=kind).status_code == 403
    place.secrets["wrong"] = "x" * 40
    assert place.put(SAID, secret="wrong").status_code == 401
    assert place.put(SAID, agent_id="11111111-2222-4333-8444-555555555555").status_code == 403
    assert (place.agent().state_on, place.agent("db").state_on) == (None, None)
    assert place.put(SAID, agent_id=place.agent().id.upper()).status_code == 200


def test_a_form_of_another_site_is_not_taken(place: Place) -> None:
    path = f"/api/v1/deploy/agent/{place.agent().id}/state"
    headers = {"Authorization": f"Bearer {place.secrets['web']}", "name": "web"}
    assert place.client.put(path, data={"a": "b"}, headers=headers).status_code == 415
    assert place.client.post(path, json=SAID, headers=headers).status_code == 405


# --- what follows ---------------------------------------------------------------------------------


def test_a_success_is_what_runs_before_the_agent_says_so(place: Place) -> None:
    place.put(SAID)
    row = place.report(SUCCEEDED, "succeeded")
    agent = place.agent()
    assert (agent.running, agent.deployed, agent.running_since) == (NEW, NEW, row.finished_on)
    assert (place.state(), row.before) == ("well", OLD)
    place.put({**SAID, "running": NEW, "runningSince": "2026-11-24T01:02:01.000000Z"})
    assert place.agent().running_since == row.finished_on
    assert place.state() == "well"


def test_an_agent_that_says_nothing_is_shown_as_deployed(place: Place) -> None:
    place.report(SUCCEEDED, "succeeded")
    agent = place.agent()
    assert (agent.running, agent.runs) == (None, NEW)


def test_a_failure_changes_nothing(place: Place) -> None:
    place.put(SAID)
    place.report(FAILED, "rolled-back")
    assert (place.agent().running, place.agent().deployed) == (OLD, None)


def test_what_was_changed_by_hand(place: Place) -> None:
    place.report(SUCCEEDED, "succeeded")
    place.put({**SAID, "running": OTHER})
    assert place.state() == "by-hand"
    place.put({**SAID, "running": OTHER, "rebootNeeded": True})
    assert place.state() == "by-hand"
    place.put({**SAID, "running": NEW, "rebootNeeded": True})
    assert place.state() == "reboot-needed"


def test_a_system_that_can_only_be_booted_was_not_changed_by_hand(place: Place) -> None:
    place.put(SAID)
    place.report(SUCCEEDED, "reboot-needed")
    assert (place.agent().running, place.agent().deployed) == (OLD, NEW)
    place.put({**SAID, "rebootNeeded": True})
    assert place.state() == "reboot-needed"
    place.put({**SAID, "running": NEW})
    assert place.state() == "well"


@pytest.mark.parametrize("client", [None, "0.0.9"])
def test_another_program_of_the_name_may_say_nothing(place: Place, client: str | None) -> None:
    place.put({**SAID, "rebootNeeded": True})
    text = place.agent()
    with place.workspace.database.write() as connection:
        same = agents.register(connection, "web", "x86_64-linux", "1.11.1", "0.1.0")
        assert replace(same, seen_on=text.seen_on) == text
        other = agents.register(connection, "web", "x86_64-linux", "1.11.1", client)
    assert [getattr(other, name) for name in agents.SAID] == [None] * len(agents.SAID)
