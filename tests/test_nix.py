"""The exact command lines of Nix, and how its output is parsed."""

import os
import sys

import pytest
from hosts import PROJECT

from activate import byhand, nix, source
from activate.kinds import home_manager, nixos, plain
from activate.kinds.change import Change, restore_profile
from activate.process import CommandFailed
from activate.text import is_store_path

NEW = "/nix/store/" + "a" * 32 + "-new"
OLD = "/nix/store/" + "b" * 32 + "-old"
OLDER = "/nix/store/" + "c" * 32 + "-older"


class Recorder:
    """Stands for `run`: records each argv, and returns the status that is set for its last word."""

    def __init__(self, **statuses):
        self.calls, self.statuses = [], statuses

    def __call__(self, argv):
        self.calls.append(argv)
        return self.statuses.get(argv[-1], 0)


@pytest.fixture
def questions(monkeypatch):
    calls = []

    def ask(argv, timeout=0.0):
        calls.append(argv)
        return 0, f"{NEW}\t  12345\n", ""

    monkeypatch.setattr(nix, "ask", ask)
    monkeypatch.setattr(nix, "output", lambda argv, timeout=0.0: ask(argv, timeout)[1])
    return calls


TUNED = ["--max-jobs", "32", "--option", "max-substitution-jobs", "32"]
TUNED += ["--option", "http-connections", "128", "--option", "connect-timeout", "10"]
TUNED += ["--option", "stalled-download-timeout", "30"]
TUNED += ["--option", "fsync-store-paths", "true", *source.FOR_MEMORY]
FRESH = ["--option", "narinfo-cache-negative-ttl", "0"]


def test_realise_from_a_private_cache():
    run = Recorder()
    cache = nix.Source("http://c:8/cache/main", ("k1:aaa", "k2:bbb"), "/state/netrc-1")
    assert nix.realise([NEW, OLD], "/state/new", cache, run) == 0
    assert run.calls == [
        ["nix-store", "--realise", NEW, OLD, "--add-root", "/state/new", "--indirect", *TUNED]
        + ["--option", "extra-substituters", "http://c:8/cache/main"]
        + ["--option", "trusted-public-keys", "k1:aaa k2:bbb"]
        + [*FRESH, "--option", "netrc-file", "/state/netrc-1"]
    ]


def test_realise_without_a_cache_leaves_the_machines_own_keys_alone():
    run = Recorder()
    nix.realise([NEW], "/state/new", nix.Source(), run)
    assert run.calls == [
        ["nix-store", "--realise", NEW, "--add-root", "/state/new", "--indirect", *TUNED, *FRESH]
    ]


def test_a_dry_run_gives_up_a_silent_substituter_sooner():
    run = Recorder()
    nix.realise_dry_run([NEW], nix.Source(), run)
    sooner = ["--option", "stalled-download-timeout", "10"]
    assert run.calls == [["nix-store", "--realise", "--dry-run", NEW, *TUNED, *FRESH, *sooner]]


def test_a_source_that_replaces_the_substituters_and_what_nix_remembers():
    cache = nix.Source("http://c", ("k:1",), only=("http://c", "http://d"), fresh=True)
    assert cache.options() == [
        *TUNED,
        *["--option", "substituters", "http://c http://d", "--option", "extra-substituters", ""],
        *["--option", "trusted-public-keys", "k:1", *FRESH],
        *["--option", "narinfo-cache-positive-ttl", "0"],
    ]


@pytest.mark.parametrize(
    ("mebibytes", "slots"),
    [(256, 16), (512, 16), (1024, 32), (2048, 64), (4096, 128), (1 << 20, 128)],
)
def test_paths_at_a_time_by_the_memory(monkeypatch, mebibytes, slots):
    sizes = {"SC_PHYS_PAGES": mebibytes << 8, "SC_PAGE_SIZE": 1 << 12}
    monkeypatch.setattr("os.sysconf", sizes.__getitem__)
    assert source.slots() == slots


def test_paths_at_a_time_where_the_memory_is_not_known(monkeypatch):
    def sysconf(name):
        raise ValueError(name)

    monkeypatch.setattr("os.sysconf", sysconf)
    assert source.slots() == source.LEAST_SLOTS


def test_questions(questions):
    assert nix.realise_present([NEW, OLD], "/state/new", 300)
    assert nix.path_info_size(NEW) == 12345
    assert questions == [
        ["nix-store", "--realise", NEW, OLD, "--add-root", "/state/new", "--indirect"]
        + ["--option", "substitute", "false", "--max-jobs", "0"],
        ["nix", "path-info", "-S", NEW, "--option", "experimental-features", "nix-command"],
    ]


def test_show_config_under_its_old_and_its_new_name(monkeypatch):
    def output(argv, timeout=0.0):
        if argv[1] == "show-config":
            raise CommandFailed(argv, "is not a recognised command")
        return "netrc-file = /etc/nix/netrc\ntrusted-public-keys = a:1 b:2\nempty =\n"

    monkeypatch.setattr(nix, "output", output)
    expected = {"netrc-file": "/etc/nix/netrc", "trusted-public-keys": "a:1 b:2", "empty": ""}
    assert nix.show_config() == expected


def test_the_substituters_of_nix_conf_with_the_extra_ones_that_2_3_keeps_apart(monkeypatch):
    config = {"substituters": "http://a http://b", "extra-substituters": "http://c http://a"}
    monkeypatch.setattr(nix, "show_config", lambda: config)
    assert nix.substituters() == ["http://a", "http://b", "http://c"]


def test_set_profile_makes_the_directory(tmp_path):
    run = Recorder()
    profile = str(tmp_path / "profiles" / "system")
    nix.set_profile(profile, NEW, run)
    assert run.calls == [["nix-env", "--profile", profile, "--set", NEW]]
    assert os.path.isdir(tmp_path / "profiles")


def test_a_command_that_fails_is_an_error(tmp_path):
    with pytest.raises(CommandFailed, match="ended with status 1"):
        nix.switch_generation(str(tmp_path / "p"), 3, Recorder(**{"3": 1}))


def make_change(tmp_path, now, previous, generation):
    """Make a profile that points at `now` through generation 2; the change to be undone."""
    profile = str(tmp_path / "system")
    os.symlink(now, profile + "-2-link")
    os.symlink("system-2-link", profile)
    return Change(NEW, profile, previous, previous, generation)


def test_restore_profile_to_the_recorded_generation(tmp_path, monkeypatch):
    undo = make_change(tmp_path, NEW, OLD, 1)

    def run(argv):
        assert argv == ["nix-env", "--profile", undo.profile, "--switch-generation", "1"]
        os.symlink(OLD, undo.profile + "-1-link")
        os.unlink(undo.profile)
        os.symlink("system-1-link", undo.profile)
        return 0

    assert restore_profile(undo, run)
    assert nix.target(undo.profile) == OLD


def test_restore_profile_without_its_generation(tmp_path):
    run = Recorder(**{"1": 1})
    undo = make_change(tmp_path, NEW, OLD, 1)
    assert restore_profile(undo, run)
    assert run.calls[-1] == ["nix-env", "--profile", undo.profile, "--set", OLD]


def test_restore_profile_without_nix(tmp_path):
    run = Recorder(**{"1": 1, OLD: 1})
    undo = make_change(tmp_path, NEW, OLD, 1)
    os.symlink(OLD, undo.profile + "-1-link")
    assert restore_profile(undo, run)
    assert os.readlink(undo.profile) == "system-1-link"


def test_restore_profile_that_did_not_exist_removes_it(tmp_path):
    undo = make_change(tmp_path, NEW, None, None)
    assert restore_profile(undo, Recorder())
    assert os.listdir(tmp_path) == []


def test_restore_profile_that_has_not_changed_does_nothing(tmp_path):
    run = Recorder()
    assert not restore_profile(make_change(tmp_path, OLD, OLD, 2), run)
    assert run.calls == []


def test_target_stops_at_the_store_path(tmp_path):
    os.symlink(NEW, tmp_path / "one")
    os.symlink("one", tmp_path / "two")
    assert nix.target(str(tmp_path / "two")) == NEW
    assert nix.target(str(tmp_path / "missing")) is None
    os.symlink("loop", tmp_path / "loop")
    assert nix.target(str(tmp_path / "loop")) is None


def test_generation(tmp_path):
    os.symlink("system-17-link", tmp_path / "system")
    os.symlink(NEW, tmp_path / "direct")
    assert nix.generation(str(tmp_path / "system")) == 17
    assert nix.generation(str(tmp_path / "direct")) is None
    assert nix.generation(str(tmp_path / "missing")) is None


def test_nixos_commits_the_profile_before_the_boot_loader(tmp_path):
    run = Recorder()
    change = Change(NEW, str(tmp_path / "system"), OLD, OLD, 1)
    assert nixos.activate(change, run) == 0
    nixos.commit(change, run)
    assert run.calls == [
        [f"{NEW}/bin/switch-to-configuration", "test"],
        ["nix-env", "--profile", change.profile, "--set", NEW],
        [f"{NEW}/bin/switch-to-configuration", "boot"],
    ]


@pytest.mark.parametrize(
    ("now", "committed", "calls"),
    [
        (OLD, False, [[f"{OLDER}/bin/switch-to-configuration", "test"]]),
        (
            OLD,
            True,
            [
                [f"{OLD}/bin/switch-to-configuration", "boot"],
                [f"{OLDER}/bin/switch-to-configuration", "test"],
            ],
        ),
    ],
)
def test_nixos_rollback_boots_the_profile_and_runs_the_previous_system(
    tmp_path, now, committed, calls
):
    run = Recorder()
    undo = Change(NEW, make_change(tmp_path, now, OLD, 2).profile, OLDER, OLD, 2, committed)
    assert nixos.rollback(undo, run) == []
    assert run.calls == calls


def test_nixos_rollback_goes_on_after_a_failure(tmp_path):
    run = Recorder(boot=1)
    undo = Change(NEW, make_change(tmp_path, OLD, OLD, 2).profile, OLD, OLD, 2, committed=True)
    assert "could not be restored" in nixos.rollback(undo, run)[0]
    assert run.calls[-1] == [f"{OLD}/bin/switch-to-configuration", "test"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The links of a home-manager whose activation of NEW broke off: (current, former, change)."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(byhand, "GC_ROOTS", str(tmp_path / "gcroots"))
    monkeypatch.setattr(home_manager, "user", lambda: "jo")
    change = make_change(tmp_path, NEW, OLD, 1)
    former = str(tmp_path / "gcroots/per-user/jo/current-home")
    return f"{tmp_path}/home-manager/gcroots/current-home", former, change


def test_home_manager_rollback_shows_the_previous_generation_a_change(home):
    current, _, change = home
    byhand.point(current, OLD)
    run = Recorder()
    assert home_manager.rollback(change, run) == []
    assert run.calls == [[f"{OLD}/activate"]]
    assert os.readlink(current) == NEW


def test_home_manager_rollback_without_a_change_leaves_the_link_alone(home):
    current, _, change = home
    byhand.point(current, OLD)
    byhand.point(change.profile, OLD)
    run = Recorder()
    assert home_manager.rollback(change, run) == []
    assert (run.calls, os.readlink(current)) == ([[f"{OLD}/activate"]], OLD)


def test_home_manager_rollback_goes_on_without_the_link(home, tmp_path):
    (tmp_path / "home-manager").write_text("no directory")
    run = Recorder()
    assert "could not be pointed at the new generation" in home_manager.rollback(home[2], run)[0]
    assert run.calls == [[f"{OLD}/activate"]]


def test_home_manager_runs_what_either_link_says_or_the_profile(home):
    current, former, change = home
    assert home_manager.running_path(change.profile) == NEW
    byhand.point(former, OLDER)
    assert home_manager.running_path(change.profile) == OLDER
    byhand.point(current, OLD)
    assert home_manager.running_path(change.profile) == OLD


@pytest.mark.parametrize("place", ["current", "former"])
def test_home_manager_rollback_to_a_generation_that_keeps_one_of_the_links(home, place):
    """Before 22.11 it kept the former one, and does not know of the other."""
    current, former, change = home
    byhand.point(former, OLD)

    def run(argv):
        assert (os.readlink(current), os.readlink(former)) == (NEW, NEW)
        byhand.point(current if place == "current" else former, OLD)
        return 0

    assert home_manager.rollback(change, run) == []
    assert os.readlink(former) == OLD and home_manager.running_path(change.profile) == OLD
    assert os.path.lexists(current) == (place == "current")


def test_a_gc_root_by_hand_is_the_one_that_nix_makes(host):
    path = host.output("nix-store", "--add", "/etc/hostname").strip()
    links = [f"{host.directory}/by-nix", f"{host.directory}/by-hand"]
    host.output("nix-store", "--realise", path, "--add-root", links[0], "--indirect")
    code = f"from activate import byhand; byhand.point({links[1]!r}, {path!r})"
    code += f"; byhand.add_root({links[1]!r}); byhand.add_root({links[0]!r})"
    host.output("env", f"PYTHONPATH={PROJECT}", sys.executable, "-c", code)
    roots = host.path("/nix/var/nix/gcroots/auto").iterdir()
    assert sorted(os.readlink(root) for root in roots) == sorted(links)
    assert set(host.output("nix-store", "--query", "--roots", path).split()) >= set(links)


@pytest.mark.parametrize(
    ("links", "number", "expected"),
    [({1: OLD, 2: NEW}, 1, 1), ({1: OLD, 2: NEW, 5: OLD}, 3, 5), ({2: NEW}, 1, 3), ({}, None, 1)],
)
def test_a_profile_by_hand(tmp_path, monkeypatch, links, number, expected):
    monkeypatch.setattr(byhand, "GC_ROOTS", str(tmp_path / "gcroots"))
    profile = tmp_path / "system"
    for known, target in links.items():
        os.symlink(target, f"{profile}-{known}-link")
    profile.symlink_to("system-2-link")
    byhand.set_profile(str(profile), OLD, number)
    assert os.readlink(profile) == f"system-{expected}-link"
    assert nix.target(str(profile)) == OLD and nix.generation(str(profile)) == expected


@pytest.mark.parametrize("works", [[], byhand.NO_CONFIGURATION, byhand.NO_DIRECTORIES, None])
def test_nix_runs_without_its_configuration_only_if_it_refuses_that(monkeypatch, works):
    def ask(argv, timeout):
        return int(argv[: -len(question)] != works), "", ""

    question = ["nix-store", "--check-validity", OLD]
    monkeypatch.setattr(byhand, "ask", ask)
    run = Recorder()
    byhand.run_with_a_working_nix(OLD, run)(["program"])
    assert run.calls == [[*(works or []), "program"]]


def test_home_manager_profile_is_where_its_activation_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(nix, "PROFILES", str(tmp_path / "profiles"))
    own, shared = tmp_path / "state/nix/profiles", tmp_path / "profiles/per-user/root"
    monkeypatch.setattr(home_manager, "user", lambda: "root")
    assert home_manager.profile_path(None) == f"{own}/home-manager"
    shared.mkdir(parents=True)
    assert home_manager.profile_path("other") == f"{shared}/home-manager"
    own.mkdir(parents=True)
    assert home_manager.profile_path(None) == f"{own}/home-manager"


def test_profiles_by_name():
    assert (
        nixos.profile_path(None) == nixos.profile_path("system") == "/nix/var/nix/profiles/system"
    )
    assert nixos.profile_path("spare") == "/nix/var/nix/profiles/system-profiles/spare"
    assert plain.profile_path(None) == "/nix/var/nix/profiles/system"
    assert plain.profile_path("tools") == "/nix/var/nix/profiles/tools"


@pytest.mark.promise(13)
@pytest.mark.parametrize(
    ("path", "good"),
    [
        (NEW, True),
        ("/nix/store/aaa", False),
        ("--option", False),
        (NEW + "/bin/sh", False),
        ("/etc/passwd", False),
        ("/nix/store/" + "e" * 32 + "-x", False),  # Nix's base 32 has no `e`
        ("/nix/store/" + "a" * 32 + "-", False),
        ("/nix/store/" + "a" * 32 + "-.hidden", False),
        ("/nix/store/" + "a" * 32 + "-a\n", False),
        ("/nix/store/" + "a" * 32 + "-" + "n" * 300, False),
        (None, False),
        (7, False),
    ],
)
def test_store_path_grammar(path, good):
    assert is_store_path(path) is good
