"""From a workspace that was just started to deployed agents, by what the pages say alone.

The workspace, the agents and their Nix are real.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import closures
import pytest
from browser import browsing
from caches import Files, Key
from hosts import Program, command
from newcomer import MARK, Newcomer

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

GO_ON = "/nix/var/go"  # the test makes this file to let an activation go on


def test_from_the_first_link_on(newcomer: Newcomer, tmp_path: Path) -> None:
    sign_in(newcomer)
    files = make_cache(newcomer, tmp_path)
    agent = try_it_now(newcomer)
    token = make_token(newcomer)
    first = deploy_and_watch(newcomer, files, token)
    fail_and_retry(newcomer, files, token)
    wait_and_cancel(newcomer)
    roll_back(newcomer, files, token, first)
    freeze(newcomer, token, first)
    invite_a_viewer(newcomer, tmp_path)
    revoke(newcomer, agent)
    sign_out(newcomer)


def sign_in(newcomer: Newcomer) -> None:
    browser = newcomer.browser
    assert newcomer.workspace.program is not None
    text = newcomer.workspace.program.output.read_text()
    assert "nobody has signed in yet: run `cachix-workspace login-link`" in text
    browser.open(newcomer.workspace.url)
    browser.wait_for_text("Sign in to workspace", "cachix-workspace login-link")
    newcomer.look()
    link = newcomer.link()
    for _ in range(2):  # to look at it, as previews in chats do, uses nothing up
        browser.open(link)
        newcomer.look()
    browser.click("Sign in to workspace as admin")
    browser.wait_for(lambda: browser.path == "/welcome", "the first steps")
    newcomer.look()
    browser.fill("Name", "the garage")
    browser.click("Save")
    browser.wait_for(lambda: browser.title.endswith("the garage"), "the new name")
    assert "so that it works from here" in browser.text


def make_cache(newcomer: Newcomer, tmp_path: Path) -> Files:
    browser = newcomer.browser
    browser.click("Create the cache")
    browser.wait_for_text("It is not shown again")
    newcomer.look()
    secret = newcomer.block("secret-key")
    browser.click("Go on")
    browser.wait_for(lambda: browser.path == "/welcome", "the first steps")
    return Files(tmp_path / "files", Key.parse(secret))


def try_it_now(newcomer: Newcomer) -> Program:
    browser = newcomer.browser
    browser.click("Add an agent")
    newcomer.look()
    browser.fill("Name of the machine", "web")
    browser.fill("Labels", "prod")
    browser.click("Generate")
    browser.wait_for_text("Waiting for web to connect")
    newcomer.look()
    browser.run(MARK)
    agent = newcomer.paste(newcomer.block("try-now"), "try-now")
    browser.wait_for_text("web is connected", timeout=60)
    assert browser.run("return window.marked"), "without a reload"
    assert browser.find("#outcome").get_attribute("textContent") == "web is connected"
    assert browser.title.startswith("Connected: web")
    browser.click("web")
    browser.wait_for_text("Nothing was deployed to it yet")
    newcomer.look()
    return agent


def make_token(newcomer: Newcomer) -> str:
    browser = newcomer.browser
    browser.click("CI")
    newcomer.look()
    browser.click("make one")
    browser.fill("Description", "the CI of the garage")
    browser.click("Make the token")
    browser.wait_for_text("CACHIX_ACTIVATE_TOKEN")
    newcomer.look()
    return newcomer.block("token")


def push(newcomer: Newcomer, files: Files, token: str, path: str) -> None:
    """Upload, as the push line of the pages does by `nix copy`."""
    files.push(f"{newcomer.workspace.url}/cache/main", token, path)


def order(newcomer: Newcomer, path: str) -> None:
    """Start a deployment of a path to web, and go to its page."""
    browser = newcomer.browser
    browser.click("Deploy", "nav//a")
    browser.find("input[name=name][value=web]").click()
    browser.wait_for(lambda: browser.find_all(f"input[value='{path}']"), "the path")
    browser.find(f"input[name=recent][value='{path}']").click()
    browser.click("Next: see what changes")
    browser.wait_for_text("Runs now", "Then")
    newcomer.look()
    browser.click("Deploy to web")
    browser.wait_for(lambda: browser.path.startswith("/runs/"), "the run")
    newcomer.look()
    browser.click("web")
    browser.wait_for_text("deployment")


def deploy_and_watch(newcomer: Newcomer, files: Files, token: str) -> str:
    browser = newcomer.browser
    script = f"echo the pumps start; {closures.wait_for(GO_ON)}; echo the pumps run"
    system = closures.nixos(files, "first", after=script)
    push(newcomer, files, token, system)
    order(newcomer, system)
    browser.run(MARK)
    browser.wait_for_text("the pumps start", timeout=60)
    assert "the pumps run" not in browser.text
    browser.wait_for(lambda: browser.title.startswith("Under way: web 1"), "the title")
    newcomer.look()
    newcomer.host.path(GO_ON).touch()
    browser.wait_for_text("the pumps run", "Succeeded in", timeout=60)
    browser.wait_for(lambda: browser.title.startswith("Succeeded: web 1"), "the title")
    assert browser.run("return window.marked"), "without a reload"
    newcomer.look()
    assert newcomer.host.running() == system
    return system


def fail_and_retry(newcomer: Newcomer, files: Files, token: str) -> None:
    browser = newcomer.browser
    system = closures.nixos(files, "bad", before="echo 'error: the well is dry' >&2; exit 2")
    push(newcomer, files, token, system)
    before = newcomer.host.running()
    order(newcomer, system)
    browser.wait_for(lambda: browser.title.startswith("Failed"), "the failure", timeout=60)
    browser.wait_for_text("Failed", f"Rolled back to {before}, which runs now", "the well is dry")
    assert browser.find(".log .line.error").is_displayed()
    newcomer.look()
    browser.click("Retry")
    browser.wait_for(lambda: "web 3" in browser.title, "the retry")
    browser.wait_for(lambda: browser.title.startswith("Failed"), "the failure", timeout=60)
    assert newcomer.host.running() == before
    browser.open(newcomer.workspace.url)
    assert browser.title.startswith("1 failed")
    newcomer.look()


def wait_and_cancel(newcomer: Newcomer) -> None:
    browser = newcomer.browser
    browser.click("web")
    browser.click("Pause")
    browser.wait_for_text("paused just now by admin: its deployments wait")
    browser.click("Deploy again")
    browser.wait_for_text("waiting")
    browser.open(newcomer.workspace.url + "/agents/web/deployments/4")
    browser.wait_for_text("Waiting for web: paused since")
    newcomer.look()
    browser.click("Cancel")
    browser.wait_for(lambda: browser.title.startswith("Cancelled: web 4"), "the cancellation")
    browser.open(newcomer.workspace.url + "/agents/web")
    browser.click("Resume")
    browser.wait_for(lambda: "paused" not in browser.text, "the agent to go on")


def roll_back(newcomer: Newcomer, files: Files, token: str, first: str) -> None:
    browser = newcomer.browser
    system = closures.nixos(files, "second")
    push(newcomer, files, token, system)
    order(newcomer, system)
    browser.wait_for_text("Succeeded in", timeout=60)
    assert newcomer.host.running() == system
    browser.click("Runs", "nav//a")
    newcomer.look()
    browser.find("#rows td.name a").click()
    browser.click("Roll back this run …")
    browser.wait_for_text("Each agent goes back to what ran before this run")
    newcomer.look()
    browser.click("Roll back the selected")
    browser.wait_for_text("1 succeeded", timeout=60)
    assert newcomer.host.running() == first


def freeze(newcomer: Newcomer, token: str, path: str) -> None:
    browser = newcomer.browser
    browser.open(newcomer.workspace.url)
    browser.click("Freeze…")
    newcomer.look()
    browser.fill("Why", "the fair is on")
    browser.click("Freeze the workspace")
    browser.wait_for_text("Frozen just now by admin: the fair is on. Nobody can deploy")
    newcomer.look()
    spec = newcomer.host.directory / "deploy.json"
    spec.write_text(f'{{"agents": {{"web": "{path}"}}}}')
    argv = [*command("cachix-deploy"), "--host", newcomer.workspace.url, "activate", str(spec)]
    environment = {**os.environ, "CACHIX_ACTIVATE_TOKEN": token}
    refused = subprocess.run(
        argv, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert refused.returncode == 1 and "the fair is on" in refused.stderr, refused
    browser.click("Thaw")
    browser.click("Thaw the workspace")
    browser.wait_for(lambda: "Frozen" not in browser.text, "the workspace to thaw")


def invite_a_viewer(newcomer: Newcomer, tmp_path: Path) -> None:
    browser = newcomer.browser
    browser.click("People")
    browser.fill("Name", "vera")
    browser.click("Add the person")
    browser.wait_for_text("Link for vera")
    newcomer.look()
    link = newcomer.block("link")
    with browsing(tmp_path / "another") as other:
        other.open(link)
        other.click("Sign in to the garage as vera")
        other.wait_for_text("vera, viewer", "web")
        assert "Freeze…" not in other.text and not other.find_all("input[type=checkbox]")
        for path in ("/start", "/tokens", "/people", "/freeze", "/add"):
            other.open(newcomer.workspace.url + path)
            assert other.title.startswith("Not allowed"), path
        other.open(newcomer.workspace.url + "/agents/web/deployments/2")
        assert "the well is dry" in other.text and "Retry" not in other.text
        other.open(link)
        assert "was used already" in other.text and "login-link" in other.text
        browser.open(newcomer.workspace.url + "/settings")
        newcomer.look()
        row = "//tr[td[contains(., 'vera')]]//button[normalize-space()='End']"
        browser.driver.find_element("xpath", row).click()
        browser.wait_for(lambda: "vera" not in browser.text, "the end of the session")
        other.open(newcomer.workspace.url + "/runs")
        assert other.path.startswith("/sign-in"), "the session has ended"


def revoke(newcomer: Newcomer, agent: Program) -> None:
    browser = newcomer.browser
    browser.click("Tokens")
    used = "//tr[td[contains(., 'the agent web')]]/td[@data-name='Last used']"
    assert browser.driver.find_element("xpath", used).text != "never"
    newcomer.look()
    row = "//tr[td[contains(., 'the agent web')]]//a[normalize-space()='Revoke…']"
    browser.driver.find_element("xpath", row).click()
    newcomer.look()
    browser.find("button.danger").click()
    agent.wait_for("this token is revoked")
    browser.open(newcomer.workspace.url + "/agents/web")
    browser.wait_for_text("offline")


def sign_out(newcomer: Newcomer) -> None:
    browser = newcomer.browser
    browser.click("Sign out")
    browser.wait_for(lambda: browser.path.startswith("/sign-in"), "the sign-in page")
    browser.open(newcomer.workspace.url + "/runs/1")
    assert browser.path.startswith("/sign-in?next="), "nobody sees anything"
    assert "web" not in browser.text
    browser.open(newcomer.link())
    browser.click("Sign in to the garage as admin")
    browser.wait_for(lambda: browser.path == "/", "the overview")
