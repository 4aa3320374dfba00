"""Every page in a real browser: axe-core, sizes, schemes, errors, titles; and without scripts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import WIDE, Browser, browsing, need_browser
from exhibits import Gallery, gallery, pages

from cachix_workspace.people import VIEWER

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

SHARDS = 4
SMALL = (360, 800)  # the narrowest that pages are for
REFUSED = "the server responded with a status of 4"  # the page says why, and is drawn all the same
TITLES = {
    "/": "1 rollback failed: Agents",
    "/agents/mail-1": "Rollback failed: mail-1",
    "/agents/web-1": "Well: web-1",
    "/agents/build-1/deployments/3": "Failed, rolled back: build-1 3",
    "/agents/db-1/deployments/4": "Under way: db-1 4",
    "/agents/web-2/deployments/4": "Lost: web-2 4",
    "/runs/3": "1 rollback failed: Run 3",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gallery]:
    with gallery(tmp_path_factory.mktemp("gallery") / "data", 12) as site:
        yield site


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    need_browser()
    with browsing(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser, site: Gallery) -> Browser:
    """A browser in which an admin is signed in. Cookies are the same for all ports of a host."""
    chromium.driver.delete_all_cookies()
    chromium.sign_in(site.url, site.cookie())
    chromium.resize(*WIDE)
    chromium.complaints()
    return chromium


def test_faults_would_be_found(browser: Browser, site: Gallery) -> None:
    browser.open(site.url + "/audit")
    browser.run(
        """const main = document.querySelector("main"), pale = document.createElement("p");
        const planted = '<img src="/static/x/icon.svg"><input id="nameless"><h6>6</h6>';
        main.insertAdjacentHTML("beforeend", planted);
        pale.textContent = "pale";
        pale.style.color = "#bbb";
        main.append(pale);"""
    )
    rules = {line.split()[0] for line in browser.axe()}
    assert {"image-alt", "label", "heading-order", "color-contrast"} <= rules
    assert browser.overflow() == []
    browser.run("document.querySelector('main').style.minWidth = '2000px'")
    assert len(browser.overflow()) > 1
    browser.run("setTimeout(() => { throw new Error('planted'); })")
    browser.run("const s = document.createElement('script'); s.text = '1'; document.body.append(s)")
    complaints = browser.wait_for(browser.complaints, "a complaint")
    complaints += browser.complaints()
    assert any("planted" in one for one in complaints), complaints
    assert any("Content Security Policy" in one for one in complaints), complaints


def check(browser: Browser, address: str) -> list[str]:
    """The faults of a page: wide and narrow, light and dark, enlarged."""
    browser.resize(*WIDE)
    browser.prefer("light")
    browser.open(address)
    faults = [f"light: {one}" for one in browser.axe()]
    browser.prefer("dark")
    faults += [f"dark: {one}" for one in browser.axe() if one.startswith("color-contrast")]
    browser.resize(*WIDE, zoom=2.0)
    faults += [f"at 200 %: {one}" for one in browser.overflow()]
    browser.resize(*SMALL)
    faults += [f"narrow: {one}" for one in (*browser.axe(), *browser.overflow())]
    return faults + [one for one in browser.complaints() if REFUSED not in one]


@pytest.mark.parametrize("shard", range(SHARDS))
def test_every_page(browser: Browser, site: Gallery, shard: int) -> None:
    faults = {}
    for path in pages(site.app)[shard::SHARDS]:
        if complaints := check(browser, site.url + path):
            faults[path] = complaints
    assert not faults, "\n".join(f"{path}: {one}" for path in faults for one in faults[path])


def test_an_empty_workspace(browser: Browser, tmp_path: Path) -> None:
    paths = ("/", "/runs", "/deployments", "/start", "/caches", "/tokens", "/ci", "/audit")
    paths += ("/people", "/settings", "/welcome", "/add")
    with gallery(tmp_path / "data", 0) as empty:
        browser.sign_in(empty.url, empty.cookie())
        faults = {path: check(browser, empty.url + path) for path in paths}
        assert not any(faults.values()), faults
        browser.open(empty.url + "/")
        browser.click("Add the first agent")
        assert browser.path == "/add"


def test_hundreds_of_agents(browser: Browser, tmp_path: Path) -> None:
    with gallery(tmp_path / "data", 300, with_cache=False) as huge:
        browser.sign_in(huge.url, huge.cookie())
        browser.resize(*SMALL)
        for path in ("/", "/?page=3", "/start", "/runs/3", "/deployments"):
            browser.open(huge.url + path)
            assert browser.overflow() == browser.complaints() == [], path
        assert browser.axe() == []
        browser.resize(*WIDE)
        browser.open(huge.url + "/")
        assert len(browser.find_all("#rows > tr")) == 100
        browser.click("Next")
        assert "Page 2 of 3" in browser.text


def test_signed_out(browser: Browser, site: Gallery) -> None:
    browser.driver.delete_all_cookies()
    assert check(browser, site.url + "/sign-in") == []
    browser.open(site.url + "/runs/3")
    assert browser.path.startswith("/sign-in?next=") and "Sign in" in browser.title
    assert not browser.find_all("nav a"), "a visitor sees no menu"


@pytest.mark.parametrize("path", TITLES)
def test_titles_begin_with_the_state(browser: Browser, site: Gallery, path: str) -> None:
    browser.open(site.url + path)
    assert browser.title == f"{TITLES[path]} · Example machines"


def test_hostile_text_is_text(browser: Browser, site: Gallery) -> None:
    for path in ("/runs", "/runs/2", "/agents/build-1/deployments/3?from=0", "/audit"):
        browser.open(site.url + path)
        assert "<script>alert(1)</script>" in browser.text, path
        assert "\u202e" not in browser.text and "\x07" not in browser.text
        assert not browser.find_all("main b, main script"), path
        assert browser.complaints() == []


def test_without_scripts(tmp_path: Path, site: Gallery) -> None:
    need_browser()
    with browsing(tmp_path / "browser", scripts=False) as browser:
        browser.sign_in(site.url, site.cookie())
        for path in pages(site.app):
            browser.open(site.url + path)
            assert browser.find("h1").text, path
        browser.open(site.url + "/")
        assert browser.run("return document.documentElement.className") == "", "scripts are off"
        browser.fill("Find", "web")
        browser.click("Filter")
        assert len(browser.find_all("#rows > tr")) == 3
        browser.find("input[aria-label='Select web-3']").click()
        browser.click("Pause")
        assert "paused" in browser.find("#row-web-3").text
        browser.open(site.url + "/agents/web-3")
        browser.click("Resume")
        assert "paused" not in browser.text
        browser.open(site.url + "/agents/build-1/deployments/3")
        assert not any(one.is_displayed() for one in browser.find_all(".needs-script"))
        browser.fill("Find", "nginx")
        browser.click("Search")
        assert "nginx.service" in browser.text


def test_a_viewer_sees_nothing_to_press(browser: Browser, site: Gallery) -> None:
    browser.sign_in(site.url, site.cookie(VIEWER))
    for path in ("/", "/agents/build-1", "/agents/build-1/deployments/3", "/runs/3", "/caches"):
        browser.open(site.url + path)
        buttons = [one.text for one in browser.find_all("main form[method=post] button")]
        assert not [one for one in buttons if one], (path, buttons)
    browser.open(site.url + "/tokens")
    assert "this takes an admin, and you are a viewer" in browser.text
