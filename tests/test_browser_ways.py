"""A new user's first steps by keyboard alone, and on a machine with a real systemd."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from browser import Browser
from containers import Container
from newcomer import MARK, Newcomer
from selenium.webdriver.common.keys import Keys

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

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


def test_by_keyboard_alone(newcomer: Newcomer) -> None:
    browser = newcomer.browser
    browser.open(newcomer.link())
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
    newcomer.workspace.cli("agent", "label", "attic", "copied")  # a change does not take the focus
    browser.wait_for(lambda: browser.run(FOCUSED)[0] == "Copy", "the button to be itself again")
    tab_to(browser, "systemd")
    browser.press(Keys.ENTER)
    assert browser.find("#systemd-start").is_displayed()


# --- a machine with systemd -----------------------------------------------------------------------

# Debian's smallest tree has no curl: these few lines do what the block needs of it.
CURL = """\
#!/usr/bin/python3
import sys, urllib.request
fail, o, target, url = sys.argv[1:]
assert (fail, o) == ("-fsS", "-o"), sys.argv
urllib.request.urlretrieve(url, target)
"""


def shell(container: Container, text: str, typed: str = "") -> str:
    """Paste into a shell of root on the container, and type; what it prints."""
    process = container.popen(
        ["/bin/sh", "-c", text],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    out, _ = process.communicate(typed, timeout=60)
    assert process.returncode == 0, out
    return str(out)


def test_the_systemd_block(newcomer: Newcomer, tree: Path, tmp_path: Path) -> None:
    browser = newcomer.browser
    with Container(tmp_path / "container", tree, boot=False) as container:
        container.write("/usr/local/bin/curl", CURL, 0o755)
        container.boot()
        browser.open(newcomer.link())
        browser.click("Sign in to workspace as admin")
        browser.click("Add an agent")
        browser.fill("Name of the machine", "shed")
        browser.click("Generate")
        browser.click("systemd")
        newcomer.look()
        assert "cachix-deploy.new: OK" in shell(container, newcomer.block("systemd-get"))
        token = newcomer.block("token")
        assert token not in newcomer.block("systemd-token") + newcomer.block("systemd-start")
        shell(container, newcomer.block("systemd-token"), f"{token}\n")
        assert container.path("/etc/cachix-agent.token").stat().st_mode & 0o777 == 0o600
        shell(container, newcomer.block("systemd-start"))
        browser.wait_for_text("shed is connected", timeout=60)
        browser.click("shed")
        browser.run(MARK)
        container.poweroff()
        browser.wait_for(lambda: "offline" in browser.find("#state").text, "the machine to go", 60)
        container.boot()
        browser.wait_for_text("connected just now", timeout=60)
        assert browser.run("return window.marked"), "without a reload"
