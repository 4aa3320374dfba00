"""What a deployment that has ended means for its machine."""

from __future__ import annotations

from typing import Optional

from activate import journal
from activate.text import MOST_MESSAGE, clean

NOTHING_CHANGED, REBOOT_NEEDED = "nothing-changed", "reboot-needed"
CHANGED_BY_OTHERS, STATE_LOST = "changed-by-others", "state-lost"
BY_STEP = {
    journal.SUCCEEDED: "succeeded",
    journal.ROLLED_BACK: "rolled-back",
    journal.ROLLBACK_FAILED: "rollback-failed",
    journal.CANCELLED: NOTHING_CHANGED,
    journal.SUPERSEDED: NOTHING_CHANGED,
}
ALL = frozenset((*BY_STEP.values(), REBOOT_NEEDED, CHANGED_BY_OTHERS, STATE_LOST))


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
