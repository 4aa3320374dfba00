"""Draws the pictures of docs/, or every page in every size and scheme for looking at.

Usage:
  screenshots.py
  screenshots.py --all DIRECTORY [--only=WORD]
"""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

from docopt import docopt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from browser import CHROMIUM, NARROW, WIDE, Browser, browsing  # noqa: E402
from exhibits import Gallery, gallery, pages  # noqa: E402

URL = "https://deploy.example.org"
SIZES = {"wide": WIDE, "narrow": NARROW}
DOCS = ROOT / "docs"
PICTURE = (1280, 720)


def draw_docs() -> None:
    """Draw the pictures of docs/."""
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory())
        browser = stack.enter_context(browsing(Path(place, "browser")))
        facts = gallery(Path(place, "data"), 12, url=URL, is_hostile=False)
        draw_some(browser, stack.enter_context(facts))


def draw_some(browser: Browser, site: Gallery) -> None:
    """Draw three pages of a workspace."""
    browser.sign_in(site.url, site.cookie())
    browser.resize(*PICTURE)
    browser.prefer("light")
    browser.open(site.url + "/")
    browser.picture(DOCS / "overview.png", whole=False)
    browser.open(site.url + "/agents/build-1/deployments/3")
    browser.picture(DOCS / "deployment.png", whole=False)
    with mock.patch("cachix_workspace.tokens.secrets.token_urlsafe", lambda _: "x" * 43):
        browser.open(site.url + "/add")
        browser.fill("Name of the machine", "web-4")
        browser.click("Generate")
    browser.picture(DOCS / "add-agent.png", whole=False)


def file_name(path: str) -> str:
    """A page's path as the name of a file."""
    return re.sub(r"\W+", "-", path).strip("-")[:80] or "overview"


def draw_all(directory: Path, only: str) -> None:
    """Draw every page, full, empty and with 300 agents, in both sizes and schemes."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place, browsing(Path(place, "browser")) as browser:
        for fill, count in (("empty", 0), ("full", 12), ("huge", 300)):
            with gallery(Path(place, fill), count, url=URL) as facts:
                browser.sign_in(facts.url, facts.cookie())
                for path in pages(facts.app) if fill != "huge" else ("/", "/start", "/runs/3"):
                    if only in path:
                        draw_page(browser, facts, path, directory / f"{fill}-{file_name(path)}")


def draw_page(browser: Browser, site: Gallery, path: str, target: Path) -> None:
    """Draw one page in both sizes and schemes. Print what is wrong with it."""
    browser.open(site.url + path)
    for size, (width, height) in SIZES.items():
        browser.resize(width, height)
        for scheme in ("light", "dark"):
            browser.prefer(scheme)
            browser.picture(target.with_name(f"{target.name}-{size}-{scheme}.png"))
        for fault in browser.overflow():
            print(f"{path} at {width}: {fault}")
    for complaint in browser.complaints():
        print(f"{path}: {complaint}")


if __name__ == "__main__":
    options = docopt(__doc__ or "")
    if not CHROMIUM:
        sys.exit("error: there is no browser: `apt-get install chromium chromium-driver`")
    if options["--all"]:
        draw_all(Path(options["DIRECTORY"]), options["--only"] or "")
    else:
        draw_docs()
