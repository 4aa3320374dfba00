"""A real browser for tests and pictures: Debian's Chromium, without a window, by its own driver."""

from __future__ import annotations

import base64
import contextlib
import importlib.resources
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from selenium.common.exceptions import (
    ElementNotInteractableException,
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from cachix_workspace.pages.access import COOKIE

CHROMIUM, DRIVER = shutil.which("chromium") or "", shutil.which("chromedriver") or ""
DEADLINE = 20.0  # seconds for whatever a test waits for
WIDE, NARROW = (1280, 900), (390, 844)
AXE_RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
# Names are compared as a reader sees them: without case, in one line.
BY_TEXT = (
    "//{tag}[not(ancestor-or-self::*[@hidden])]"
    "[normalize-space(.)={text} or @aria-label={text} or @value={text}]"
)


class Browser:
    """A browser with a profile of its own, and one tab. `close` ends it."""

    def __init__(self, directory: Path, scripts: bool = True) -> None:
        options = ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in (
            *("headless=new", "no-sandbox", "disable-dev-shm-usage", "hide-scrollbars"),
            *("disable-gpu", "no-first-run", "disable-background-networking", "lang=en-GB"),
            f"user-data-dir={directory}",
        ):
            options.add_argument(f"--{argument}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        environment = {**os.environ, "HOME": str(directory), "TZ": "UTC"}
        service = Service(DRIVER, env=environment)
        self.driver = Chrome(options=options, service=service)
        self.driver.set_page_load_timeout(DEADLINE)
        self.resize(*WIDE)
        if not scripts:
            self.command("Emulation.setScriptExecutionDisabled", value=True)

    def close(self) -> None:
        """End it."""
        self.driver.quit()

    # --- how it looks ---

    def command(self, method: str, **values: Any) -> Any:
        """A command of the DevTools protocol; its answer."""
        return self.driver.execute_cdp_cmd(method, values)

    def resize(self, width: int, height: int, zoom: float = 1.0) -> None:
        """Give the page so many pixels of the screen. With a zoom it has fewer of its own."""
        size = {"width": round(width / zoom), "height": round(height / zoom)}
        self.command(
            "Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=zoom, mobile=False
        )

    def prefer(self, scheme: str) -> None:
        """Prefer a colour scheme: light or dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.command("Emulation.setEmulatedMedia", features=features)

    def picture(self, file: Path, whole: bool = True) -> None:
        """Write a picture of the page as a PNG: the whole page, or what one sees first."""
        layout = self.command("Page.getLayoutMetrics")
        view, size = layout["cssVisualViewport"], layout["cssContentSize"]
        height = min(size["height"], 6000) if whole else view["clientHeight"]
        clip = {"x": 0, "y": 0, "width": view["clientWidth"], "height": height, "scale": 1}
        answer = self.command("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(answer["data"]))

    # --- where it is ---

    def sign_in(self, url: str, cookie: str) -> None:
        """Have the cookie of a session at a workspace."""
        self.command("Network.setCookie", name=COOKIE, value=cookie, url=url, httpOnly=True)

    def open(self, url: str) -> None:
        """Go to a page."""
        self.driver.get(url)

    @property
    def path(self) -> str:
        """The path of the page, with its query."""
        return "/" + self.driver.current_url.split("/", 3)[3]

    @property
    def title(self) -> str:
        """The title of the page."""
        return str(self.driver.title)

    @property
    def text(self) -> str:
        """The text of the page, in one line."""
        return " ".join(self.driver.find_element(By.TAG_NAME, "body").text.split())

    def wait_for(
        self, condition: Callable[[], Any], what: str = "", timeout: float = DEADLINE
    ) -> Any:
        """The first true value of a condition. Elements may come and go meanwhile."""
        deadline, value = time.monotonic() + timeout, None
        while not value:
            if time.monotonic() > deadline:
                page = f"{self.title}\n{self.text[:3000]}"
                raise AssertionError(f"waited {timeout:.0f} s in vain for {what}; on {page}")
            with contextlib.suppress(NoSuchElementException, StaleElementReferenceException):
                value = condition()
            time.sleep(0.05)
        return value

    def wait_for_text(self, *parts: str, timeout: float = DEADLINE) -> None:
        """Wait until the page says all of these."""

        def is_there() -> bool:
            text = self.text
            return all(part in text for part in parts)

        self.wait_for(is_there, f"the text {parts}", timeout)

    # --- what one does ---

    def find(self, selector: str) -> WebElement:
        """The first element by a selector of CSS."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def find_all(self, selector: str) -> list[WebElement]:
        """All elements by a selector of CSS."""
        return list(self.driver.find_elements(By.CSS_SELECTOR, selector))

    def named(self, text: str, tags: str = "a button summary") -> WebElement:
        """The link, button or summary of this name that one can see."""

        def visible() -> WebElement | None:
            for tag in tags.split():
                path = BY_TEXT.format(tag=tag, text=quoted(text))
                for element in self.driver.find_elements(By.XPATH, path):
                    if element.is_displayed():
                        return element
            return None

        match: WebElement = self.wait_for(visible, f"{tags} named {text!r}")
        return match

    def click(self, text: str, tags: str = "a button summary") -> None:
        """Click on the link, button or summary of this name."""

        def clicked() -> bool:
            try:
                self.named(text, tags).click()
            except ElementNotInteractableException:
                return False
            return True

        self.wait_for(clicked, f"a click on {text!r}")

    def field(self, label: str) -> WebElement:
        """The input, select or textarea whose label begins with these words."""
        return self.driver.find_element(
            By.XPATH,
            f"//label[starts-with(normalize-space(.), {quoted(label)})]"
            "//*[self::input or self::select or self::textarea]",
        )

    def fill(self, label: str, value: str) -> None:
        """Write into the field with this label, in place of what it has."""
        field = self.field(label)
        field.clear()
        field.send_keys(value)

    def press(self, *keys: str) -> None:
        """Press keys, one after the other."""
        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a function of JavaScript."""
        return self.driver.execute_script(script, *arguments)

    # --- what is wrong with it ---

    def complaints(self) -> list[str]:
        """The browser's complaints since the last look: errors of scripts, CSP, network."""
        entries = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def overflow(self) -> list[str]:
        """The elements that stick out of the page sideways, if the page can be moved sideways."""
        elements: list[str] = self.run(OVERFLOW)
        return elements

    def axe(self) -> list[str]:
        """The violations that axe-core finds, a line for each element."""
        if not self.run("return 'axe' in window"):
            source = importlib.resources.files("axe_core_python").joinpath("axe.min.js")
            self.run(source.read_text(encoding="utf-8"))
        self.driver.set_script_timeout(60)
        answer = self.driver.execute_async_script(RUN_AXE, AXE_RULES)
        return [
            f"{one['id']} ({one['impact']}): {one['help']}: {node['html'][:200]}"
            f" {node.get('failureSummary', '')[:300]}"
            for one in answer["violations"]
            for node in one["nodes"]
        ]


RUN_AXE = """
const done = arguments[arguments.length - 1];
axe.run(document, {runOnly: arguments[0], resultTypes: ["violations"]}).then(done);
"""
OVERFLOW = """
const width = document.documentElement.clientWidth;
if (document.documentElement.scrollWidth <= width) return [];
return [...document.querySelectorAll("body *")]
  .filter((one) => one.getBoundingClientRect().right > width + 1)
  .map((one) => `${one.tagName}.${one.className.baseVal ?? one.className}#${one.id}: `
    + one.getBoundingClientRect().right)
  .slice(-5).concat(`page: ${document.documentElement.scrollWidth} of ${width}`);
"""


def quoted(text: str) -> str:
    """A text as XPath writes it."""
    if "'" not in text:
        return f"'{text}'"
    return "concat(" + ', "\'", '.join(f"'{part}'" for part in text.split("'")) + ")"


def need_browser() -> None:
    """Skip a test where there is no browser; in a CI it fails."""
    if CHROMIUM and DRIVER:
        return
    install = "there is no browser: `apt-get install chromium chromium-driver`"
    if os.environ.get("CI") == "true":
        pytest.fail(install)
    pytest.skip(install)


@contextlib.contextmanager
def browsing(directory: Path, scripts: bool = True) -> Iterator[Browser]:
    """A browser that ends with the block."""
    directory.mkdir(parents=True, exist_ok=True)
    browser = Browser(directory, scripts)
    try:
        yield browser
    finally:
        browser.close()
