"""From a workspace that was just started to deployed agents, by what the pages say alone.

The workspace, the agents and their Nix are real. The one person has a browser, and a shell on each
machine.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import closures
import pytest
from browser import Browser, browsing, need_browser
from caches import Files, Key
from hosts import Host, Program, command
from live import Workspace
from selenium.webdriver.common.keys import Keys

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

GO_ON = "/nix/var/go"  # the test makes this file to let an activation go on
REFUSED = "the server responded with a status of 4"
MARK = "window.marked = true"  # gone after a reload


@dataclass
class World:
    """A workspace that nobody has signed in to, a browser, and a machine without an agent."""

    workspace: Workspace
    browser: Browser
    host: Host

    def link(self, *who: str) -> str:
        """A link to sign in by, as a command prints it."""
        printed = self.workspace.cli("login-link", *who)
        match = re.search(r"https?://\S+/sign-in/\S+", printed)
        assert match, printed
        return match[0]

    def look(self) -> None:
        """Check the page that is open."""
        browser = self.browser
        assert browser.axe() == [], browser.path
        assert browser.overflow() == [], browser.path
        found = [one for one in browser.complaints() if REFUSED not in one]
        assert found == [], browser.path

    def block(self, id: str) -> str:
        """What a block of the page has for pasting."""
        return str(self.browser.find(f"pre#{id}").get_attribute("textContent"))

    def paste(self, text: str, name: str) -> Program:
        """Paste into a shell on the machine."""
        home = self.host.directory
        return self.host.start(name, ["/bin/sh", "-c", text], cwd=home)


@pytest.fixture
def world(tmp_path: Path, make_workspace: Callable[..., Workspace], host: Host) -> Iterator[World]:
    need_browser()
    workspace = Workspace(tmp_path / "workspace")
    workspace.serve()
    try:
        with browsing(tmp_path / "browser") as browser:
            yield World(workspace, browser, host)
    finally:
        workspace.kill()


def test_from_the_first_link_on(world: World, tmp_path: Path) -> None:
    sign_in(world)
    files = make_cache(world, tmp_path)
    agent = try_it_now(world)
    token = make_token(world)
    first = deploy_and_watch(world, files, token)
    fail_and_retry(world, files, token)
    wait_and_cancel(world)
    roll_back(world, files, token, first)
    freeze(world, token, first)
    invite_a_viewer(world, tmp_path)
    revoke(world, agent)
    sign_out(world)


def sign_in(world: World) -> None:
    browser = world.browser
    assert world.workspace.program is not None
    said = world.workspace.program.output.read_text()
    assert "nobody has signed in yet: run `cachix-workspace login-link`" in said
    browser.open(world.workspace.url)
    browser.wait_for_text("Sign in to workspace", "cachix-workspace login-link")
    world.look()
    link = world.link()
    for _ in range(2):  # to look at it, as previews in chats do, uses nothing up
        browser.open(link)
        world.look()
    browser.click("Sign in to workspace as admin")
    browser.wait_for(lambda: browser.path == "/welcome", "the first steps")
    world.look()
    browser.fill("Name", "the garage")
    browser.click("Save")
    browser.wait_for(lambda: browser.title.endswith("the garage"), "the new name")
    assert "so that it works from here" in browser.text


def make_cache(world: World, tmp_path: Path) -> Files:
    browser = world.browser
    browser.click("Create the cache")
    browser.wait_for_text("It is not shown again")
    world.look()
    secret = world.block("secret-key")
    browser.click("Go on")
    browser.wait_for(lambda: browser.path == "/welcome", "the first steps")
    return Files(tmp_path / "files", Key.parse(secret))


def try_it_now(world: World) -> Program:
    browser = world.browser
    browser.click("Add an agent")
    world.look()
    browser.fill("Name of the machine", "web")
    browser.fill("Labels", "prod")
    browser.click("Generate")
    browser.wait_for_text("Waiting for web to connect")
    world.look()
    browser.run(MARK)
    agent = world.paste(world.block("try-now"), "try-now")
    browser.wait_for_text("web is connected", timeout=60)
    assert browser.run("return window.marked"), "without a reload"
    assert browser.find("#outcome").get_attribute("textContent") == "web is connected"
    assert browser.title.startswith("Connected: web")
    browser.click("web")
    browser.wait_for_text("Nothing was deployed to it yet")
    world.look()
    return agent


def make_token(world: World) -> str:
    browser = world.browser
    browser.click("CI")
    world.look()
    browser.click("make one")
    browser.fill("Description", "the CI of the garage")
    browser.click("Make the token")
    browser.wait_for_text("CACHIX_ACTIVATE_TOKEN")
    world.look()
    return world.block("token")


def push(world: World, files: Files, token: str, path: str) -> None:
    """Upload, as the push line of the pages does by `nix copy`."""
    files.push(f"{world.workspace.url}/cache/main", token, path)


def order(world: World, path: str) -> None:
    """Start a deployment of a path to web, and go to its page."""
    browser = world.browser
    browser.click("Deploy", "nav//a")
    browser.find("input[name=name][value=web]").click()
    browser.wait_for(lambda: browser.find_all(f"input[value='{path}']"), "the path")
    browser.find(f"input[name=recent][value='{path}']").click()
    browser.click("Next: see what changes")
    browser.wait_for_text("Runs now", "Then")
    world.look()
    browser.click("Deploy to web")
    browser.wait_for(lambda: browser.path.startswith("/runs/"), "the run")
    world.look()
    browser.click("web")
    browser.wait_for_text("deployment")


def deploy_and_watch(world: World, files: Files, token: str) -> str:
    browser = world.browser
    script = f"echo the pumps start; {closures.wait_for(GO_ON)}; echo the pumps run"
    system = closures.nixos(files, "first", after=script)
    push(world, files, token, system)
    order(world, system)
    browser.run(MARK)
    browser.wait_for_text("the pumps start", timeout=60)
    assert "the pumps run" not in browser.text
    browser.wait_for(lambda: browser.title.startswith("Under way: web 1"), "the title")
    world.look()
    world.host.path(GO_ON).touch()
    browser.wait_for_text("the pumps run", "Succeeded in", timeout=60)
    browser.wait_for(lambda: browser.title.startswith("Succeeded: web 1"), "the title")
    assert browser.run("return window.marked"), "without a reload"
    world.look()
    assert world.host.running() == system
    return system


def fail_and_retry(world: World, files: Files, token: str) -> None:
    browser = world.browser
    system = closures.nixos(files, "bad", before="echo 'error: the well is dry' >&2; exit 2")
    push(world, files, token, system)
    before = world.host.running()
    order(world, system)
    browser.wait_for(lambda: browser.title.startswith("Failed"), "the failure", timeout=60)
    browser.wait_for_text("Failed", f"Rolled back to {before}, which runs now", "the well is dry")
    assert browser.find(".log .line.error").is_displayed()
    world.look()
    browser.click("Retry")
    browser.wait_for(lambda: "web 3" in browser.title, "the retry")
    browser.wait_for(lambda: browser.title.startswith("Failed"), "the failure", timeout=60)
    assert world.host.running() == before
    browser.open(world.workspace.url)
    assert browser.title.startswith("1 failed")
    world.look()


def wait_and_cancel(world: World) -> None:
    browser = world.browser
    browser.click("web")
    browser.click("Pause")
    browser.wait_for_text("paused just now by admin: its deployments wait")
    browser.click("Deploy again")
    browser.wait_for_text("waiting")
    browser.open(world.workspace.url + "/agents/web/deployments/4")
    browser.wait_for_text("Waiting for web: paused since")
    world.look()
    browser.click("Cancel")
    browser.wait_for(lambda: browser.title.startswith("Cancelled: web 4"), "the cancellation")
    browser.open(world.workspace.url + "/agents/web")
    browser.click("Resume")
    browser.wait_for(lambda: "paused" not in browser.text, "the agent to go on")


def roll_back(world: World, files: Files, token: str, first: str) -> None:
    browser = world.browser
    system = closures.nixos(files, "second")
    push(world, files, token, system)
    order(world, system)
    browser.wait_for_text("Succeeded in", timeout=60)
    assert world.host.running() == system
    browser.click("Runs", "nav//a")
    world.look()
    browser.find("#rows td.name a").click()
    browser.click("Roll back this run …")
    browser.wait_for_text("Each agent goes back to what ran before this run")
    world.look()
    browser.click("Roll back the selected")
    browser.wait_for_text("1 succeeded", timeout=60)
    assert world.host.running() == first


def freeze(world: World, token: str, path: str) -> None:
    browser = world.browser
    browser.open(world.workspace.url)
    browser.click("Freeze…")
    world.look()
    browser.fill("Why", "the fair is on")
    browser.click("Freeze the workspace")
    browser.wait_for_text("Frozen just now by admin: the fair is on. Nobody can deploy")
    world.look()
    spec = world.host.directory / "deploy.json"
    spec.write_text(f'{{"agents": {{"web": "{path}"}}}}')
    argv = [*command("cachix-deploy"), "--host", world.workspace.url, "activate", str(spec)]
    environment = {**os.environ, "CACHIX_ACTIVATE_TOKEN": token}
    refused = subprocess.run(
        argv, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert refused.returncode == 1 and "the fair is on" in refused.stderr, refused
    browser.click("Thaw")
    browser.click("Thaw the workspace")
    browser.wait_for(lambda: "Frozen" not in browser.text, "the workspace to thaw")


def invite_a_viewer(world: World, tmp_path: Path) -> None:
    browser = world.browser
    browser.click("People")
    browser.fill("Name", "vera")
    browser.click("Add the person")
    browser.wait_for_text("Link for vera")
    world.look()
    link = world.block("link")
    with browsing(tmp_path / "another") as other:
        other.open(link)
        other.click("Sign in to the garage as vera")
        other.wait_for_text("vera, viewer", "web")
        assert "Freeze…" not in other.text and not other.find_all("input[type=checkbox]")
        for path in ("/start", "/tokens", "/people", "/freeze", "/add"):
            other.open(world.workspace.url + path)
            assert other.title.startswith("Not allowed"), path
        other.open(world.workspace.url + "/agents/web/deployments/2")
        assert "the well is dry" in other.text and "Retry" not in other.text
        other.open(link)
        assert "was used already" in other.text and "login-link" in other.text
        browser.open(world.workspace.url + "/settings")
        world.look()
        row = "//tr[td[contains(., 'vera')]]//button[normalize-space()='End']"
        browser.driver.find_element("xpath", row).click()
        browser.wait_for(lambda: "vera" not in browser.text, "the end of the session")
        other.open(world.workspace.url + "/runs")
        assert other.path.startswith("/sign-in"), "the session has ended"


def revoke(world: World, agent: Program) -> None:
    browser = world.browser
    browser.click("Tokens")
    used = "//tr[td[contains(., 'the agent web')]]/td[@data-name='Last used']"
    assert "ago" in browser.driver.find_element("xpath", used).text
    world.look()
    row = "//tr[td[contains(., 'the agent web')]]//a[normalize-space()='Revoke…']"
    browser.driver.find_element("xpath", row).click()
    world.look()
    browser.find("button.danger").click()
    agent.wait_for("this token is revoked")
    browser.open(world.workspace.url + "/agents/web")
    browser.wait_for_text("offline")


def sign_out(world: World) -> None:
    browser = world.browser
    browser.click("Sign out")
    browser.wait_for(lambda: browser.path.startswith("/sign-in"), "the sign-in page")
    browser.open(world.workspace.url + "/runs/1")
    assert browser.path.startswith("/sign-in?next="), "nobody sees anything"
    assert "web" not in browser.text
    browser.open(world.link())
    browser.click("Sign in to the garage as admin")
    browser.wait_for(lambda: browser.path == "/", "the overview")


# --- by keyboard alone ----------------------------------------------------------------------------

FOCUSED = """
const one = document.activeElement, box = one.getBoundingClientRect();
const style = getComputedStyle(one), label = one.labels && one.labels[0];
return [(label ? label.textContent : one.textContent).trim(), one.id,
        style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2,
        box.bottom > 0 && box.top < innerHeight];
"""


BESIDE = "return document.activeElement.parentElement.querySelector('#' + arguments[0]) !== null"


def tab_to(browser: Browser, name: str, id: str = "") -> None:
    """Press Tab until what has this name, and lies in the element `id`, is focused."""
    seen = []
    for _ in range(60):
        browser.press(Keys.TAB)
        text, _id, is_outlined, is_in_view = browser.run(FOCUSED)
        seen.append(text)
        assert is_outlined, f"{text!r} is focused, and one does not see it"
        assert is_in_view, f"{text!r} is focused, and out of view"
        inside = not id or browser.run(BESIDE, id)
        if text.startswith(name) and inside:
            return
    raise AssertionError(f"Tab does not reach {name!r}, but {seen}")


def test_by_keyboard_alone(world: World) -> None:
    browser = world.browser
    browser.open(world.link())
    tab_to(browser, "Sign in to workspace as admin")
    browser.press(Keys.ENTER)
    browser.wait_for(lambda: browser.path == "/welcome", "the first steps")
    tab_to(browser, "Add an agent")
    browser.press(Keys.ENTER)
    browser.wait_for(lambda: browser.path == "/add", "the form")
    tab_to(browser, "Name of the machine")
    browser.press(*"attic")
    tab_to(browser, "Generate")
    browser.press(Keys.ENTER)
    browser.wait_for_text("Waiting for attic to connect")
    tab_to(browser, "Copy", "try-now")
    browser.press(Keys.ENTER)
    browser.wait_for(lambda: browser.run(FOCUSED)[0] == "Copied", "the copy")
    world.workspace.cli("agent", "label", "attic", "copied")  # a change does not take the focus
    browser.wait_for(lambda: browser.run(FOCUSED)[0] == "Copy", "the button to be itself again")
    tab_to(browser, "systemd")
    browser.press(Keys.ENTER)
    assert browser.find("#systemd-start").is_displayed()
