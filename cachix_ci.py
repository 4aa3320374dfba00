"""The command `activate deploy.json`: orders deployments, and follows them until they end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any, Optional

import cachix_show
from activate.values import replace
from cachix_connection import Peer
from cachix_console import Screen, tell
from cachix_follow import ROLL_BACK, Follower, follow
from cachix_options import HOSTED
from cachix_order import Batch, fleet, maybe_started, no_wishes, order_back, order_in_time
from cachix_protocol import SUCCEEDED, Error, Spec, UsageError, listed
from cachix_rollout import SKIP, End, Fact, Plan, plan, refusal, verdict, wants_labels
from cachix_spec import ActivateOptions, read_spec
from cachix_summary import Report

SLICE = 0.5  # seconds


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends this command as an interrupt does."""


_arrived: list[int] = []  # signals, since `interruptible` was entered


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM raise Terminated, and SIGINT KeyboardInterrupt, if this is the main thread."""
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored
        numbers.append(signal.SIGINT)

    def end(number: int, _: Any) -> None:
        _arrived.append(number)
        check_signals()

    _arrived.clear()
    try:
        before = {number: signal.signal(number, end) for number in numbers}
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_signals() -> None:
    """Raise for a signal that has arrived, also if Python has lost its exception in a finalizer."""
    if _arrived:
        raise Terminated if _arrived[0] == signal.SIGTERM else KeyboardInterrupt


def sleep(seconds: float) -> None:
    """Sleep by slices: a signal that arrives right before one is acted upon after it."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check_signals()
        time.sleep(min(left, SLICE))


def activate_command(options: ActivateOptions) -> int:
    """Deploy a deploy.json, and follow the deployments; the exit status. Raises Error.

    Without --async it is an error if the workspace only knows v1 of the API: there is no id to
    follow a deployment by.
    """
    if not options.token:
        raise UsageError("no token: set CACHIX_ACTIVATE_TOKEN, or give --token-file=FILE")
    timeout = float("inf") if options.timeout is None else options.timeout
    deadline = time.monotonic() + timeout
    run = Run(Peer.create(options.host, options.token), read_spec(options), options, deadline)
    try:
        with interruptible():
            return run.carry_out()
    except KeyboardInterrupt as error:
        tell(f"interrupted: {run.standing()}")
        return 143 if isinstance(error, Terminated) else 130


class Run:
    """All that one command line deploys: in batches, one after another, if that is wanted."""

    def __init__(self, peer: Peer, spec: Spec, options: ActivateOptions, deadline: float) -> None:
        self.peer, self.spec, self.options, self.deadline = peer, spec, options, deadline
        self.rollout = options.rollout
        self.display = cachix_show.create(options.json, os.environ)
        self.wake = threading.Event()
        self.report = Report()
        self.plan = Plan([])
        self.first: Optional[Batch] = None
        self.offline: list[str] = []  # agents whose deployments are ordered last, and not followed
        self.is_posting = self.knows_fleet = False

    def carry_out(self) -> int:
        """Deploy, and show the summary; the exit status. Raises Error."""
        status = 1
        if self.spec.has_wishes and self.peer.host == HOSTED:
            raise UsageError(no_wishes(self.peer.host))
        facts = self.ask_fleet()
        rollout = replace(self.rollout, force=True) if self.spec.has_wishes else self.rollout
        self.plan = plan(rollout, self.spec.agents, facts)
        if problem := refusal(self.rollout, self.plan):
            raise Error(problem)
        self.report.unknown, self.report.unchanged = self.plan.unknown, self.plan.unchanged
        self.offline = list(self.plan.offline)
        self.report.unposted = [name for batch in self.plan.batches for name in batch]
        self.report.unposted += self.offline
        self.push()
        try:
            self.deploy()
            is_whole = all(one.state.status == SUCCEEDED for one in self.report.followers)
            status = 0 if is_whole and not self.report.stopped else 1
        except Error:
            if self.first and self.report.unposted:
                tell(self.unposted())
            raise
        finally:
            if self.first or status == 0:
                self.display.summary(self.report, status)
                cachix_show.add_step_summary(self.report, os.environ)
        if self.report.stopped:
            raise Error(self.report.stopped)
        return status

    def push(self) -> None:
        """Push what is to be deployed, if that is wanted. Raises Error."""
        agents = {name: self.spec.agents[name] for name in self.report.unposted}
        if self.options.push is not None and agents:
            import cachix_push

            tell_line = tell if self.options.json else Screen().print
            spec = replace(self.spec, agents=agents)
            tell_line(cachix_push.push_spec(self.peer, spec, self.options.push))

    def ask_fleet(self) -> Optional[dict[str, Fact]]:
        """The agents as the workspace describes them, if that is needed. Raises Error."""
        rollout, words = self.rollout, (*self.rollout.on, *self.rollout.canary)
        needed = rollout.needs_fleet
        if not needed and wants_labels(words, self.spec.agents):
            needed = "a label"
        if not needed and not rollout.in_batches:
            return None
        facts = fleet(self.peer, self.deadline)
        if facts is None and needed == "a label":
            return None  # `plan` names the word that selects none
        if facts is None and needed:
            why = f"{self.peer.host} does not say which agents there are and what they run"
            raise UsageError(f"{needed} needs a workspace of yours: {why}")
        self.knows_fleet = facts is not None
        return facts

    def deploy(self) -> None:
        """Deploy batch by batch, as long as they end well enough. Raises Error."""
        batches = self.plan.batches
        for number, names in enumerate(batches, 1):
            names = self.still_online(names, is_first=number == 1)
            if not names:
                continue
            followers = self.post(names, number)
            if self.options.asynchronous:
                continue
            self.follow(followers)
            problem = self.problem()
            is_last = number == len(batches)
            is_over = is_last and not (self.offline and self.rollout.in_batches)
            if problem and (not is_over or self.rollout.rolls_back):
                self.report.stopped = problem
                self.take_back()
                return
            if not is_last:
                self.pause(number, len(batches))
        if self.offline:
            self.post(self.offline)
            self.report.offline = self.offline

    def still_online(self, names: list[str], is_first: bool) -> list[str]:
        """Those of a batch that are not to be skipped, because they are offline now."""
        if self.rollout.offline != SKIP or is_first:
            return names
        facts = fleet(self.peer, self.deadline) or {}
        offline = [name for name in names if name in facts and not facts[name].online]
        self.offline += offline
        return [name for name in names if name not in offline]

    def post(self, names: list[str], number: int = 0) -> list[Follower]:
        """Order the deployments of a batch, within the run of this command. Raises Error."""
        agents = {name: self.spec.agents[name] for name in names}
        run = None if self.first is None else self.first.run
        self.is_posting = True
        spec = replace(self.spec, agents=agents)
        batch = order_in_time(self.peer, spec, self.options, self.deadline, run)
        self.is_posting = False
        if self.first is None:
            self.first = batch
            if batch.run is not None:
                self.report.run_url = batch.run_url
                self.display.run(batch.run, batch.run_url)
        if number:
            self.display.batch(number, len(self.plan.batches), names)
        rest = [name for name in self.report.unposted if name not in agents]
        self.report.unposted = rest
        followers = self.followers(batch)
        self.display.started(self.peer.host, followers)
        return followers

    def followers(self, batch: Batch) -> list[Follower]:
        """Followers of the deployments that an order has made."""
        return [Follower(self.peer, each, self.display, self.wake) for each in batch.deployments]

    def follow(self, followers: list[Follower]) -> None:
        """Follow deployments that were ordered until they end. Raises Error."""
        if not all(follower.id for follower in followers):
            hint = "but can't be asked how they end (v1 of its API): look at the URLs"
            raise Error(f"{self.peer.host} has started them, {hint}")
        self.report.followers += followers
        follow(followers, self.display, self.wake, self.deadline)

    def problem(self) -> str:
        """Why the roll-out does not go on; empty if it does."""
        ends = [
            End(one.agent, one.state.status, " ".join(one.state.reasons()))
            for one in self.report.followers
        ]
        return verdict(ends, self.rollout.max_failures, self.plan.count)

    def pause(self, number: int, count: int) -> None:
        """Wait between two batches. Raises Error at the deadline."""
        seconds = self.rollout.pause
        if not seconds:
            return
        tell(f"batch {number} of {count} has ended well, the next one is in {seconds:g} s")
        left = self.deadline - time.monotonic()
        sleep(min(seconds, left))
        if left <= seconds:
            raise Error("gave up waiting at the --timeout")

    # --- what was not done, and what is undone ---

    def unposted(self) -> str:
        """How many agents are left, and how to go on."""
        count = f"{len(self.report.unposted)} not posted"
        if self.knows_fleet and self.rollout.in_batches:
            return f"{count}; the same command line goes on from there"
        return count

    def standing(self) -> str:
        """How this run stands, when it is interrupted."""
        if self.is_posting:
            state = maybe_started(self.peer)
        else:
            is_over = all(one.ended for one in self.report.followers)
            goes_on = "no deployment is under way" if is_over else "the deployments go on"
            state = "nothing was deployed" if self.first is None else goes_on
        if self.first is None or not self.report.unposted:
            return state
        return f"{state}; {self.unposted()}"

    def take_back(self) -> None:
        """Order what ran before where this run has succeeded, if that is wanted. Raises Error."""
        if not self.rollout.rolls_back or self.first is None:
            return
        done = [one for one in self.report.followers if one.state.status == SUCCEEDED]
        successes = [one for one in done if one.state.outcome != "dry-run"]
        before = {one.agent: one.state.before or one.store_path for one in successes}
        names = [one.agent for one in successes if before[one.agent] != one.store_path]
        self.report.staying = list(before)
        if not names:
            return
        tell(f"{self.report.stopped}; taking back {len(names)} that had succeeded: {listed(names)}")
        if self.options.signer is None:
            batch = order_back(self.peer, self.first, names, self.deadline)
        else:
            batch = self.sign_back({name: before[name] for name in names})
        followers = self.followers(batch)
        self.report.back = followers
        back = {one.agent for one in followers}
        self.report.staying = [name for name in before if name not in back]
        self.display.started(self.peer.host, followers)
        follow(followers, self.display, self.wake, self.deadline)

    def sign_back(self, paths: dict[str, str]) -> Batch:
        """Order former paths with signatures that allow it: the workspace has no key."""
        assert self.options.signer is not None
        signer = replace(self.options.signer, allow_downgrade=True)
        options = replace(self.options, signer=signer)
        batch = order_in_time(self.peer, Spec(paths, {}), options, self.deadline)
        back = [replace(each, action=ROLL_BACK) for each in batch.deployments]
        return replace(batch, deployments=back)
