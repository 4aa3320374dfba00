"""The agent's side of a deployment without an agent: the end of an attempt, and the pipe."""

import contextlib
import dataclasses
import io
import os
import threading

import pytest

from activate import holder, journal, outcomes, pipe
from activate.agent import attempt, conductor
from activate.agent.attempt import Attempt, Cancelled
from activate.agent.failure import DownloadFailed
from activate.agent.hooks import AgentHooks, Ended
from activate.process import CommandFailed, Error

NEW = "/nix/store/" + "a" * 32 + "-new"


@pytest.fixture
def entry(tmp_path, monkeypatch):
    """The journal of a new deployment; locks are in the test's own directory, too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    record = journal.Record(id="id", index=1, agent="a", host="http://h", store_path=NEW)
    return journal.Journal(str(tmp_path / "deployments/id"), record)


@pytest.fixture
def hooks():
    return AgentHooks(
        config={},
        switch_command=[],
        scope_timeout=1.0,
        download_timeout=1.0,
        stop=threading.Event(),
        source=contextlib.nullcontext,
        still_wanted=lambda entry: None,
        changed=lambda: None,
        measured=lambda entry, size: None,
        tell=lambda message: None,
        reach=lambda timeout: None,
    )


@pytest.mark.promise(6, 7)
@pytest.mark.parametrize("exits", [True, False])
def test_an_attempt_is_kept_until_its_end_is_written(entry, hooks, monkeypatch, exits):
    """An agent that exits waits for that: else an exit counts as an attempt, or an end is lost."""
    leader = conductor.Conductor(hooks)
    steps = []

    def run(attempt, action, taken):
        if exits:
            hooks.stop.set()
        raise Error("the download failed")

    def enter(self, step, **facts):
        steps.append((step, self.record.attempts, leader.attempt is not None))
        write(self, step, **facts)

    write = journal.Journal.enter
    monkeypatch.setattr(Attempt, "run", run)
    monkeypatch.setattr(journal.Journal, "enter", enter)
    leader.settle(entry)
    counted = (journal.RECEIVED, 0, False)
    last = journal.RECEIVED if exits else journal.FAILED
    assert steps == [counted, (last, 1, True)]
    assert entry.record.attempts == (0 if exits else 1)
    assert leader.attempt is None and holder.is_free(entry)


@pytest.mark.parametrize(
    ("error", "pauses"),
    [
        (Error("not a store path"), []),
        (DownloadFailed("/nix/store/x is not in http://c", "error: path is not valid"), []),
        (DownloadFailed("the closure does not fit"), []),
        (DownloadFailed("the download failed", "error: interrupted by the user"), [0.5]),
        (DownloadFailed("the download failed: nix-store was ended by signal 15", ""), [0.5]),
        (DownloadFailed("x", "error: path is not valid", by_signal=True), [0.5]),
        (CommandFailed(["nix-store"], "ended with status -15"), [0.5]),
        (OSError("what"), [0.5]),
    ],
)
def test_only_what_a_signal_may_have_done_is_looked_at_twice(
    entry, hooks, monkeypatch, error, pauses
):
    """systemd stops a command of ours a little before it stops us."""

    class Stop(threading.Event):
        def wait(self, timeout=None):
            waits.extend([timeout] if timeout else [])
            return False

    def run(attempt, action, taken):
        raise error

    waits: list = []
    monkeypatch.setattr(Attempt, "run", run)
    hooks = dataclasses.replace(hooks, stop=Stop())
    conductor.Conductor(hooks).settle(entry)
    assert waits == pauses and entry.record.step == journal.FAILED
    assert outcomes.of(entry.record) == outcomes.NOTHING_CHANGED


@pytest.mark.promise(14)
@pytest.mark.parametrize("answers", [[False], [True]])
def test_an_early_answer_about_a_cancellation_counts_for_a_moment(
    entry, hooks, monkeypatch, answers
):
    asked = []
    hooks = dataclasses.replace(
        hooks, is_cancelled=lambda entry: asked.append(entry) or answers[-1]
    )
    monkeypatch.setattr(attempt, "LATELY", 60.0)
    outcome = pytest.raises(Ended) if answers[0] else contextlib.nullcontext()
    with outcome:
        Cancelled(hooks, entry).require_not()
    assert asked == [entry]
    early = Cancelled(hooks, entry)
    early.join()
    answers[-1] = True
    monkeypatch.setattr(attempt, "LATELY", -1.0)
    with pytest.raises(Ended, match="cancelled before it was activated") as end:
        early.require_not()
    assert end.value.step == journal.CANCELLED and asked == [entry] * 3


@pytest.mark.promise(10)
def test_an_answer_about_a_cancellation_that_never_comes_holds_up_nothing(
    entry, hooks, monkeypatch
):
    ended, asked = threading.Event(), []
    hooks = dataclasses.replace(
        hooks, is_cancelled=lambda entry: asked.append(entry) or ended.wait(60)
    )
    monkeypatch.setattr(attempt, "ASKING", 0.1)
    monkeypatch.setattr(attempt, "LATELY", -1.0)
    unanswered = Cancelled(hooks, entry)
    unanswered.require_not()
    assert unanswered.is_alive() and asked == [entry]
    ended.set()
    unanswered.join(10)


@pytest.fixture
def ends():
    """Both ends of a pipe."""
    to_switch, to_agent = os.pipe(), os.pipe()
    agent = pipe.AgentEnd(io.FileIO(to_agent[0]), io.FileIO(to_switch[1], "w"))
    switch = pipe.SwitchEnd(io.FileIO(to_switch[0]), io.FileIO(to_agent[1], "w"))
    yield agent, switch
    for file in (agent.source, agent.sink, switch.source, switch.sink):
        file.close()


def test_the_words_on_the_pipe(ends, entry):
    agent, switch = ends
    agent.configure({"token": "t"})
    assert switch.wait_for_config() == {"token": "t"}
    switch.report(pipe.READY)
    assert agent.is_ready(1)
    agent.go("deploy", entry.record)
    assert switch.wait_for_go() == ("deploy", entry.record)
    switch.report(journal.FAILED, "two\nlines")
    assert agent.listen(1) == pipe.Entered(journal.FAILED, "two lines")
    assert agent.listen(0) is None and not agent.at_end


def test_questions_on_the_pipe(ends):
    agent, switch = ends

    def answer():
        for problem in ("no route", ""):
            agent.answer(agent.listen(10), problem)

    thread = threading.Thread(target=answer)
    thread.start()
    assert switch.ask(f"{pipe.LOOK} 2.5", 10) == "no route"
    assert switch.ask(pipe.BEGIN, 10) == ""
    thread.join()
    with pytest.raises(Error, match="did not answer within 0 s"):
        switch.ask(pipe.BEGIN, 0.1)
    agent.say_goodbye()
    agent.sink.close()
    assert switch.ask(pipe.BEGIN, 10) is None and not switch.is_alive() and not switch.was_lost()


def test_a_question_in_advance(ends):
    """`ask` takes its answer. One that nobody waits for is not taken for that of the next one."""
    agent, switch = ends
    for question, problem in ((f"{pipe.LOOK} 2.5", "no route"), (f"{pipe.LOOK} 1.5", "late")):
        switch.begin_to_ask(question)
        agent.answer(agent.listen(10), problem)
    assert switch.ask(f"{pipe.LOOK} 1.5", 10) == "late"
    switch.begin_to_ask(f"{pipe.LOOK} 2.5")
    agent.answer(agent.listen(10), "early")
    agent.answer(pipe.Question("4", pipe.BEGIN, 0.0), "")
    assert switch.ask(pipe.BEGIN, 10) == ""


def test_an_agent_that_ends_without_a_goodbye_was_lost(ends):
    agent, switch = ends
    agent.answer(pipe.Question("1", pipe.BEGIN, 0.0), "too late")
    agent.sink.close()
    assert switch.was_lost()
    agent.say_goodbye()
    with pytest.raises(OSError):
        agent.send("anything")


@pytest.mark.parametrize("reason", ["ä" * 9999, "\udcff" * 9999, "x\ty\r\n\n" * 9999, ""])
def test_a_reason_of_any_length_arrives_as_one_line(ends, reason):
    agent, switch = ends
    switch.report(journal.FAILED, reason)
    message = agent.listen(1)
    assert message.step == journal.FAILED and len(message.reason) <= pipe.LINE_BYTES
    assert bool(message.reason) == bool(reason) and "\ufffd" not in message.reason
    assert agent.listen(0) is None
