"""The disk is not as Nix says, or the time not as the clock says: the machine ends right anyway."""

import json
import os
import time

import closures
import pytest
import scenes
from world import ALWAYS

from activate import journal

BROKEN = "auto-optimise-store = true;"  # Nix refuses the semicolon, whatever it is asked


def configuration(world):
    """The nix.conf of the machine's user."""
    return f"{world.host.environment['XDG_CONFIG_HOME']}/nix/nix.conf"


def breaking(world):
    """Shell code that leaves a nix.conf with which no Nix command works."""
    conf = configuration(world)
    return f"mkdir -p {os.path.dirname(conf)}; echo '{BROKEN}' >{conf}"


def healing(world, point, then=":"):
    """Shell code of an activation that comes to `point`, and removes that nix.conf."""
    return f'visit {point} "$self" || exit $?; rm -f {configuration(world)}; {then}'


def run_first(world, path):
    """Let the machine run `path`, which heals nix.conf."""
    assert world.ended(world.deploy(path, scenes.script(world.files))) == "succeeded"
    world.visits.clear()
    world.asked.clear()


@pytest.mark.promise(3, 5)
@pytest.mark.parametrize("when", ["before", "middle", "after"])
def test_a_home_manager_generation_that_breaks_nix(make_world, finish, when):
    """The previous one mends it only after it has set its profile, for which it needs Nix."""
    world = make_world("home_manager")
    healer = closures.home_manager(world.files, "healer", middle=healing(world, "activate.middle"))
    run_first(world, healer)
    codes = {when: breaking(world)}
    codes["after"] = f"{codes.get('after', ':')}; exit 1"
    second = closures.home_manager(world.files, "second", **codes)
    deployment = world.deploy(second, scenes.script(world.files))
    assert world.ended(deployment) == "rolled-back", world.workspace.deployment(deployment)
    assert world.running() == world.profile() == healer
    assert not os.path.exists(configuration(world))
    finish(world)


@pytest.mark.promise(3, 5)
@pytest.mark.parametrize("when", ["after", "before_boot", "after_boot"])
def test_a_nixos_system_that_breaks_nix(make_world, finish, when):
    world = make_world()
    healer = closures.nixos(world.files, "healer", healing(world, "test"))
    run_first(world, healer)
    second = closures.nixos(world.files, "second", **{when: f"{breaking(world)}; exit 1"})
    deployment = world.deploy(second, scenes.script(world.files))
    assert world.ended(deployment) == "rolled-back", world.workspace.deployment(deployment)
    assert world.running() == world.profile() == world.host.boot_default() == healer
    finish(world)


@pytest.mark.promise(3, 5)
def test_a_check_that_breaks_nix(make_world, finish):
    world = make_world("plain")
    script = closures.script(world.files, "breaking", f"{breaking(world)}; exit 1")
    deployment = world.deploy(scenes.plain(world.files, "second"), script)
    assert world.ended(deployment) == "rolled-back", world.workspace.deployment(deployment)
    os.unlink(configuration(world))
    finish(world)


@pytest.mark.promise(3, 5)
@pytest.mark.parametrize("fault", ["exit 1", "die"])
@pytest.mark.parametrize("kind", ["nixos", "darwin", "plain"])
def test_a_rollback_where_no_nix_command_works(make_world, finish, kind, fault):
    world = make_world(kind)
    first, generations = world.running(), world.host.generations()
    if kind == "plain":
        world.order("^script", "exit 1")
    else:
        world.order(r"^nix-env\.end .*--set \S+-second", "exit 1")
    world.order(r"^nix-env .*(--switch-generation|--set \S+-first)", fault, ALWAYS)
    world.order("^nix-store --check-validity", fault, ALWAYS)
    deployment = scenes.deploy(world, "second")
    assert world.ended(deployment) == "rolled-back", world.workspace.deployment(deployment)
    assert world.running() == world.profile() == first
    assert os.readlink(world.host.path("/nix/var/nix/profiles/system")) == "system-1-link"
    assert set(world.host.generations()) == {*generations, 2}
    finish(world)


@pytest.mark.promise(2, 3)
@pytest.mark.parametrize("kind", ["nixos", "darwin", "home_manager"])
def test_the_new_path_vanishes_before_it_is_activated(make_world, finish, kind):
    world = make_world(kind)
    first = world.running()
    path = scenes.KINDS[kind](world.files, "second")

    def vanish(world, visit):
        os.rename(world.host.path(path), world.host.path(f"{path}.gone"))
        return "go"

    world.order(r"^nix-store .*--add-root \S+/previous", vanish)
    deployment = world.deploy(path, scenes.script(world.files))
    ends = {"succeeded": path, "rolled-back": first}  # it was looked for later, or earlier
    expected = ends[world.ended(deployment)]
    assert world.running() == world.profile() == expected
    assert os.path.lexists(world.host.path(expected))
    finish(world)


@pytest.mark.promise(2)
@pytest.mark.parametrize("part", ["path", "part", "script"])
def test_a_part_of_the_closure_has_vanished(make_world, finish, part):
    """Nix takes it for valid. It is downloaded again."""
    world = make_world()
    path, script = scenes.nixos(world.files, "second"), scenes.script(world.files)
    world.workspace.push(path, script)
    world.host.fetch(world.workspace.cache_url, world.files.key.public, path, script)
    parts = (one for one in world.files.closure(path) if "-part-0-second" in one)
    absent = {"path": path, "script": script, "part": next(parts)}[part]
    world.host.run(["rm", "-rf", absent])
    deployment = world.deploy(path, script)
    assert world.ended(deployment) == "succeeded", world.workspace.deployment(deployment)
    assert os.path.lexists(world.host.path(absent))
    finish(world)


def set_ahead(world, deployment, seconds):
    """Let a deployment have happened while the clock was wrong by so many seconds."""
    path = world.host.state / "deployments" / deployment / "journal.json"
    entry = json.loads(path.read_bytes())
    entry["times"] = {step: moment + seconds for step, moment in entry["times"].items()}
    path.write_text(json.dumps(entry))
    os.utime(path, (time.time() + seconds, time.time() + seconds))


@pytest.mark.promise(3)
@pytest.mark.parametrize("hours", [24, -24])
@pytest.mark.long
def test_the_clock_was_wrong_in_a_failed_rollback(make_world, finish, hours):
    """Later deployments go back to what ran before them, whatever the clock says."""
    world = make_world()
    world.order(r"^test \S+-first", "exit 7", 3)
    failed = scenes.deploy(world, "second", scenes.BAD)
    assert world.ended(failed) == journal.ROLLBACK_FAILED
    set_ahead(world, failed, hours * 3600)
    if hours < 0:  # the newest deployment by its number, the oldest by its times
        third = scenes.deploy(world, "third", scenes.BAD)
        assert world.ended(third) == "rolled-back"
        assert world.host.journal(third)["previous_running"] == world.asked[0].before
    for version in ("fourth", "fifth"):
        assert world.ended(scenes.deploy(world, version)) == "succeeded"
        set_ahead(world, world.asked[-1].id, -hours * 1800)
    good = world.running()
    assert world.ended(scenes.deploy(world, "sixth", scenes.BAD)) == "rolled-back"
    assert world.running() == world.profile() == world.host.boot_default() == good
    finish(world)
