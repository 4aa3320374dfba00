"""The substituters of a download: one that fails is left out if the others have everything."""

from __future__ import annotations

import time
from signal import SIGTERM
from typing import Callable, Optional

from activate import nix
from activate.agent import failure
from activate.agent.listen import Hear, Messages, listen
from activate.agent.substituters import Failures, Substituters
from activate.process import INTERRUPTED, DeadlinePassed, Run, say
from activate.values import dataclass, replace

DRY_RUN_DEADLINE = 120.0  # seconds; a download goes on without an estimate
# Classes of failure whose cause may be a narinfo that Nix remembers: it does so for 30 days.
MAYBE_STALE = ("signature", "corrupt", "stale", "missing")

Act = Callable[[nix.Source, Run], int]  # downloads from a source; the exit status


@dataclass(frozen=True)
class Answer:
    """The exit status of a command of Nix, and its output."""

    status: int
    messages: Messages

    @property
    def text(self) -> str:
        """The output, without the paths that were copied."""
        return self.messages.text

    @property
    def kind(self) -> str:
        """The class of the failure."""
        return failure.classify(self.text)

    @property
    def was_interrupted(self) -> bool:
        """Whether a signal asked Nix to end: the agent exits, or the machine stops."""
        return self.status == -SIGTERM or (self.status > 0 and INTERRUPTED in self.text)

    @property
    def has_everything(self) -> bool:
        """Whether a dry run has found all paths."""
        return self.status == 0 and not failure.mentions(self.text, "missing")


class Route:
    """The present source of a download, its deadline, and the substituters that have failed."""

    def __init__(self, paths: list[str], source: nix.Source, log: int, timeout: float) -> None:
        self.paths, self.source, self.log = paths, source, log
        self.deadline = time.monotonic() + timeout
        self.substituters = Substituters(source.substituter)
        self.failed: Failures = {}
        self.lack = ""  # why the substituters that work are not enough
        self.has_looked = False  # the last dry run has found everything

    @property
    def left(self) -> float:
        """The seconds until the deadline, and at least one."""
        return max(1.0, self.deadline - time.monotonic())

    # --- two commands ---

    def dry_run(self) -> Answer:
        """The answer of a dry run; from another source if that turns out to be better."""
        better: list[Answer] = []
        answer = self.ask(self.source, lambda line: self.improve(line, better, retried=True))
        detour = better[0] if better else self.detour(self.culprits(answer, retried=True))
        answer = detour or answer
        self.has_looked = answer.has_everything
        return answer

    def run(self, act: Act, tick: Callable[[Messages], None]) -> Optional[Answer]:
        """Download; None if that was ended because another source turned out to be better.

        Raises CommandFailed if Nix can't be run, or the deadline passes.
        """
        messages, better = Messages(), list[Answer]()

        def hear(line: str) -> bool:
            say(self.log, line)
            messages.add(line)
            return self.improve(line, better, retried=False)

        def run(argv: list[str]) -> int:
            say(self.log, "$ " + " ".join(argv))
            return listen(argv, self.left, hear, lambda: tick(messages))

        # after a look Nix remembers the present narinfos: it would ask for each of them five times
        source = replace(self.source, fresh=self.source.fresh and not self.has_looked)
        try:
            status = act(source, run)
        except DeadlinePassed as error:
            say(self.log, str(error))
            raise
        return None if better else Answer(status, messages)

    def ask(self, source: nix.Source, hear: Hear) -> Answer:
        """The answer of a dry run with `source`."""
        messages, timeout = Messages(), min(DRY_RUN_DEADLINE, self.left)

        def take(line: str) -> bool:
            messages.add(line)
            return hear(line)

        def run(argv: list[str]) -> int:
            return listen(argv, timeout, take)

        try:
            return Answer(nix.realise_dry_run(self.paths, source, run), messages)
        except DeadlinePassed:
            messages.add(f"error: the substituters did not answer within {timeout:.0f} s")
            return Answer(1, messages)

    # --- remedies ---

    def culprits(self, answer: Answer, retried: bool) -> Failures:
        """The substituters that have failed: all of nix.conf if Nix puts that down to none."""
        failures: Failures = {}
        for line in answer.messages.lines:
            failures.update(self.substituters.blame(line, retried))
        known = answer.kind in (*MAYBE_STALE, *failure.LOCAL)
        if failures or answer.status <= 0 or answer.was_interrupted or known:
            return failures
        why = failure.first_error(answer.text, answer.status)
        return dict.fromkeys(self.substituters.others(), why)

    def remedy(self, answer: Answer) -> bool:
        """Change the source so that another attempt may succeed; whether there is a way."""
        if answer.status < 0 or answer.was_interrupted or answer.kind in failure.LOCAL:
            return False
        failures = self.culprits(answer, retried=False) if answer.kind else {}
        return self.detour(failures) is not None or self.refresh(answer)

    def refresh(self, answer: Answer) -> bool:
        """Let Nix ask for narinfos that it remembers; whether that is new, and may help."""
        if self.source.fresh or answer.was_interrupted or answer.kind not in MAYBE_STALE:
            return False
        self.source = replace(self.source, fresh=True)
        say(self.log, "what Nix remembers of the substituters may be old: asking them again")
        return True

    def improve(self, line: str, better: list[Answer], retried: bool) -> bool:
        """Put the answer of a better source into `better`; whether there is one."""
        answer = self.detour(self.substituters.blame(line, retried))
        if answer is not None:
            better.append(answer)
        return answer is not None

    def detour(self, failures: Failures) -> Optional[Answer]:
        """Leave out the substituters that fail. The answer of the others if they have everything.

        None, and no change of the source, if they have not.
        """
        while True:
            new = {url: why for url, why in failures.items() if url not in self.failed}
            if not new:
                return None
            self.failed.update(new)
            rest = [url for url in self.substituters.all() if url not in self.failed]
            if not rest:
                return None
            source = replace(self.source, only=tuple(rest))
            answer = self.ask(source, self.is_new)
            if answer.has_everything:
                for note in self.notes():
                    say(self.log, note)
                say(self.log, f"downloading from {' and '.join(rest)} alone")
                self.source = source
                return answer
            self.lack = failure.explain(answer.text, source, self.paths[0], answer.status)
            failures = self.culprits(answer, retried=True)

    def is_new(self, line: str) -> bool:
        """Whether Nix says that one more substituter has failed."""
        return bool(self.substituters.blame(line, retried=True).keys() - self.failed.keys())

    def notes(self) -> list[str]:
        """A sentence for each failure of substituters."""
        labels: dict[str, list[str]] = {}
        for url, why in self.failed.items():
            labels.setdefault(why, []).append(self.substituters.label(url))
        return [f"{' or '.join(names)} failed: {why}" for why, names in labels.items()]

    def reason(self, answer: Answer) -> str:
        """A message for a download that has failed."""
        kind, label, cache = answer.kind, self.substituters.label, None
        if kind in ("network", "credentials"):
            owner = self.substituters.owner(failure.message_of(kind, answer.text)[0])
            if self.lack and (owner is None or owner in self.failed):
                return "; ".join([self.lack, *self.notes()])
            cache = label(owner) if owner else " or ".join(map(label, self.substituters.all()))
        path = self.paths[0]
        reason = failure.explain(answer.text, self.source, path, answer.status, cache)
        return "; ".join([reason, *self.notes()])
