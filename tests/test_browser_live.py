"""Open pages that follow what changes: rows, focus, tabs, and a stream that is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, browsing, need_browser
from exhibits import Gallery, gallery, number_id, stamp
from pages_support import cookie_of
from selenium.webdriver.common.keys import Keys
from workspace_support import Peer, Server

from cachix_workspace.pages import events
from cachix_workspace.tables import agents

pytestmark = [pytest.mark.long, pytest.mark.timeout(180)]

ORDER = "return [...document.querySelectorAll('#rows > tr')].map((row) => row.dataset.key)"
MARK = "window.marked = true"  # gone after a reload
HIDE = """
Object.defineProperty(document, "hidden", {configurable: true, get: () => arguments_[0]});
document.dispatchEvent(new Event("visibilitychange"));
""".replace("arguments_[0]", "window.isHidden")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gallery]:
    monkeypatch.setattr(events, "QUIET", 0.5)  # streams whose page has gone are seen soon
    with gallery(tmp_path / "data", 12, with_cache=False) as site:
        yield site


@pytest.fixture
def browser(tmp_path: Path, site: Gallery) -> Iterator[Browser]:
    need_browser()
    with browsing(tmp_path / "browser") as browser:
        browser.sign_in(site.url, site.cookie())
        browser.open(site.url + "/")
        browser.wait_for(lambda: streams() == 1, "the stream")
        yield browser


def streams() -> int:
    return events.readers.count()


def change(site: Gallery, name: str, **values: object) -> None:
    """Change an agent as the workspace does."""
    with site.workspace.database.write() as connection:
        mine = agents.c.id == number_id("agent", name)
        assert connection.execute(agents.update().where(mine).values(**values)).rowcount == 1
    site.workspace.note_agents(number_id("agent", name))


def test_a_row_changes_in_place(browser: Browser, site: Gallery) -> None:
    before = browser.run(ORDER)
    browser.run(MARK)
    change(site, "web-1", connected=False, seen_on=stamp(60))
    browser.wait_for(lambda: "offline" in browser.find("#row-web-1").text, "the row to change")
    assert browser.run(ORDER) == before, "no row moves by itself"
    assert "3 offline" in browser.find("#counts").text
    status = browser.find("#outcome")
    assert "3 offline" in status.get_attribute("textContent")  # read to whoever does not see it
    assert status.get_attribute("aria-live") == "polite"
    assert browser.run("return window.marked"), "without a reload"
    browser.click("1 changed: sort again", "a")
    after = browser.run(ORDER)
    assert set(after) == set(before) and after.index("web-1") < before.index("web-1")


def test_focus_selection_and_words_survive(browser: Browser, site: Gallery) -> None:
    browser.find("input[aria-label='Select mail-2']").click()
    browser.fill("Find", "half a wo")
    browser.run("document.querySelector('#row-web-1 a').focus()")
    top = browser.run("return document.activeElement.getBoundingClientRect().top")
    for moment in (60, 7200):
        change(site, "web-1", connected=False, seen_on=stamp(moment), labels=f",l{moment},")
        browser.wait_for(lambda m=moment: f"l{m}" in browser.find("#row-web-1").text, "the label")
    assert browser.run("return document.activeElement.textContent") == "web-1"
    assert browser.run("return document.activeElement.getBoundingClientRect().top") == top
    assert browser.field("Find").get_attribute("value") == "half a wo"
    assert browser.find("input[aria-label='Select mail-2']").is_selected()
    assert "1 selected:" in browser.find("#bar").text
    browser.press(Keys.ENTER)
    browser.wait_for(lambda: browser.path == "/agents/web-1", "the agent's page")


def test_agents_come_and_go_without_a_reload(browser: Browser, site: Gallery) -> None:
    browser.run(MARK)
    with site.workspace.database.write() as connection:
        connection.execute(agents.update().where(agents.c.name == "build-2").values(name="zoo"))
    site.workspace.note_agents(number_id("agent", "build-2"))
    browser.wait_for(lambda: browser.run(ORDER)[-1] == "zoo", "the new row, which comes last")
    assert "build-2" not in browser.run(ORDER) and browser.run("return window.marked")


def test_tabs_share_one_stream(browser: Browser, site: Gallery) -> None:
    first = browser.driver.current_window_handle
    browser.driver.switch_to.new_window("tab")
    browser.open(site.url + "/agents/web-1")
    second = browser.driver.current_window_handle
    change(site, "web-1", labels=",both,")
    browser.wait_for(lambda: "both" in browser.find("#state").text, "the second tab to change")
    browser.driver.switch_to.window(first)
    browser.wait_for(lambda: "both" in browser.find("#row-web-1").text, "the first tab to change")
    browser.wait_for(lambda: streams() == 1, "one stream")
    browser.driver.close()  # the tab that has the stream: the other one takes over
    browser.driver.switch_to.window(second)
    change(site, "web-1", labels=",later,")
    browser.wait_for(lambda: "later" in browser.find("#state").text, "the other tab to change")
    browser.wait_for(lambda: streams() == 1, "one stream")


def test_a_hidden_tab_has_no_stream(browser: Browser, site: Gallery) -> None:
    browser.run("window.isHidden = true;" + HIDE)  # a browser without a window hides no tab
    browser.wait_for(lambda: streams() == 0, "the stream to end")
    change(site, "web-1", labels=",meanwhile,")
    browser.run("window.isHidden = false;" + HIDE)
    browser.wait_for(lambda: "meanwhile" in browser.find("#row-web-1").text, "what was missed")
    browser.wait_for(lambda: streams() == 1, "the stream")
    assert not browser.find("#stream").is_displayed()


def test_frozen_shows_everywhere(browser: Browser, site: Gallery) -> None:
    site.freeze("the fair is on <b>until Monday</b>")
    browser.wait_for_text("Frozen just now by anna: the fair is on <b>until Monday</b>")
    assert browser.axe() == []


def test_a_lost_stream_is_told_and_comes_back(tmp_path: Path) -> None:
    need_browser()
    data = tmp_path / "data"
    server = Server(data, "--public-url=http://127.0.0.1")
    server.argv = [one.replace("127.0.0.1:0", f"127.0.0.1:{server.port}") for one in server.argv]
    try:
        with browsing(tmp_path / "browser") as browser:
            browser.sign_in(server.url, cookie_of(server, "anna"))
            Peer(server).registered("web").close()
            browser.open(server.url + "/")
            browser.run(MARK)
            assert not browser.find("#stream").is_displayed()
            server.stop()
            browser.wait_for_text("The workspace restarts. Showing ", "reconnecting")
            server.start()
            browser.wait_for(lambda: not browser.find("#stream").is_displayed(), "the stream")
            peer = Peer(server)
            other = peer.registered("other")
            browser.wait_for(lambda: "other" in browser.run(ORDER), "what came afterwards")
            assert browser.run("return window.marked")
            other.close()
    finally:
        server.kill()
