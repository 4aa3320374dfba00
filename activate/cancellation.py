"""The cancellation of a deployment by somebody at its machine: a file beside its journal.

Agent and switch process look for it, until the deployment is committed.
"""

from __future__ import annotations

import os

from activate.files import write_durably
from activate.journal import Journal
from activate.process import Error

REASON = "it was cancelled by hand"


def request(entry: Journal) -> None:
    """Ask whoever leads a deployment to end it. Raises OSError."""
    write_durably(entry.path("cancel"), b"")


def is_requested(entry: Journal) -> bool:
    """Whether somebody has asked for that."""
    return os.path.lexists(entry.path("cancel"))


def check(entry: Journal) -> None:
    """Raise Error if somebody has asked for that."""
    if is_requested(entry):
        raise Error(REASON)
