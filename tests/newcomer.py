"""Somebody new: a workspace that nobody has signed in to, a browser, and a machine."""

from __future__ import annotations

import re
from dataclasses import dataclass

from browser import Browser
from hosts import Host, Program
from live import Workspace

REFUSED = "the server responded with a status of 4"
MARK = "window.marked = true"  # gone after a reload


@dataclass
class Newcomer:
    """A person with a browser, and a shell on a machine that has no agent."""

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
        complaints = [one for one in browser.complaints() if REFUSED not in one]
        assert complaints == [], browser.path

    def block(self, id: str) -> str:
        """The text of a block to paste."""
        return str(self.browser.find(f"pre#{id}").get_attribute("textContent"))

    def paste(self, text: str, name: str) -> Program:
        """Paste into a shell on the machine."""
        home = self.host.directory
        return self.host.start(name, ["/bin/sh", "-c", text], cwd=home)
