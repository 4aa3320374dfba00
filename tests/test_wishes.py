"""Operations and reboots from a deploy.json to the agent: nobody switches who was not asked to."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_activate_command
from hosts import clean_environment, command
from workspace_support import OURS, STORE_PATHS, Peer, Server, running, wait_for

from activate import operation
from cachix_protocol import PLAIN, WISHES, Spec, Undecodable, Wish
from cachix_workspace import life, sentences, states
from cachix_workspace.agents import AgentRow, abilities_of, client_of
from cachix_workspace.deployments import DeploymentRow, Open
from cachix_workspace.life import Sent

KNOWING = {"User-Agent": "cachix-deploy/0.1.0+operations"}
AGENTS = {"web": STORE_PATHS[0], "db": STORE_PATHS[1]}
NOW = "2026-11-28T02:00:00Z"


def spec(options: Any) -> Spec:
    return Spec.from_json({"agents": AGENTS, "options": options})


# --- deploy.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "wishes"),
    [
        (None, {}),
        ({}, {}),
        ({"operation": "switch", "reboot": "never"}, {}),
        ({"operation": "boot"}, {"web": Wish("boot"), "db": Wish("boot")}),
        ({"agents": {"db": {"operation": "test"}}}, {"db": Wish("test")}),
        (
            {"reboot": "window", "agents": {"db": {"operation": "boot"}, "web": {}}},
            {"web": Wish(reboot="window"), "db": Wish("boot", "window")},
        ),
        ({"operation": "boot", "agents": {"web": {"operation": "switch"}}}, {"db": Wish("boot")}),
    ],
)
def test_the_options_of_a_deploy_json(options: Any, wishes: dict[str, Wish]) -> None:
    made = spec(options)
    assert made.wishes == wishes and made.has_wishes == bool(wishes)
    assert Spec.from_json(made.to_json()).wishes == wishes
    only = dataclasses.replace(made, agents={"web": AGENTS["web"]})
    assert set(Spec.from_json(only.to_json()).wishes) == set(wishes) - {"db"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "`options` must be an object"),
        ({"operaton": "boot"}, '`options` has only operation and reboot, not "operaton"'),
        ({"operation": "bot"}, "`options.operation` must be one of switch, boot, test, dry-act"),
        ({"operation": None}, "`options.operation` must be one of"),
        ({"reboot": True}, "`options.reboot` must be one of never, when-needed, window, not true"),
        ({"operation": ["boot"]}, "not a list"),
        ({"agents": []}, "`options.agents` must be an object"),
        ({"agents": {"dbb": {}}}, "`options.agents` names what `agents` does not: dbb"),
        ({"agents": {"db": "boot"}}, "`options.agents.db` must be an object such as"),
        ({"operation": "test", "reboot": "window"}, "`test` leaves the former system to boot"),
        (
            {"reboot": "when-needed", "agents": {"db": {"operation": "dry-activate"}}},
            "`options.agents.db`: `dry-activate` leaves the former system",
        ),
    ],
)
def test_a_word_that_is_misspelled_never_means_switch(options: Any, words: str) -> None:
    with pytest.raises(Undecodable) as caught:
        spec(options)
    assert words in str(caught.value)


def test_an_agent_ends_what_it_does_not_know() -> None:
    assert Wish.known(None) == PLAIN
    assert Wish.known({"operation": "boot"}) == Wish("boot")
    for strange in ({"operation": "kexec"}, {"speed": 1}, "boot", []):
        assert Wish.known(strange) is None


def test_the_words_are_those_of_the_journal() -> None:
    assert WISHES == {"operation": operation.OPERATIONS, "reboot": operation.REBOOTS}


# --- activate -------------------------------------------------------------------------------------


def activate(tmp_path: Path, *args: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "deploy.json"
    path.write_text(json.dumps({"agents": AGENTS, "options": {"operation": "boot"}}))
    env = {**clean_environment(tmp_path), "CACHIX_ACTIVATE_TOKEN": "T"}
    argv = [*command("cachix-deploy"), "activate", str(path), *args]
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_the_hosted_workspace_is_not_even_asked(tmp_path: Path) -> None:
    done = activate(tmp_path)
    assert done.returncode == 64 and done.stdout == ""
    words = "error: https://cachix.org does not know the `options` of this deploy.json"
    assert words in done.stderr


def test_an_older_workspace_deploys_nothing(tmp_path: Path) -> None:
    workspace = test_activate_command.Workspace("web", "db")
    try:
        done = activate(tmp_path, f"--host={workspace.host}")
        assert done.returncode == 64, done.stderr
        assert "does not know the `options`" in done.stderr
        assert [path for _, path, *_ in workspace.requests] == ["/api/v3/deploy/activate"]
    finally:
        workspace.server.shutdown()
        workspace.server.server_close()


# --- the workspace --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as server:
        yield server


@pytest.fixture
def peer(server: Server) -> Peer:
    return Peer(server)


@pytest.fixture
def name() -> str:
    return f"agent-{uuid.uuid4().hex[:8]}"


def order(peer: Peer, names: dict[str, str], options: Any, version: str = "v3") -> Any:
    body = {"agents": names, "options": options}
    return peer.http("POST", f"/api/{version}/deploy/activate", json=body)


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_an_agent_that_knows_them_gets_them(peer: Peer, name: str, version: str) -> None:
    agent = peer.registered(name, **KNOWING)
    answer = order(peer, {name: STORE_PATHS[0]}, {"operation": "boot"}, version)
    assert answer.status_code == 200
    contents = agent.expect_text()["command"]["contents"]
    assert contents["options"] == {"operation": "boot"}
    facts = peer.status(contents["id"])
    assert (facts["operation"], facts["reboot"]) == ("boot", "never")


def test_a_plain_deployment_looks_as_it_always_did(peer: Peer, name: str) -> None:
    agent = peer.registered(name, **KNOWING)
    answer = order(peer, {name: STORE_PATHS[0]}, {"operation": "switch"})
    assert answer.status_code == 200
    assert "options" not in agent.expect_text()["command"]["contents"]


@pytest.mark.parametrize(
    ("headers", "program"), [(OURS, "cachix-deploy 0.1.0"), ({}, "Cachix's agent")]
)
def test_an_agent_that_does_not_know_them_is_refused_at_once(
    peer: Peer, name: str, headers: dict[str, str], program: str
) -> None:
    """And so is the whole order, in which others might know them."""
    agent, other = peer.registered(name, **headers), peer.registered(f"{name}-2", **KNOWING)
    names = {name: STORE_PATHS[0], f"{name}-2": STORE_PATHS[1]}
    answer = order(peer, names, {"operation": "dry-activate"})
    assert answer.status_code == 400
    words = (
        f"the agent does not know `operation: dry-activate` and would switch: {name} ({program})"
    )
    assert answer.json()["error"].startswith(words)
    assert agent.is_silent() and other.is_silent()
    one = order(peer, names, {"agents": {f"{name}-2": {"reboot": "when-needed"}}})
    assert one.status_code == 200
    assert other.expect_text()["command"]["contents"]["options"] == {"reboot": "when-needed"}


@pytest.mark.parametrize("headers", [OURS, {}])
def test_an_agent_that_comes_back_as_an_older_one_is_never_sent_it(
    peer: Peer, name: str, headers: dict[str, str]
) -> None:
    peer.registered(name, **KNOWING).close()
    deployment = order(peer, {name: STORE_PATHS[0]}, {"operation": "boot"}).json()["agents"][name]
    agent = peer.registered(name, **headers)
    facts = wait_for(lambda: (s := peer.status(deployment["id"]))["status"] == "Failed" and s)
    assert facts["outcome"] == "nothing-changed"
    assert "does not know `operation: boot` and would switch" in facts["reason"]
    assert agent.is_silent()


def test_the_program_of_the_machine_may_be_newer(peer: Peer, name: str) -> None:
    peer.registered(name, **OURS).close()
    peer.registered(name, **KNOWING)
    assert order(peer, {name: STORE_PATHS[0]}, {"operation": "boot"}).status_code == 200


def test_what_waits_for_a_reboot_gives_way(peer: Peer, name: str) -> None:
    agent = peer.registered(name, **KNOWING)
    first = order(peer, {name: STORE_PATHS[0]}, {"reboot": "window"}).json()["agents"][name]["id"]
    agent.expect_text()
    peer.report(name, first, "InProgress", step="committing")
    order(peer, {name: STORE_PATHS[1]}, {})
    assert agent.is_silent()
    peer.report(name, first, "InProgress", step="awaiting-reboot")
    assert agent.expect_text()["command"]["contents"]["storePath"] == STORE_PATHS[1]
    peer.report(name, first, "Succeeded", step="succeeded", outcome="reboot-needed")
    assert peer.status(first)["status"] == "Succeeded"


def row(index: int, step: str = "", **more: Any) -> DeploymentRow:
    status = "InProgress" if step else "Pending"
    facts = ("id", "agent", index, STORE_PATHS[0], None, status, None, None, NOW, NOW, None, 0)
    return dataclasses.replace(DeploymentRow(*facts), step=step or None, **more)


def test_decisions_on_what_waits_for_a_reboot() -> None:
    now = Open(row(1, "awaiting-reboot"), row(2))
    new = life.decide(now, True, Sent(), 0, 1)
    assert new.send == now.running and new.pause is not None
    assert life.decide(now, True, Sent(1, is_new=False), 0, 1).send == now.waiting
    assert life.decide(now, True, Sent(2, is_new=False), 0, 1).send is None
    assert life.decide(Open(now.running, None), True, Sent(1, is_new=False), 0, 1).send is None
    busy = Open(row(1, "committing"), row(2))
    assert life.decide(busy, True, Sent(1, is_new=False), 0, 1).send is None
    assert life.patience_for("rebooting", 60) == 900 and life.patience_for("ready", 60) == 60


@pytest.mark.parametrize(
    ("user_agent", "abilities"),
    [
        (KNOWING["User-Agent"], "operations"),
        ("cachix-deploy/0.1.0", None),
        ("cachix-deploy/0.1.0+", None),
        ("cachix 1.11.1+operations", None),
        ("cachix-deploy/1+operations.more (linux)", "operations more"),
    ],
)
def test_the_abilities_of_an_agent(user_agent: str, abilities: Any) -> None:
    assert abilities_of(user_agent) == abilities
    assert (client_of(user_agent) is None) == user_agent.startswith("cachix 1")


# --- words ----------------------------------------------------------------------------------------

AGENT = AgentRow("id", "web", "x86_64-linux", "1", NOW, NOW, True, 1, "0.1.0")


@pytest.mark.parametrize(
    ("facts", "sentence", "advice"),
    [
        ({"step": "awaiting-reboot", "reboot": "window"}, "Waiting for its reboot window", "newer"),
        ({"step": "awaiting-reboot", "reboot": "when-needed"}, "Waiting for its reboot", "newer"),
        ({"step": "rebooting", "reboot": "when-needed"}, "Rebooting web", "former system"),
        (
            {"status": "Succeeded", "outcome": "reboot-needed", "operation": "boot"},
            f"Succeeded: {STORE_PATHS[0]} is what starts next",
            "after a reboot",
        ),
        (
            {"status": "Succeeded", "outcome": "dry-run", "operation": "dry-activate"},
            "Dry run: nothing was changed",
            "The log has",
        ),
        (
            {"status": "Succeeded", "outcome": "tested", "operation": "test"},
            f"Succeeded: {STORE_PATHS[0]} runs until the next boot",
            "boots then",
        ),
        (
            {"status": "Succeeded", "outcome": "reboot-needed", "reboot": "window", "reason": "so"},
            "Succeeded: web needs a reboot",
            "So.",
        ),
    ],
)
def test_sentences(facts: dict[str, Any], sentence: str, advice: str) -> None:
    step = facts.pop("step", "done")
    one = dataclasses.replace(row(1, step), started_on=None, **facts)
    telling = sentences.tell(one, AGENT)
    assert telling.sentence == sentence and advice in telling.advice


@pytest.mark.parametrize(
    ("facts", "key", "word"),
    [
        ({"running": "b", "by_hand": "rollback"}, "by-hand", "rolled back by hand"),
        ({"running": "b", "by_hand": "activation"}, "by-hand", "activated by hand"),
        ({"running": "b"}, "by-hand", "changed by hand"),
        ({"running": "a", "by_hand": "rollback"}, "well", "well"),
        ({"running": "b", "runs_test": True, "outcome": "tested"}, "tested", "runs a test"),
        (
            {"running": "b", "needs_reboot": True, "outcome": "dry-run"},
            "reboot-needed",
            "reboot needed",
        ),
    ],
)
def test_the_state_of_an_agent(facts: dict[str, Any], key: str, word: str) -> None:
    fixed: dict[str, Any] = {"has_connected": True, "connected": True, "deployed": "a"}
    state = states.of_agent(states.Facts(**{**fixed, "ended": "Succeeded", **facts}))
    assert (state.key, state.word) == (key, word)
