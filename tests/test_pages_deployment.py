"""The page of a deployment, runs, and deploying by hand."""

from __future__ import annotations

import re

import pytest
from pages_support import Browser, words
from workspace_support import OURS, STORE_PATHS, Peer, Server

from cachix_workspace.people import VIEWER

FAILED, RUNNING, SUCCEEDED = "Failed", "InProgress", "Succeeded"


@pytest.fixture(scope="module")
def peer(server: Server) -> Peer:
    return Peer(server)


def url(name: str, index: int = 1) -> str:
    return f"/agents/{name}/deployments/{index}"


def order(peer: Peer, name: str, path: int = 0) -> str:
    return peer.activate({name: STORE_PATHS[path]})[name]


def test_programs_still_get_json_at_this_address(peer: Peer, name: str) -> None:
    peer.registered(name)
    deployment = order(peer, name)
    answer = peer.http("GET", url(name), headers={"Accept": "text/html"})
    assert answer.json()["id"] == deployment


def test_the_log_is_shown_as_text_whatever_is_in_it(
    peer: Peer, browser: Browser, name: str
) -> None:
    peer.registered(name, **OURS)
    deployment = order(peer, name)
    peer.report(name, deployment, RUNNING, step="received")
    link = "\x1b]8;;https://elsewhere.example\x07here\x1b]8;;\x07"
    lines = ["\x1b[31m<script>alert(1)</script>\x1b[0m", link, "a\u202eb", "x" * 1_000_000]
    peer.log(name, deployment, 0, lines)
    page = browser.get(url(name))
    assert "<script>alert" not in page and "elsewhere.example" not in page
    assert '<span class="ansi31">&lt;script&gt;' in page and "\u202e" not in page
    assert "996000 more characters" in page and len(page) < 100_000
    assert browser.get(f"{url(name)}/log.txt").count("x") > 1_000_000


def test_a_long_log_is_paged_from_both_ends(peer: Peer, browser: Browser, name: str) -> None:
    peer.registered(name, **OURS)
    deployment = order(peer, name)
    peer.log(name, deployment, 0, [f"line number {number}" for number in range(1, 3001)])
    assert ">line number 3000<" in browser.get(url(name))
    first = browser.get(f"{url(name)}?from=0")
    assert ">line number 1<" in first and ">line number 3000<" not in first
    middle = browser.get(f"{url(name)}?line=1500")
    assert 'id="L1500"' in middle and 'id="L1"' not in middle and 'data-at="L1500"' in middle
    text = words(browser.get(f"{url(name)}?find=NUMBER 777"))
    assert "1 lines have “NUMBER 777”" in text and "777 line number 777" in text
    assert ">line number 3000<" in browser.get(f"{url(name)}/lines?from=2999")


def test_a_download_says_how_much_has_come(peer: Peer, browser: Browser, name: str) -> None:
    peer.registered(name, **OURS)
    deployment = order(peer, name)
    peer.report(name, deployment, RUNNING, step="downloading", closureSize=9_000_000)
    assert "Downloading 9 MB" in words(browser.get(url(name)))
    listed = [f"  {path}" for path in STORE_PATHS[:3]]
    estimate = "these 3 paths will be fetched (30.00 MiB download, 60.00 MiB unpacked):"
    peer.log(name, deployment, 0, [estimate, *listed])
    assert "Downloading 0 of 31 MB" in words(browser.get(url(name)))
    copies = [f"copying path '{path}' from 'http://cache'..." for path in STORE_PATHS[:2]]
    peer.log(name, deployment, 4, copies)
    assert "Downloading 10 of 31 MB" in words(browser.get(url(name)))
    peer.report(name, deployment, RUNNING, step="activating")
    assert "Activating" in words(browser.get(url(name)))


def test_a_failure_opens_the_log_at_the_first_error(
    peer: Peer, browser: Browser, name: str
) -> None:
    peer.registered(name, **OURS)
    deployment = order(peer, name)
    peer.report(name, deployment, RUNNING, step="activating")
    lines = [f"line {number}" for number in range(1000)]
    lines[400] = "\x1b[31;1merror:\x1b[0m it broke"
    peer.log(name, deployment, 0, lines)
    peer.report(
        name, deployment, FAILED, step="rolled-back", outcome="rolled-back", reason="it broke\nso"
    )
    page = browser.get(url(name))
    assert 'data-at="L401"' in page and 'id="L401"' in page
    assert "<title>Failed, rolled back" in page and "Failed: it broke. Rolled back." in words(page)


def test_a_retry_asks_where_a_newer_deployment_exists(
    peer: Peer, browser: Browser, name: str
) -> None:
    peer.registered(name, **OURS)
    peer.report(name, order(peer, name), FAILED, reason="no")
    assert "waiting" in words(browser.post(f"{url(name)}/retry"))
    assert browser.last.url.endswith(url(name, 2))
    peer.report(name, peer.http("GET", url(name, 2)).json()["id"], FAILED, reason="no")
    assert "Deployment 2 is newer" in words(browser.post(f"{url(name)}/retry"))
    browser.post(f"{url(name)}/retry", sure="yes")
    facts = peer.http("GET", url(name, 3)).json()
    assert (facts["retryOf"], facts["startedBy"]) == (1, "anna")
    browser.post(f"{url(name, 3)}/retry", 409)  # it has not ended


def test_cancelling_follows_the_rules(peer: Peer, browser: Browser, name: str) -> None:
    peer.registered(name, **OURS)
    order(peer, name)
    assert "Cancelled: nothing was changed" in words(browser.post(f"{url(name)}/cancel"))
    second = order(peer, name)
    peer.report(name, second, RUNNING, step="activating")
    assert "too late" in words(browser.get(url(name, 2)))
    assert "too late" in words(browser.post(f"{url(name, 2)}/cancel", 409))


def test_a_viewer_reads_and_changes_nothing(peer: Peer, server: Server, name: str) -> None:
    peer.registered(name, **OURS)
    peer.report(name, order(peer, name), FAILED, reason="no")
    viewer = Browser(server, "vera", VIEWER)
    assert "Retry" not in words(viewer.get(url(name)))
    assert "this takes an operator" in words(viewer.post(f"{url(name)}/retry", 403))


# --- runs -----------------------------------------------------------------------------------------


def test_a_run_shows_what_failed_first_and_retries_that(
    peer: Peer, browser: Browser, name: str
) -> None:
    names = [f"{name}-{letter}" for letter in "abc"]
    for each in names:
        peer.registered(each, **OURS)
    source = {
        "commit": "a1b2c3d4e5",
        "branch": "main",
        "title": "Mend <it>",
        "url": "https://git.example/c",
        "job": "javascript:alert(1)",
    }
    body = {"agents": dict.fromkeys(names, STORE_PATHS[0]), "source": source}
    peer.http("POST", "/api/v2/deploy/activate", json=body)
    result = [peer.http("GET", url(each)).json() for each in names]
    run = result[0]["run"]
    assert {each["run"] for each in result} == {run}
    assert (
        result[0]["startedBy"].startswith("CI (token ") and "main@a1b2c3d" in result[0]["startedBy"]
    )
    peer.report(names[0], result[0]["id"], SUCCEEDED)
    peer.report(names[2], result[2]["id"], FAILED, outcome="nothing-changed", reason="no\nspace")
    page = browser.get(f"/runs/{run}")
    rows = re.findall('data-key="([^"]+)"', page)
    assert rows == [names[2], names[1], names[0]] and "javascript" not in page
    assert f"<title>1 failed, nothing changed: Run {run}" in page
    assert 'href="https://git.example/c"' in page and "Mend &lt;it&gt;" in page
    browser.post(f"/runs/{run}/retry")
    assert re.findall('data-key="([^"]+)"', browser.last.text) == [names[2]]
    assert f"of run {run}" in words(browser.last.text)


def test_a_run_is_rolled_back_to_what_ran_before(peer: Peer, browser: Browser, name: str) -> None:
    names = [f"{name}-{letter}" for letter in "ab"]
    for path in (0, 1):
        for each in names:
            peer.registered(each, **OURS)
        ids = peer.activate(dict.fromkeys(names, STORE_PATHS[path]))
        for each in names:
            peer.report(each, ids[each], SUCCEEDED, outcome="succeeded")
    facts = peer.status(ids[names[0]])
    assert facts["before"] == STORE_PATHS[0]
    plan = words(browser.get(f"/runs/{facts['run']}/roll-back"))
    assert "system-b" in plan and "system-a" in plan
    browser.post(f"/runs/{facts['run']}/roll-back", 409)  # none was chosen
    browser.post(f"/runs/{facts['run']}/roll-back", name=names[0])
    back = peer.http("GET", url(names[0], 3)).json()
    assert (back["storePath"], back["run"] > facts["run"]) == (STORE_PATHS[0], True)
    assert peer.http("GET", url(names[1], 3)).status_code == 404


# --- deploying by hand ----------------------------------------------------------------------------


def test_a_path_is_deployed_by_hand(peer: Peer, browser: Browser, name: str) -> None:
    peer.registered(name, **OURS)
    assert name in browser.get("/start")
    page = words(browser.get(f"/start/confirm?name={name}&path={STORE_PATHS[2]}"))
    assert f"Deploy to {name}" in page and "no cache of this workspace has it" in page
    browser.post("/start", name=name, path=STORE_PATHS[2])
    assert peer.http("GET", url(name)).json()["storePath"] == STORE_PATHS[2]


@pytest.mark.parametrize("path", ["", "result", "/nix/store/short", "/etc/passwd"])
def test_what_is_no_path_is_not_deployed(peer: Peer, browser: Browser, path: str) -> None:
    peer.registered("some", **OURS)
    assert "store path" in words(browser.get(f"/start/confirm?name=some&path={path}", 400))
    browser.post("/start", 400, name="some", path=path)
