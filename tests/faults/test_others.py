"""Another tool switches the system, such as an operator's `nixos-rebuild`, in each step.

The systems here take the lock of `switch-to-configuration`, as all systems of NixOS do.
"""

import dataclasses
import fcntl
import os
import threading

import closures
import pytest
import scenes
from chains import GOOD, kill_agent, log_of
from hosts import BOOT_DEFAULT, CURRENT_SYSTEM, SYSTEM, wait_until
from world import WAITS

LOCK = "/run/nixos/switch-to-configuration.lock"
TAKE = (
    f"mkdir -p /run/nixos; exec 9>>{LOCK}; "
    'flock -n 9 || { echo "Could not acquire lock" >&2; exit 1; }'
)
WAITING = f"waiting for another tool that switches this system (it holds {LOCK})"


def system(world, version, how=scenes.GOOD):
    """A NixOS system that refuses to run beside another tool, and says where it is."""
    bad = "exit 1" if how == scenes.BAD else ":"
    return closures.nixos(
        world.files,
        version,
        f'{TAKE}; visit test "$self" || exit $?',
        f'visit test.end "$self" || exit $?; {bad}',
        f'{TAKE}; visit boot "$self" || exit $?',
        'visit boot.end "$self" || exit $?',
        parts=1,
    )


def deploy(world, version, how=scenes.GOOD):
    return world.deploy(system(world, version, how), scenes.script(world.files))


class Tool:
    """Another tool. It holds the lock from `begin` to `end`, and may leave its own system."""

    def __init__(self, world):
        self.world, self.fd = world, -1

    def begin(self):
        path = self.world.host.path(LOCK)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def switch(self):
        """Switch to a system of its own, which is good; its path."""
        path = system(self.world, "by-hand")
        self.world.workspace.push(path)
        key = self.world.files.key.public
        sources = ["--option", "substituters", self.world.workspace.cache_url]
        self.run("nix-store", "--realise", path, *sources, "--option", "trusted-public-keys", key)
        self.run("nix-env", "--profile", SYSTEM, "--set", path)
        for link in (CURRENT_SYSTEM, BOOT_DEFAULT):
            self.world.host.path(link).unlink()
            os.symlink(path, self.world.host.path(link))
        return path

    def run(self, *argv):
        """Run a program of the operator's, who does not tell the test where it is."""
        real = self.world.host.environment["PATH"].partition(":")[2]
        done = self.world.host.run(["env", f"PATH={real}", *argv])
        assert done.returncode == 0, done.stderr

    def end(self):
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


@pytest.fixture
def tool(make_world):
    """A tool on a machine: `tool.world`."""
    made = Tool(make_world(args=("--activation-timeout=20", "--confirm-timeout=10")))
    yield made
    made.end()


def end_later(tool, deployment, before_end=lambda: None):
    """End the tool's switch once the deployment waits for it."""
    wait_until(lambda: WAITING in log_of(tool.world, deployment), 30, "the wait")
    before_end()
    tool.end()


def begin_at(tool, pattern, before_end=lambda: None):
    """Let the tool begin where `pattern` is met, and end once the deployment waits."""

    def begin(world, visit):
        tool.begin()
        argument = (tool, world.asked[-1].id, before_end)
        threading.Thread(target=end_later, args=argument, daemon=True).start()
        return "go"

    tool.world.order(pattern, begin)


@pytest.mark.promise(1, 3)
def test_a_switch_in_progress_is_waited_for(tool, finish):
    tool.begin()
    deployment = deploy(tool.world, "second")
    end_later(tool, deployment)
    assert tool.world.ended(deployment) == "succeeded"
    assert tool.world.story() == GOOD
    finish(tool.world)


@pytest.mark.promise(3)
@pytest.mark.parametrize("when", ["before", "between"])
def test_the_system_that_another_tool_leaves_is_the_previous_one(tool, finish, when):
    """`between`: it begins once the previous system was looked at, and nothing activated yet."""
    world, left = tool.world, []

    def switch():
        left.append(tool.switch())

    if when == "before":
        tool.begin()
        deployment = deploy(world, "second", scenes.BAD)
        end_later(tool, deployment, switch)
    else:
        begin_at(tool, r"^nix-store .*--add-root \S+/previous", switch)
        deployment = deploy(world, "second", scenes.BAD)
    assert world.ended(deployment) == "rolled-back"
    assert world.host.journal(deployment)["previous_running"] == left[0]
    assert world.running() == world.profile() == world.host.boot_default() == left[0]
    world.asked[0] = dataclasses.replace(world.asked[0], before=left[0])
    finish(world)


@pytest.mark.promise(7, 10)
def test_a_switch_that_never_ends(make_world, finish):
    world = make_world(args=("--activation-timeout=2", "--confirm-timeout=10"))
    tool = Tool(world)
    tool.begin()
    deployment = deploy(world, "second")
    assert world.ended(deployment) == "failed"
    tool.end()
    reason = world.workspace.deployment(deployment)["reason"]
    assert LOCK in reason and reason.endswith("did not end within 2 s; nothing was changed")
    assert world.story() == "downloading: download second"
    finish(world)


@pytest.mark.promise(1, 4)
def test_a_switch_before_the_commit_is_waited_for(tool, finish):
    begin_at(tool, "^script")
    deployment = deploy(tool.world, "second")
    assert tool.world.ended(deployment) == "succeeded"
    assert tool.world.story() == GOOD
    finish(tool.world)


@pytest.mark.promise(1)
def test_a_deployment_of_another_tool_before_the_commit_is_left_alone(tool, finish):
    left = []
    begin_at(tool, "^script", lambda: left.append(tool.switch()))
    deployment = deploy(tool.world, "second")
    assert tool.world.ended(deployment) == "failed"
    reason = tool.world.workspace.deployment(deployment)["reason"]
    assert reason == f"{left[0]} runs now, so somebody else has deployed: it is left alone"
    assert tool.world.running() == tool.world.profile() == left[0]
    assert [line for line in tool.world.story().splitlines() if line.startswith("rolling")] == []
    tool.world.asked.clear()  # what runs is not theirs
    finish(tool.world)


@pytest.mark.promise(3)
def test_a_switch_before_a_rollback_is_waited_for(tool, finish):
    begin_at(tool, "^script")
    script = scenes.script(tool.world.files, scenes.BAD)
    deployment = tool.world.deploy(system(tool.world, "second"), script)
    assert tool.world.ended(deployment) == "rolled-back"
    assert WAITING in log_of(tool.world, deployment)
    assert tool.world.story().count("test first") == 1
    finish(tool.world)


@pytest.mark.promise(3)
def test_a_switch_between_two_attempts_at_a_rollback_is_waited_for(tool, finish):
    begin_at(tool, r"^test \S+-first")
    begin = tool.world.orders[0].reply
    tool.world.orders[0].reply = lambda world, visit: [begin(world, visit), "exit 7"][1]
    deployment = deploy(tool.world, "second", scenes.BAD)
    assert tool.world.ended(deployment) == "rolled-back"
    assert WAITING in log_of(tool.world, deployment)
    assert tool.world.story().splitlines()[-2:] == [
        "rolling-back: test first -> exit 7",
        "rolling-back: test first",
    ]
    finish(tool.world)


@pytest.mark.promise(3, 7)
@pytest.mark.long
def test_a_switch_that_never_ends_in_a_rollback(make_world, finish):
    """The rollback is refused then, and the machine is left on an unconfirmed path."""
    world = make_world(args=("--activation-timeout=1", "--confirm-timeout=10"))
    tool, first = Tool(world), world.running()

    def begin(world, visit):
        tool.begin()
        return "go"

    fresh = closures.nixos(world.files, "second", "", 'visit test.end "$self"; exit 1')
    world.order(r"^test\.end \S+-second", begin)
    world.install(system(world, "first-that-locks"))
    locking = world.running()
    assert locking != first
    deployment = world.deploy(fresh, scenes.script(world.files))
    assert world.ended(deployment) == "rollback-failed"
    tool.end()
    reason = world.workspace.deployment(deployment)["reason"]
    assert "it was refused (Could not acquire lock)" in reason
    assert world.running() == fresh
    third = deploy(world, "third", scenes.BAD)
    assert world.ended(third) == "rolled-back"
    assert world.running() == locking, "the previous system is the last confirmed one"
    finish(world)


@pytest.mark.promise(7, 8)
@pytest.mark.parametrize("how", ["agent", "switch", "both"])
def test_killed_while_it_waits(tool, finish, how):
    tool.begin()
    deployment = deploy(tool.world, "second")
    wait_until(lambda: WAITING in log_of(tool.world, deployment), 30, "the wait")
    tool.world.kill(switch=how != "agent", agent=how != "switch")
    tool.end()
    assert tool.world.ended(deployment) == "succeeded"
    assert tool.world.running() == tool.world.asked[0].path
    finish(tool.world)


@pytest.mark.promise(8, 10)
@pytest.mark.long
def test_the_agent_is_stopped_while_it_waits(tool, finish):
    tool.begin()
    deployment = deploy(tool.world, "second")
    wait_until(lambda: WAITING in log_of(tool.world, deployment), 30, "the wait")
    assert tool.world.agent.stop() == 0
    tool.world.start()
    tool.end()
    assert tool.world.ended(deployment) == "succeeded"
    finish(tool.world)


# --- refusals -----------------------------------------------------------------------------------

WORDS = {
    "nixos": "Could not acquire lock",
    "darwin": "error: Unexpected files in /etc, aborting activation",
    "home_manager": "Existing file '/home/x/.bashrc' would be clobbered",
}
BEGUN = {
    "nixos": "activating the configuration...",
    "darwin": "setting up groups...",
    "home_manager": "Activating writeBoundary",
}


def refusing(world, version, words, after=""):
    """A system of the world's kind that says `words` and fails while /run/refuse is there."""
    point = "test" if world.kind == "nixos" else "activate"
    before = f'visit {point} "$self" || exit $?; [ ! -e /run/refuse ] || {{ {words}; exit 2; }}'
    return getattr(closures, world.kind)(world.files, version, before, after=after)


def install(world, path):
    """Let the machine run `path`."""
    assert world.ended(world.deploy(path, scenes.script(world.files))) == "succeeded"
    world.visits.clear()
    world.asked.clear()


@pytest.mark.promise(3, 7)
@pytest.mark.parametrize("kind", WORDS)
def test_a_refusal_changes_nothing(make_world, finish, kind):
    world = make_world(kind)
    words = f'echo "{WORDS[kind]}" >&2'
    first = refusing(world, "refusing", words)
    install(world, first)
    world.host.path("/run/refuse").touch()
    deployment = world.deploy(refusing(world, "second", words), scenes.script(world.files))
    assert world.ended(deployment) == "failed"
    reason = world.workspace.deployment(deployment)["reason"]
    assert reason == f"the activation was refused ({WORDS[kind]}); nothing was changed"
    assert "rolling-back" not in world.story()
    world.host.path("/run/refuse").unlink()
    third = world.deploy(refusing(world, "third", words, "exit 1"), scenes.script(world.files))
    assert world.ended(third) == "rolled-back"
    assert world.host.journal(third)["previous_running"] == first
    finish(world)


@pytest.mark.promise(3, 7)
@pytest.mark.parametrize("kind", WORDS)
def test_a_refusal_in_unknown_words_is_no_failed_rollback(make_world, finish, kind):
    """The rollback is made, and refused in the same way; what runs says that nothing is wrong."""
    world = make_world(kind)
    first = refusing(world, "refusing", "echo no")
    install(world, first)
    world.host.path("/run/refuse").touch()
    deployment = world.deploy(refusing(world, "second", "echo no"), scenes.script(world.files))
    assert world.ended(deployment) == "rolled-back"
    reason = world.workspace.deployment(deployment)["reason"]
    assert reason.startswith(f"the activation ended with status 2; rolled back to {first}, but ")
    assert "ended with status 2" in reason.partition(", but ")[2]
    assert world.story().count("rolling-back") == 1 and world.running() == first
    world.host.path("/run/refuse").unlink()
    finish(world)


@pytest.mark.promise(3)
@pytest.mark.parametrize("kind", WORDS)
def test_there_is_time_between_two_attempts_at_a_rollback(make_world, finish, kind):
    """Whatever refuses the first one may be gone at the second."""
    world = make_world(kind, waits={**WAITS, "retry": 1.0})
    first = refusing(world, "refusing", f'echo "{WORDS[kind]}"')
    install(world, first)
    second = refusing(world, "second", "exit 2", "touch /run/refuse; exit 1")
    deployment = world.deploy(second, scenes.script(world.files))
    wait_until(lambda: "trying again" in log_of(world, deployment), 30, "the pause")
    world.host.path("/run/refuse").unlink()
    assert world.ended(deployment) == "rolled-back"
    reason = world.workspace.deployment(deployment)["reason"]
    assert reason == f"the activation ended with status 1; rolled back to {first}"
    finish(world)


@pytest.mark.promise(3)
@pytest.mark.parametrize("kind", WORDS)
def test_words_of_a_refusal_are_not_believed_once_it_has_begun(make_world, finish, kind):
    world = make_world(kind)
    words = f'echo "{BEGUN[kind]}"; touch /run/half-done; echo "{WORDS[kind]}"'
    install(world, refusing(world, "careful", "rm -f /run/half-done /run/refuse; exit 0"))
    world.host.path("/run/refuse").touch()
    deployment = world.deploy(refusing(world, "second", words), scenes.script(world.files))
    assert world.ended(deployment) == "rolled-back"
    assert not world.host.path("/run/half-done").exists(), "the previous system was not activated"
    finish(world)


@pytest.mark.promise(3)
def test_the_previous_system_is_what_an_operator_has_put_there_since(make_world, finish):
    """By hand, after a failed rollback: what ran before that one is not the previous one now."""
    world = make_world()
    world.order(r"^test \S+-first", "exit 7", 3)
    failed = scenes.deploy(world, "second", scenes.BAD)
    assert world.ended(failed) == "rollback-failed"
    by_hand = Tool(world).switch()
    deployment = scenes.deploy(world, "third", scenes.BAD)
    assert world.ended(deployment) == "rolled-back"
    assert world.running() == world.profile() == world.host.boot_default() == by_hand
    world.asked.clear()  # what runs is not theirs
    finish(world)


@pytest.mark.promise(8)
@pytest.mark.long
def test_the_agent_is_killed_between_two_attempts_at_a_rollback(make_world, finish):
    world = make_world(waits={**WAITS, "retry": 5.0})
    world.order(r"^test \S+-first", "exit 7")
    deployment = scenes.deploy(world, "second", scenes.BAD)
    wait_until(lambda: "trying again" in log_of(world, deployment), 30, "the pause")
    kill_agent(world)
    world.start()
    assert world.ended(deployment) == "rolled-back"
    finish(world)
