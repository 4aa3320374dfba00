"""Kills around what an agent must remember: what it has executed, and the token of its own."""

import itertools
import json
import os
import threading
import time

import pytest
import scenes
from chains import GOOD
from hosts import wait_until
from proxy import Proxy
from world import OPTIONS, Asked

from cachix_connection import Peer, http
from cachix_signed import SecretKey, Statement, plain_host

KEY = SecretKey("ci-1", b"c" * 32)
SYSTEM = "x86_64-linux"
HANGS = ".json.new"  # a FIFO of this name lets whoever writes the file wait, as for a slow disk

# --- signed deployments ---------------------------------------------------------------------------


@pytest.fixture
def signed(make_world, scripted):
    """A machine that runs only what is signed, and a workspace whose CI signs: newer ones last."""
    sequence = itertools.count(100)

    def sign(agent, path, script):
        scripts = {SYSTEM: script} if script else {}
        place = (plain_host(scripted.url), agent, path)
        return KEY.sign(Statement(*place, next(sequence), scripts))

    scripted.sign = sign
    args = (f"--deployment-key={KEY.public_text()}", *OPTIONS)
    return make_world(workspace=scripted, args=args)


def executed(world):
    """Return the highest sequence that the agent has noted; None if it has noted none."""
    path = world.host.state / f"executed-{world.name}.json"
    return next(iter(json.loads(path.read_text()).values()))["sequence"] if path.exists() else None


def is_refused(world, scripted, deployment):
    """Let the workspace send an old order as a new deployment; whether the agent refuses it."""
    sent = {**scripted.sent[deployment], "index": len(scripted.sent) + 1}
    replay = scripted.peer.deploy(**sent)
    scripted.sent[replay] = sent
    world.lost.add(replay)  # it is none that was asked for
    return scripted.wait(replay) == "Failed" and "is older than" in scripted.log(replay)[-1]


@pytest.mark.promise(2, 13)
def test_killed_before_the_last_check_of_a_signature(signed, scripted, finish):
    """The deployment has passed the first one, on its arrival, and nothing is noted."""
    scripted.at_last_look(lambda: signed.kill(agent=True))
    deployment = scenes.deploy(signed, "second")
    assert signed.ended(deployment) == "succeeded"
    assert executed(signed) == 100
    assert signed.story() == GOOD
    finish(signed)
    assert is_refused(signed, scripted, deployment)


@pytest.mark.promise(2, 13)
def test_killed_between_the_check_and_the_note_of_its_sequence(signed, scripted, finish):
    """Nothing may be executed whose sequence is not noted, and what was not is no loss."""
    note, looked = signed.host.state / f"executed-{signed.name}{HANGS}", threading.Event()
    os.mkfifo(note)
    scripted.at_last_look(looked.set)
    deployment = scenes.deploy(signed, "second")
    assert looked.wait(30)
    time.sleep(0.5)
    assert (signed.step(), executed(signed), "test" in signed.story()) == ("ready", None, False)
    note.unlink()
    signed.kill(agent=True)
    assert signed.ended(deployment) == "succeeded"
    assert executed(signed) == 100
    assert signed.story() == GOOD
    finish(signed)
    assert is_refused(signed, scripted, deployment)


@pytest.mark.promise(2, 13)
@pytest.mark.parametrize("kill", [scenes.kill_agent, scenes.kill_switch, scenes.kill_both])
def test_killed_after_the_note_of_its_sequence(signed, scripted, finish, kill):
    """The same order may be executed again, which CI does by a retry, and an older one may not."""
    first = scenes.deploy(signed, "second")
    assert signed.ended(first) == "succeeded"
    signed.order(r"^test \S+-third", kill)
    deployment = scenes.deploy(signed, "third")
    end = signed.ended(deployment)
    assert end == ("succeeded" if kill is scenes.kill_agent else "rolled-back")
    assert executed(signed) == 101
    before, sent = signed.running(), {**scripted.sent[deployment], "index": 3}
    again = scripted.peer.deploy(**sent)
    scripted.sent[again] = sent
    signed.asked.append(Asked(again, sent["store_path"], before))
    assert signed.ended(again) == "succeeded"
    assert is_refused(signed, scripted, first)
    finish(signed)


# --- the token of its own -------------------------------------------------------------------------


@pytest.fixture
def enrolled(make_world, live):
    """A machine that is to come with an enrolment token, by a proxy."""
    with Proxy(live.url) as proxy:
        world = make_world(start=False, url=proxy.url)
        world.proxy = proxy
        world.token = live.token("agent", f"--names={world.name}*")
        yield world


def own_token(world):
    """Return the token that the agent keeps; None if it keeps none."""
    path = world.host.state / f"secret-{world.name}.json"
    return json.loads(path.read_text())["token"] if path.exists() else None


def own_tokens(world):
    """Return the tokens that the workspace has issued to the agent itself, if it takes them."""
    listed = json.loads(world.workspace.cli("token", "list", "--json"))
    return [one for one in listed if one["agents"] == world.name and one["state"] == "valid"]


def is_bound(world):
    """Whether nobody can come by the agent's name with the enrolment token any more."""
    peer = Peer(world.workspace.url, world.token, world.name)
    answer = http(peer, "PUT", "/api/v1/deploy/agent/any/state", json={})
    return answer.status == 403 and b"belongs to another machine" in answer.body


def comes_again(world, finish):
    """Check that the next agent comes to a whole end: bound, with one token, and deployed to."""
    wait_until(lambda: "is connected to" in world.agent.text(), 30, "the next agent")
    wait_until(lambda: is_bound(world), 10, "the binding")
    assert len(own_tokens(world)) == 1
    assert "refused" not in world.agent.text()
    finish(world)
    world.kill(agent=True)  # once more, now that all is kept
    wait_until(lambda: "is connected to" in world.agent.text(), 30, "the last agent")
    assert len(own_tokens(world)) == 1


@pytest.mark.promise(6, 12)
@pytest.mark.long
def test_killed_before_its_own_token_is_kept(enrolled, finish):
    """It comes again with the other one and gets another, and the lost one is none any more."""
    secret = enrolled.host.state / f"secret-{enrolled.name}{HANGS}"
    os.mkfifo(secret)
    enrolled.start()
    wait_until(lambda: enrolled.proxy.count("^< ws /ws text") == 1, 30, "the registration")
    time.sleep(0.5)
    assert own_token(enrolled) is None and not is_bound(enrolled)
    secret.unlink()
    enrolled.kill(agent=True)
    comes_again(enrolled, finish)


@pytest.mark.promise(6, 12)
@pytest.mark.parametrize("moment", ["> GET /ws", "< 101 GET /ws"], ids=["unused", "used"])
@pytest.mark.long
def test_killed_between_keeping_its_own_token_and_its_first_use(enrolled, finish, moment):
    """Also when the workspace has seen that use, and has bound the name, and the agent has not."""
    proxy = enrolled.proxy
    proxy.order("^< ws /ws text", "delay")
    enrolled.start()
    wait_until(lambda: proxy.count("^< ws /ws text") == 1, 30, "the registration")
    proxy.order(f"^{moment}$", "half-open")
    wait_until(lambda: proxy.count(f"^{moment}$") == 2, 30, "the second connection")
    kept = own_token(enrolled)
    assert kept is not None
    if moment[0] == ">":
        assert not is_bound(enrolled)
    else:
        wait_until(lambda: is_bound(enrolled), 10, "the binding")
    enrolled.kill(agent=True)
    comes_again(enrolled, finish)
    assert own_token(enrolled) == kept
