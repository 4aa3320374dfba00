"""Reports of agents on deployments, and their effects: values and pure functions.

docs/protocol.rst has the steps and the outcomes. An agent that knows others is heard all the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from cachix_protocol import (
    FAILED,
    IN_PROGRESS,
    SUCCEEDED,
    TERMINAL,
    Spec,
    Undecodable,
    listed,
)

REBOOT_NEEDED, DRY_RUN, TESTED = "reboot-needed", "dry-run", "tested"
UNREPORTED = "unreported"  # said by the workspace, and only until the agent reports how it ended
AWAITING_REBOOT, REBOOTING = "awaiting-reboot", "rebooting"
UNTOUCHED_STEPS = ("received", "downloading", "ready")  # the machine is as it was
TOUCHED_STEPS = (
    *("activating", "checking", "committing", AWAITING_REBOOT, REBOOTING, "rolling-back"),
    *("succeeded", "rolled-back", "rollback-failed"),
)
STEPS = (*UNTOUCHED_STEPS, *TOUCHED_STEPS, "failed", "cancelled", "superseded")
OUTCOMES = (
    *("succeeded", "nothing-changed", "rolled-back", "rollback-failed"),
    *("changed-by-others", "state-lost", REBOOT_NEEDED, DRY_RUN, TESTED),
)
SHOWN_OUTCOMES = (*OUTCOMES, UNREPORTED)
MAX_SIGNATURE = 1 << 16  # characters


def check_signatures(spec: Spec) -> None:
    """Raises Undecodable for signatures that can't be stored and sent. Agents read the rest."""
    bad = [name for name, value in spec.signatures.items() if not _is_signature(value)]
    bad += [name for name in spec.signatures if name not in spec.agents]
    if bad:
        names = listed([json.dumps(name[:128]) for name in bad])
        raise Undecodable(f"`signatures` has no usable object, or no agent, for {names}")


def _is_signature(value: Any) -> bool:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and text.isascii() and len(text) <= MAX_SIGNATURE


@dataclass(frozen=True)
class Report:
    """An agent's report: InProgress, Succeeded or Failed. The size is in bytes, if it is known.

    `step` is where the agent is, `outcome` what the end means for the machine, if it says so.
    """

    status: str
    time: str
    closure_size: int | None = None
    reason: str | None = None
    step: str | None = None
    outcome: str | None = None

    @classmethod
    def from_json(cls, record: Any) -> Report:
        """The report in a request to .../status. Raises Undecodable."""
        reported = (IN_PROGRESS, SUCCEEDED, FAILED)
        if not isinstance(record, dict) or record.get("status") not in reported:
            raise Undecodable(f"`status` must be {IN_PROGRESS}, {SUCCEEDED} or {FAILED}")
        size, reason, time = record.get("closureSize"), record.get("reason"), record.get("time")
        if size is not None and (type(size) is not int or not 0 <= size < 1 << 63):
            raise Undecodable("`closureSize` must be a number of bytes or null")
        if not isinstance(reason, (str, type(None))) or not isinstance(time, str):
            raise Undecodable("`reason` must be a text or null, `time` a text")
        if reason is not None:  # databases take neither NUL nor half a surrogate pair
            reason = reason.replace("\0", "\N{REPLACEMENT CHARACTER}")
            reason = reason.encode("utf-8", "replace").decode()
        step, outcome = record.get("step"), record.get("outcome")
        return cls(
            status=record["status"],
            time=time,
            closure_size=size,
            reason=reason,
            step=step if step in STEPS else None,
            outcome=outcome if outcome in OUTCOMES and record["status"] in TERMINAL else None,
        )

    @property
    def is_before_activation(self) -> bool:
        """Whether nothing was changed yet, so that the deployment may still be cancelled."""
        return self.status == IN_PROGRESS and self.step in UNTOUCHED_STEPS

    @property
    def is_after_activation(self) -> bool:
        """Whether it is too late to cancel. A report without a step says nothing."""
        return self.status in TERMINAL or not (self.step is None or self.is_before_activation)

    def denies_cancellation(self, says_steps: bool) -> bool:
        """Whether the machine was, or may have been, changed by a deployment that was cancelled.

        A success without a step says so only for an agent that never says one.
        """
        if self.status == FAILED and self.step == "failed":
            return self.outcome != "nothing-changed"
        is_foreign = self.step is None and not says_steps
        return self.step in TOUCHED_STEPS or (self.status == SUCCEEDED and is_foreign)


def transition(current: str, reported: str) -> str | None:
    """The status after a report; None if the deployment had ended differently before."""
    if reported == current:
        return current
    return None if current in TERMINAL else reported
