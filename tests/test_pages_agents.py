"""The pages of agents, tokens, caches and the first steps."""

from __future__ import annotations

import hashlib
import html
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages_support import Browser, words
from workspace_support import (
    OURS,
    STORE_PATHS,
    Connection,
    Peer,
    Server,
    handshake,
    open_socket,
    running,
)

from cachix_workspace.people import OPERATOR, VIEWER


@pytest.fixture(scope="module")
def peer(server: Server) -> Peer:
    return Peer(server)


def block(page: str, id: str) -> str:
    """The text of a block to paste."""
    match = re.search(rf'<pre id="{id}"[^>]*>(.*?)</pre>', page, re.S)
    assert match, words(page)
    return html.unescape(match[1])


def connect(server: Server, name: str, token: str) -> str:
    """The first line of the answer to an agent's handshake."""
    connection = Connection(server.port)
    connection.send(handshake("/ws", token, name=name, version="1", system="x86_64-linux"))
    return connection.read_head().splitlines()[0]


# --- adding ---------------------------------------------------------------------------------------


def test_an_agent_exists_from_generate_on(server: Server, browser: Browser, name: str) -> None:
    page = browser.post("/add/one", name=name, labels="prod, web", description="the <first>")
    token = block(page, "token")
    assert f"Waiting for {name} to connect" in words(page)
    assert token in block(page, "try-now") and page.count(token) == 3
    shown_page = browser.get(f"/agents/{name}")
    assert (
        token not in shown_page
        and "never connected" in words(shown_page)
        and "&lt;first&gt;" in shown_page
    )
    assert block(shown_page, "systemd-start").count(f"agent {name} --host={server.url}\n") == 1
    headers = {"name": name, "version": "1", "system": "x86_64-linux"}
    agent = open_socket(server, "/ws", token, **headers)
    assert agent.expect_text()["method"] == "AgentRegistered"
    assert "connected just now" in words(browser.get(f"/agents/{name}"))
    assert "403" in connect(server, f"{name}-other", token)


def test_what_is_deployed_to_a_new_agent_waits_for_it(
    server: Server, peer: Peer, browser: Browser, name: str
) -> None:
    token = block(browser.post("/add/one", name=name), "token")
    scripts = {"x86_64-linux": STORE_PATHS[3], "aarch64-linux": STORE_PATHS[4]}
    deployment = peer.activate({name: STORE_PATHS[0]}, scripts)[name]
    assert "it has never connected" in words(browser.get(f"/agents/{name}/deployments/1"))
    headers = {"name": name, "version": "1", "system": "aarch64-linux"}
    agent = open_socket(server, "/ws", token, **headers)
    assert agent.expect_text()["method"] == "AgentRegistered"
    contents = agent.expect_text()["command"]["contents"]
    assert (contents["id"], contents["rollbackScript"]) == (deployment, STORE_PATHS[4])


def test_many_agents_enrol_by_one_token(server: Server, browser: Browser, name: str) -> None:
    page = browser.post("/add/many", names=f"{name}-*", count="2")
    token, number = block(page, "token"), re.findall(r"arrived\?token=(\d+)", page)[0]
    assert "Waiting for the first machine" in words(page) and "$(hostname)" in page
    for letter in "ab":
        headers = {"name": f"{name}-{letter}", "version": "1", "system": "x86_64-linux"}
        agent = open_socket(server, "/ws", token, **headers)
        assert agent.expect_text()["method"] == "AgentRegistered"
    arrived = words(browser.get(f"/add/arrived?token={number}"))
    assert f"2 connected: {name}-a {name}-b" in arrived
    assert "403" in connect(server, f"{name}-c", token)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"name": "no/slash"}, "an agent's name has letters"),
        ({"name": "good", "labels": "Not_Good"}, "lower-case letters"),
        ({"name": "good", "days": "0"}, "no number above 0"),
        ({"name": "good", "cache": "none"}, "there is no cache none"),
    ],
)
def test_what_can_not_be_added_is_said_in_the_form(
    browser: Browser, form: dict[str, str], said: str
) -> None:
    page = browser.send("/add/one", **form)
    assert page.status_code in (400, 404) and said in words(page.text)
    assert f'value="{form["name"]}"' in page.text
    browser.get("/agents/good", 404)


def test_each_block_is_one_that_its_program_reads(browser: Browser, tmp_path: Path) -> None:
    page = browser.post("/add/one", name="blocks")
    for id in ("nixos-module", "darwin-module", "home-module"):
        path = tmp_path / f"{id}.nix"
        path.write_text(block(page, id))
        subprocess.run(["nix-instantiate", "--parse", path], check=True, capture_output=True)
    for id in re.findall(r'<pre id="([a-z-]+)"', page):
        if not id.endswith("-module") and id not in ("token", "cron-lines"):
            subprocess.run(["bash", "-n", "-c", block(page, id)], check=True)
    start = block(page, "systemd-start")
    unit = tmp_path / "cachix-deploy.service"
    unit.write_text(start.partition("<<'EOF'\n")[2].partition("\nEOF")[0])
    argv = ["systemd-analyze", "verify", "--man=no", unit]
    complaint = subprocess.run(argv, capture_output=True, text=True, check=False).stderr
    wrong = [line for line in complaint.splitlines() if "cachix-deploy.service" in line]
    assert [line for line in wrong if "not executable" not in line] == []


# --- the program ----------------------------------------------------------------------------------


def test_the_program_is_served_and_runs(browser: Browser, tmp_path: Path) -> None:
    answer = browser.session.get(f"{browser.server.url}/get/cachix-deploy.pyz", timeout=60)
    path = tmp_path / "cachix-deploy.pyz"
    path.write_bytes(answer.content)
    digest = hashlib.sha256(answer.content).hexdigest()
    assert browser.get("/get/cachix-deploy.pyz.sha256") == f"{digest}  cachix-deploy.pyz\n"
    assert digest in browser.get("/ci")
    argv = [sys.executable, "-I", str(path), "--version"]
    result = subprocess.run(argv, capture_output=True, text=True, env={}, check=True)
    assert result.stdout.split()[-1] == OURS["User-Agent"].partition("/")[2]


# --- an agent -------------------------------------------------------------------------------------


def test_a_paused_agent_is_sent_nothing_until_it_is_resumed(
    peer: Peer, browser: Browser, name: str
) -> None:
    agent = peer.registered(name, **OURS)
    page = browser.post(f"/agents/{name}/pause")
    assert "paused" in words(page) and "by anna" in words(page)
    deployment = peer.activate({name: STORE_PATHS[0]})[name]
    assert agent.is_silent() and peer.status(deployment)["agentPausedSince"]
    assert "paused since" in words(browser.get(f"/agents/{name}/deployments/1"))
    browser.post(f"/agents/{name}/resume")
    assert agent.expect_text()["command"]["contents"]["id"] == deployment


def test_an_agent_goes_back_to_a_path_that_it_succeeded_with(
    peer: Peer, browser: Browser, name: str
) -> None:
    peer.registered(name, **OURS)
    for path in (0, 1):
        deployment = peer.activate({name: STORE_PATHS[path]})[name]
        peer.report(name, deployment, "Succeeded", outcome="succeeded")
    assert "Roll back to this" in words(browser.get(f"/agents/{name}"))
    browser.post(f"/agents/{name}/deploy", 409, path=STORE_PATHS[2])
    browser.post(f"/agents/{name}/deploy", path=STORE_PATHS[0])
    assert browser.last.url.endswith(f"/agents/{name}/deployments/3")


def test_renaming_closes_the_connection_and_keeps_the_history(
    server: Server, peer: Peer, browser: Browser, name: str
) -> None:
    token = block(browser.post("/add/one", name=name), "token")
    headers = {"name": name, "version": "1", "system": "x86_64-linux"}
    agent = open_socket(server, "/ws", token, **headers)
    agent.expect_text()
    peer.activate({name: STORE_PATHS[0]})
    browser.post(f"/agents/{name}/rename", new=f"{name}-new")
    assert agent.expect_close() == 1012
    assert "403" in connect(server, name, token)
    assert "101" in connect(server, f"{name}-new", token)
    assert "system-a" in words(browser.get(f"/agents/{name}-new"))
    browser.get(f"/agents/{name}", 404)
    browser.post(f"/agents/{name}-new/rename", 400, new="no/slash")


def test_a_removed_agent_is_gone_with_its_token(
    server: Server, peer: Peer, browser: Browser, name: str
) -> None:
    token = block(browser.post("/add/one", name=name), "token")
    running = peer.activate({name: STORE_PATHS[0]})[name]
    assert "101" in connect(server, name, token)
    peer.report(name, running, "InProgress", step="activating")
    browser.post(f"/agents/{name}/remove", 409)
    peer.report(name, running, "Failed")
    browser.post(f"/agents/{name}/remove")
    browser.get(f"/agents/{name}", 404)
    assert "401" in connect(server, name, token)


def test_selected_agents_are_labelled_paused_and_rolled_back(
    peer: Peer, browser: Browser, name: str
) -> None:
    names = [f"{name}-{letter}" for letter in "ab"]
    for each in names:
        peer.registered(each, **OURS)
    browser.post("/selected", 400, do="pause")
    browser.post("/selected", name=names, do="pause")
    assert browser.get("/?state=paused").count("data-key") == 2
    browser.post("/selected", name=names, do="resume")
    assert "Labels, in place of those" in words(browser.post("/selected", name=names, do="label"))
    browser.post("/selected/label", name=names, labels="prod")
    assert browser.get("/?label=prod").count("data-key") >= 2
    for path in (0, 1):
        ids = peer.activate(dict.fromkeys(names, STORE_PATHS[path]))
        for each in names:
            peer.report(each, ids[each], "Succeeded", outcome="succeeded")
    page = words(browser.post("/selected", name=names, do="roll-back"))
    assert page.count("system-a") == 2 and "Roll back the selected" in page
    browser.post("/selected/roll-back", name=names)
    assert "waiting" in words(browser.last.text) and "/runs/" in browser.last.url


def test_an_operator_deploys_and_adds_nothing(server: Server, peer: Peer, name: str) -> None:
    peer.registered(name, **OURS)
    operator, viewer = Browser(server, "olga", OPERATOR), Browser(server, "vera", VIEWER)
    assert "Pause" in words(operator.get(f"/agents/{name}"))
    assert "Remove" not in words(operator.get(f"/agents/{name}"))
    operator.get("/add", 403)
    operator.post(f"/agents/{name}/remove", 403)
    assert "Pause" not in words(viewer.get(f"/agents/{name}"))
    viewer.post(f"/agents/{name}/pause", 403)


# --- tokens and caches ----------------------------------------------------------------------------


def test_a_token_is_made_rotated_and_revoked(server: Server, browser: Browser) -> None:
    page = browser.post("/tokens", kind="activate", description="CI of <app>")
    number = re.findall(r"<h1>Token (\d+)", page)[0]
    secret = block(page, "token")
    assert secret not in browser.get("/tokens") and "CI of &lt;app&gt;" in browser.get("/tokens")
    after = block(browser.post(f"/tokens/{number}/rotate"), "token")
    assert after != secret
    browser.post(f"/tokens/{number}/rotate", 409)
    assert "can't be undone" in words(browser.get(f"/tokens/{number}/revoke"))
    assert "revoked" in words(browser.post(f"/tokens/{number}/revoke"))
    for wrong in ({"kind": "agent"}, {"kind": "activate", "days": "-1"}):
        browser.post("/tokens", 400, **wrong)


def test_a_cache_is_made_and_says_how_to_push(browser: Browser, server: Server) -> None:
    assert "Make the first cache" in words(browser.get("/caches"))
    page = browser.post("/caches", name="main", access="private")
    secret = block(page, "secret-key")
    shown_page = browser.get("/caches/main")
    assert secret not in shown_page and "netrc-file" in block(shown_page, "nix-conf")
    push = f"cachix-deploy push ./result --host={server.url} --cache=main"
    assert block(shown_page, "push") == push
    browser.post("/caches", 409, name="main")
    browser.post("/caches", 400, name="Not Good")
    assert block(browser.post("/caches/main/rotate"), "secret-key") != secret
    browser.post("/caches/main/rotate", 409)
    browser.post("/caches/main/retire")
    for name in ("github", "gitlab"):
        text = block(browser.get("/ci"), name)
        assert f"CACHIX_HOST: {server.url}\n" in text and "netrc" not in text
        assert text.endswith("activate --push result")


def test_the_first_steps_are_marked_as_they_are_done(server: Server) -> None:
    with running() as fresh:
        browser = Browser(fresh)
        assert words(browser.get("/welcome")).count("(done)") == 1  # its address
        browser.post("/welcome/name", name="Our <machines>")
        browser.post("/caches", name="main")
        browser.post("/add/one", name="web")
        page = browser.get("/welcome")
        assert words(page).count("(done)") == 4 and "Our &lt;machines&gt;" in page
        browser.post("/tokens", kind="activate")
        assert words(browser.get("/welcome")).count("(done)") == 5
