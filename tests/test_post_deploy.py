"""The post-deployment command, once for each result, and the metrics for node_exporter."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from caches import Cache
from closures import nixos
from hosts import Host, Program, wait_until
from peer import Peer
from prometheus_client.parser import text_string_to_metric_families

import cachix_postdeploy
import cachix_textfile
from activate import journal, process
from cachix_options import agent_options, parse
from cachix_postdeploy import NOTE, OUTPUT, PostDeploy
from cachix_protocol import UsageError

NEW, OLD = "/nix/store/" + "a" * 32 + "-new", "/nix/store/" + "b" * 32 + "-old"


def entry(
    state: Path, name: str = "one", step: str = journal.SUCCEEDED, **facts: Any
) -> journal.Journal:
    record = journal.Record(
        id=name, index=7, agent="web", host="http://h", store_path=NEW, **{"sequence": 1, **facts}
    )
    (state / "deployments").mkdir(exist_ok=True)
    made = journal.Journal(str(state / "deployments" / name), record)
    made.enter(step)
    return made


@pytest.fixture
def command(tmp_path: Path) -> Path:
    """A command that notes its environment, and ends as the file `status` says."""
    path = tmp_path / "command"
    names = f'grep -az "^{cachix_postdeploy.PREFIX}" /proc/self/environ | tr "\\0" "\\n"'
    path.write_text(
        f"#!/bin/sh\n{names} >>{tmp_path}/calls\necho --- >>{tmp_path}/calls\n"
        f"echo to be seen later\nexit $(cat {tmp_path}/status 2>/dev/null || echo 0)\n"
    )
    path.chmod(0o755)
    return path


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


def calls(tmp_path: Path) -> list[dict[str, str]]:
    """The environments in which the command has run."""
    if not (tmp_path / "calls").exists():
        return []
    texts = (tmp_path / "calls").read_text().split("---\n")[:-1]
    return [dict(line.split("=", 1) for line in text.splitlines()) for text in texts]


def make(command: Path, state: Path, messages: list[str]) -> PostDeploy:
    post = PostDeploy(str(command), str(state), "web", messages.append)
    post.begin()
    return post


def test_once_for_each_result(command: Path, state: Path, tmp_path: Path) -> None:
    messages: list[str] = []
    entry(state, "before", sequence=1)
    post = make(command, state, messages)
    failed = {"kind": "NixOS", "profile": "/p", "previous_running": OLD, "reason": "it broke"}
    entry(state, "one", journal.ROLLED_BACK, sequence=2, **failed)
    entry(state, "going", journal.CHECKING, sequence=3)
    for _ in range(3):
        post.run_due()
        make(command, state, messages).run_due()  # the next agent
    (call,) = calls(tmp_path)
    assert call == {
        "CACHIX_DEPLOY_OUTCOME": "rolled-back",
        "CACHIX_DEPLOY_STEP": "rolled-back",
        "CACHIX_DEPLOY_AGENT": "web",
        "CACHIX_DEPLOY_DEPLOYMENT": "one",
        "CACHIX_DEPLOY_INDEX": "7",
        "CACHIX_DEPLOY_BY_HAND": "",
        "CACHIX_DEPLOY_WORKSPACE": "http://h",
        "CACHIX_DEPLOY_KIND": "NixOS",
        "CACHIX_DEPLOY_PROFILE": "/p",
        "CACHIX_DEPLOY_OPERATION": "switch",
        "CACHIX_DEPLOY_STORE_PATH": NEW,
        "CACHIX_DEPLOY_PREVIOUS_PATH": OLD,
        "CACHIX_DEPLOY_REASON": "it broke",
    }
    assert "to be seen later" in (state / "deployments/one" / OUTPUT).read_text()
    entry(state, "going", journal.SUCCEEDED, sequence=3)
    post.run_due()
    assert len(calls(tmp_path)) == 2 and messages == []


def test_its_failure_is_told_and_changes_nothing(
    command: Path, state: Path, tmp_path: Path
) -> None:
    messages: list[str] = []
    post = make(command, state, messages)
    (tmp_path / "status").write_text("3")
    made = entry(state)
    before = Path(made.path("journal.json")).read_bytes()
    post.run_due()
    post.run_due()
    assert len(calls(tmp_path)) == 1
    assert "deployment 7: the post-deployment command ended with status 3" in messages[0]
    assert json.loads(Path(made.path(NOTE)).read_text())["status"] == 3
    assert Path(made.path("journal.json")).read_bytes() == before


def test_it_has_a_limit_of_time(command: Path, state: Path) -> None:
    command.write_text("#!/bin/sh\nsleep 60\n")
    messages: list[str] = []
    post = make(command, state, messages)
    post.timeout = 0.3
    entry(state)
    post.run_due()
    assert "was ended because it ran longer than" in messages[0]


@pytest.mark.parametrize("point", ["before", "during"])
def test_a_crash(
    command: Path, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Before the note it is not lost; after it, it is not repeated."""
    post = make(command, state, [])
    entry(state)

    class Crash(BaseException):
        pass

    def crash(*_: object, **__: object) -> int:
        raise Crash

    if point == "before":
        monkeypatch.setattr(cachix_postdeploy, "_claim", crash)
    else:
        monkeypatch.setattr(process, "run", crash)
    with pytest.raises(Crash):
        post.run_due()
    monkeypatch.undo()
    make(command, state, []).run_due()
    assert len(calls(tmp_path)) == (1 if point == "before" else 0)


def test_a_note_that_can_not_be_written_puts_it_off(
    command: Path, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int) -> None:
        raise OSError(28, "No space left on device")

    post = make(command, state, [])
    entry(state)
    monkeypatch.setattr(os, "fsync", refuse)
    post.run_due()
    assert calls(tmp_path) == []
    monkeypatch.undo()
    post.run_due()
    assert len(calls(tmp_path)) == 1


def test_without_the_option_nothing_is_remembered(
    command: Path, state: Path, tmp_path: Path
) -> None:
    make(command, state, [])
    entry(state)
    without = PostDeploy(None, str(state), "web", lambda message: None)
    without.begin()
    without.run_due()
    make(command, state, []).run_due()
    assert calls(tmp_path) == [], "a result from before the option was given"


# --- metrics --------------------------------------------------------------------------------------


def samples(path: Path) -> dict[str, tuple[dict[str, str], float]]:
    """The metrics in a file, by their names without the prefix; each once."""
    found = {}
    for family in text_string_to_metric_families(path.read_text()):
        assert family.type == "gauge" and family.documentation.endswith(".")
        (sample,) = family.samples
        found[sample.name[len(cachix_textfile.PREFIX) :]] = (dict(sample.labels), sample.value)
    return found


def start(host: Host, peer: Peer, *args: str) -> Program:
    waits = json.dumps({"backoff": 0.05, "slowest": 0.2, "look": 0.2})
    return host.agent("web", peer.url, "T", *args, env={"CACHIX_DEPLOY_WAITS": waits})


def test_an_agent_with_both(host: Host, cache: Cache, peer: Peer, tmp_path: Path) -> None:
    """The file follows a deployment, and holds nothing half written at any time."""
    target, seen = host.path("/run/web.prom"), host.path("/run/calls")
    command = host.path("/run/command")
    command.write_text('#!/bin/sh\necho "$CACHIX_DEPLOY_OUTCOME" >>/run/calls\n')
    command.chmod(0o755)
    peer.cache = cache.wire()
    host.install(cache.url, cache.key.public, nixos(cache, "old"))
    agent = start(host, peer, "--metrics-file=/run/web.prom", "--post-deploy=/run/command")
    wait_until(lambda: target.exists() and samples(target)["connected"][1] == 1)
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    path = nixos(cache, "new", after="exit 1")
    peer.deploy(path)
    wait_until(lambda: seen.exists() and seen.read_text() == "rolled-back\n", 30)
    wait_until(lambda: "last_result_info" in samples(target), 10)
    values = samples(target)
    assert values["last_result_info"][0]["outcome"] == "rolled-back"
    assert values["last_result_success"][1] == 0 and values["deployment_in_progress"][1] == 0
    assert values["running_info"][0]["hash"] in str(host.running())
    assert values["drift"][1] == 0 and values["reboot_needed"][1] == 0
    assert 0 <= values["last_result_duration_seconds"][1] < 600
    agent.stop()


def test_labels_are_escaped(tmp_path: Path) -> None:
    text = cachix_textfile.render([("agent_info", "An agent.", {"version": 'a"b\\c\nd'}, 1)])
    (family,) = text_string_to_metric_families(text)
    assert family.samples[0].labels["version"] == 'a"b\\c\nd'


def test_the_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "web.prom"
    (tmp_path / "victim").write_text("important")
    (tmp_path / "web.prom.new").symlink_to(tmp_path / "victim")
    cachix_textfile.write(str(path), "a 1\n")
    first = os.stat(path).st_ino
    cachix_textfile.write(str(path), "a 2\n")
    assert path.read_text() == "a 2\n" and os.stat(path).st_ino != first
    assert (tmp_path / "victim").read_text() == "important"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["victim", "web.prom"]


@pytest.mark.parametrize("option", ["--post-deploy", "--metrics-file"])
def test_paths_are_absolute(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHIX_AGENT_TOKEN", "T")
    with pytest.raises(UsageError, match=f"{option} must be an absolute path"):
        agent_options(parse(["agent", "web", f"{option}=relative"]))
