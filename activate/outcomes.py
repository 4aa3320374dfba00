"""The outcomes of deployments: the effect of each on its machine."""

from __future__ import annotations

from typing import Optional

from activate import journal
from activate.text import MOST_MESSAGE, clean

NOTHING_CHANGED, REBOOT_NEEDED = "nothing-changed", "reboot-needed"
CHANGED_BY_OTHERS, STATE_LOST = "changed-by-others", "state-lost"
DRY_RUN, TESTED = "dry-run", "tested"
BY_STEP = {
    journal.SUCCEEDED: "succeeded",
    journal.ROLLED_BACK: "rolled-back",
    journal.ROLLBACK_FAILED: "rollback-failed",
    journal.CANCELLED: NOTHING_CHANGED,
    journal.SUPERSEDED: NOTHING_CHANGED,
}
ALL = frozenset((*BY_STEP.values(), REBOOT_NEEDED, CHANGED_BY_OTHERS, STATE_LOST, DRY_RUN, TESTED))


def of(record: journal.Record) -> Optional[str]:
    """The outcome of a deployment; None before its end, or if it is not known."""
    if record.step not in journal.FINAL:
        return None
    if record.outcome is None and record.step == journal.FAILED:
        return None if journal.ACTIVATING in record.times else NOTHING_CHANGED
    return record.outcome or BY_STEP[record.step]


def reason_of(record: journal.Record) -> Optional[str]:
    """Why a deployment ended so, in lines, cleaned: it may quote others."""
    texts = [text for text in (record.reason, record.detail) if text]
    lines = "\n".join(texts).split("\n")
    return "\n".join(clean(line, most=MOST_MESSAGE) for line in lines) or None


def title(record: journal.Record) -> str:
    """The name of a deployment in messages."""
    if record.by_hand is None:
        return f"deployment {record.index}"
    return f"the {'rollback' if record.by_hand == journal.ROLLBACK else 'activation'} by hand"
