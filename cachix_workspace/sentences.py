"""How a deployment stands, in one sentence, and what to do about it. Pure functions."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from cachix_protocol import CANCELLED, FAILED, IN_PROGRESS, PENDING, SUCCEEDED
from cachix_workspace.agents import AgentRow
from cachix_workspace.deployments import DeploymentRow
from cachix_workspace.fetched import Progress

STEPS = {
    "received": "received",
    "downloading": "downloading",
    "ready": "ready",
    "activating": "activating",
    "checking": "checking",
    "committing": "committing",
    "awaiting-reboot": "waiting to reboot",
    "rebooting": "rebooting",
    "rolling-back": "rolling back",
    "succeeded": "done",
    "rolled-back": "rolled back",
    "rollback-failed": "rollback failed",
    "failed": "failed",
    "cancelled": "cancelled",
    "superseded": "replaced",
}
WAY = ("received", "downloading", "activating", "checking", "committing", "succeeded")
WAY_BACK = ("rolling-back", "rolled-back")


@dataclass(frozen=True)
class Telling:
    """A deployment in words. `replaced_by` is the index of the one that took its place."""

    sentence: str
    advice: str = ""
    replaced_by: int | None = None


@dataclass(frozen=True)
class Mark:
    """A step on the step line: its word, whether it is done, under way or to come, and seconds."""

    word: str
    state: str  # done, now, next or bad
    seconds: float | None = None


def tell(
    row: DeploymentRow,
    agent: AgentRow,
    lost_since: str | None = None,
    is_behind: bool = False,
    progress: Progress | None = None,
) -> Telling:
    """How a deployment stands; `is_behind`: another one of its agent runs."""
    if row.status == PENDING:
        return _waiting(row, agent, is_behind)
    if row.status == IN_PROGRESS:
        return _running(row, agent, lost_since, progress)
    if row.status == CANCELLED:
        return _cancelled(row)
    if row.status == SUCCEEDED:
        return _succeeded(row, agent)
    return _failed(row, agent)


def _waiting(row: DeploymentRow, agent: AgentRow, is_behind: bool) -> Telling:
    name = agent.name
    if agent.paused_on:
        return Telling(
            f"Waiting for {name}: paused since {clock(agent.paused_on)} by {agent.paused_by}",
            "It starts once the agent is resumed.",
        )
    if not agent.has_connected:
        return Telling(
            f"Waiting for {name}: it has never connected", "Start the agent on its machine."
        )
    if not agent.connected:
        return Telling(
            f"Waiting for {name}: offline since {clock(agent.seen_on)}",
            "It starts as soon as the agent connects.",
        )
    if is_behind:
        return Telling(f"Waiting for {name}: another deployment runs there")
    return Telling(f"Waiting for {name} to take it")


def _running(
    row: DeploymentRow, agent: AgentRow, lost_since: str | None, progress: Progress | None
) -> Telling:
    if lost_since:
        return Telling(
            f"Lost: nothing heard since {clock(lost_since)}",
            f"Look at the machine of {agent.name}: the deployment goes on, or is undone, "
            "as soon as an agent runs there. Its result is still taken.",
        )
    if row.step == "awaiting-reboot":
        return Telling(
            "Waiting for its reboot window" if row.reboot == "window" else "Waiting for its reboot",
            "The new system is in place. A newer deployment does not wait for this reboot.",
        )
    if row.step == "rebooting":
        since = "" if agent.connected else f": offline since {clock(agent.seen_on)}"
        return Telling(
            f"Rebooting {agent.name}{since}",
            "It is confirmed once its agent reaches this workspace again. Otherwise the machine "
            "boots the former system.",
        )
    if row.cancel_requested:
        return Telling("Cancelling: the agent is asked before it changes anything")
    if row.step == "downloading" and progress is not None:
        unit, size = ("MB", 1e6) if progress.total >= 1_000_000 else ("kB", 1e3)
        return Telling(
            f"Downloading {progress.done / size:.0f} of {progress.total / size:.0f} {unit}"
        )
    if row.step == "downloading" and row.closure_size:
        return Telling(f"Downloading {megabytes(row.closure_size)}")
    word = STEPS.get(row.step or "", "")
    return Telling(f"{word.capitalize()} on {agent.name}" if word else f"Running on {agent.name}")


def _cancelled(row: DeploymentRow) -> Telling:
    reason = row.reason or "cancelled"
    marker = "replaced by deployment "
    if reason.startswith(marker) and reason[len(marker) :].isdigit():
        return Telling("Cancelled", replaced_by=int(reason[len(marker) :]))
    return Telling(f"Cancelled: {'nothing was changed' if reason == 'cancelled' else reason}")


def _succeeded(row: DeploymentRow, agent: AgentRow) -> Telling:
    took = seconds_between(row.started_on, row.finished_on)
    ending = f" in {lasting(took)}" if took is not None else ""
    if row.outcome == "dry-run":
        return Telling(
            f"Dry run{ending}: nothing was changed", "The log has what an activation would do."
        )
    if row.outcome == "tested":
        return Telling(
            f"Succeeded{ending}: {row.store_path} runs until the next boot",
            "The former system boots then.",
        )
    if row.outcome == "reboot-needed" and row.operation == "boot":
        return Telling(
            f"Succeeded{ending}: {row.store_path} is what starts next",
            f"{agent.name} runs it after a reboot. It was not checked.",
        )
    if row.outcome == "reboot-needed" and row.reboot:
        why = first_line(row.reason) or "it did not come to the reboot"
        telling = f"{why[:1].upper()}{why[1:]}.".replace("..", ".")
        return Telling(f"Succeeded{ending}: {agent.name} needs a reboot", telling)
    if row.outcome == "reboot-needed":
        return Telling(
            f"Succeeded{ending}: {agent.name} needs a reboot",
            "The new system boots, but could not be switched to.",
        )
    return Telling(f"Succeeded{ending}")


def _failed(row: DeploymentRow, agent: AgentRow) -> Telling:
    reason = first_line(row.reason) or "the agent did not say why"
    if row.outcome == "nothing-changed":
        return Telling(f"Failed, nothing was changed: {reason}")
    if row.outcome == "rolled-back":
        back = f"Rolled back to {row.before}, which runs now." if row.before else "Rolled back."
        return Telling(f"Failed: {reason}. {back}".replace("..", "."))
    if row.outcome == "rollback-failed":
        facts = [f"{agent.name} runs {agent.running}"] if agent.running else []
        facts += [f"its profile is {agent.profile}"] if agent.profile else []
        tail = f" {', '.join(facts)}." if facts else ""
        return Telling(
            f"Rollback failed: {reason}.{tail}".replace("..", "."),
            f"Somebody must look at {agent.name}: it is on a system that nobody has confirmed.",
        )
    if row.outcome == "changed-by-others":
        return Telling(
            f"Failed: {reason}", "Another tool, or another agent, changed the machine meanwhile."
        )
    if row.outcome == "state-lost":
        return Telling(f"Failed: {reason}", "The agent has lost its record of this deployment.")
    if row.outcome == "unreported":
        return Telling(f"Failed: {reason}", "Its agent may report later how it ended.")
    return Telling(f"Failed: {reason}")


def marks(row: DeploymentRow, steps: list[tuple[str, str]]) -> list[Mark]:
    """The step line: steps that were reported, each with how long it took, then those to come."""
    visible = [(step, time) for step, time in steps if step != "ready"]
    is_over = row.status not in (PENDING, IN_PROGRESS)
    result = []
    for (step, time), following in zip(visible, [*visible[1:], ("", row.finished_on or "")]):
        is_last = following[0] == ""
        state = "now" if is_last and not is_over else "done"
        if is_last and row.status == FAILED:
            state = "bad"
        took = None if is_last and step in ("succeeded", "rolled-back") else following[1]
        result.append(Mark(STEPS.get(step, step), state, seconds_between(time, took)))
    reported = {step for step, _ in visible}
    is_back = bool(reported & {*WAY_BACK, "rollback-failed"})
    to_come = [] if is_over else list(WAY_BACK if is_back else WAY)
    last = max((to_come.index(step) for step in reported if step in to_come), default=-1)
    return result + [Mark(STEPS[step], "next") for step in to_come[last + 1 :]]


def seconds_between(start: str | None, end: str | None) -> float | None:
    """Seconds between two times of the protocol; None if one is missing, or they are no times."""
    try:
        return max(0.0, _moment(end or "") - _moment(start or ""))
    except ValueError:
        return None


def _moment(time: str) -> float:
    whole, _, fraction = time.rstrip("Z").partition(".")
    parsed = datetime.datetime.strptime(whole, "%Y-%m-%dT%H:%M:%S")
    start = parsed.replace(tzinfo=datetime.timezone.utc).timestamp()
    return start + (float(f"0.{fraction}") if fraction.isdigit() else 0.0)


def lasting(seconds: float) -> str:
    """A duration: `41 s`, `2 min 5 s`, `1 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def megabytes(size: int) -> str:
    """A size for people."""
    return f"{size / 1e6:.0f} MB" if size >= 1_000_000 else f"{max(1, round(size / 1000))} kB"


def clock(time: str | None) -> str:
    """A time of the protocol: the hour of today, else the day as well, in UTC."""
    if not time:
        return "an unknown time"
    today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    return f"{time[11:16]} UTC" if time.startswith(today) else f"{time[:10]} {time[11:16]} UTC"


def first_line(text: str | None) -> str:
    """The first line of a reason, without the stop at its end."""
    lines = (text or "").strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else ""
