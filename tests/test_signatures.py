"""Whose signature a path needs before it may run, with real Nix and real signatures."""

import os
import sqlite3

import closures
import pytest
from caches import Key
from hosts import wait_until

from activate import nix
from activate.agent import database, signatures

pytestmark = pytest.mark.promise(13)
TOKEN = "agent-token"
FAST = {"CACHIX_DEPLOY_WAITS": '{"backoff": 0.05}'}


def start(host, peer, *args):
    return host.agent("web", peer.url, TOKEN, *args, env=FAST)


def deploy(peer, path, script=None):
    """Deploy; whether it succeeded, and the last line of the log."""
    deployment = peer.deploy(path, script)
    result = peer.finished(deployment, 30)
    wait_until(lambda: peer.log(deployment), 20, "the log")
    return result, peer.log(deployment)[-1]


def add(host, name, text="x"):
    """Add a file to the host's store by its contents, as anybody may; its path."""
    file = host.directory / name
    file.write_text(text)
    return host.output("nix-store", "--add", str(file)).strip()


def import_unsigned(host, cache, path):
    """Take a path from a cache without any signature, as a path that was built here has none."""
    options = ["--option", "require-sigs", "false", "--option", "substituters", cache.url]
    cache.damage(path, "unsigned")
    host.output("nix-store", "--realise", path, *options)


def sign_again(cache, path):
    cache.write(path, cache.archive(path).read_bytes(), cache.references(path))


@pytest.mark.parametrize("named", [True, False])
def test_a_content_addressed_path_is_refused(host, cache, peer, named):
    """Nix needs no signature for it, so that a token of CI would be enough to run anything."""
    peer.cache = cache.wire() if named else None
    start(host, peer)
    succeeded, line = deploy(peer, path := add(host, "evil"))
    assert not succeeded and f"{path} is content-addressed" in line
    assert host.profile() is None


def test_a_content_addressed_path_from_the_cache_is_refused(make_host, cache, peer):
    ci, host = make_host("ci"), make_host("host")
    path = add(ci, "evil")
    ci.output("nix", "copy", "--to", f"file://{cache.directory}", path, *nix.EXPERIMENTAL)
    peer.cache = cache.wire()
    start(host, peer)
    succeeded, line = deploy(peer, path)
    assert not succeeded and f"{path} is content-addressed" in line and host.profile() is None


def test_so_is_a_rollback_script(host, cache, peer):
    peer.cache = cache.wire()
    start(host, peer)
    path = closures.plain(cache, 1)
    succeeded, line = deploy(peer, path, script := add(host, "evil"))
    assert not succeeded and f"{script} is content-addressed" in line and host.profile() is None


def test_a_path_that_was_built_here_gets_its_signature_from_the_cache(host, cache, peer):
    """As in the walk-through of the README, where one machine builds, pushes and deploys."""
    path = closures.plain(cache, 1)
    import_unsigned(host, cache, path)
    peer.cache = cache.wire()
    start(host, peer)
    succeeded, line = deploy(peer, path)
    assert not succeeded and f"the signature of {path} is by none of the keys" in line
    sign_again(cache, path)
    succeeded, line = deploy(peer, path)
    assert succeeded, line


@pytest.mark.parametrize("name", ["attic-1", "cache.nixos.org-1"])
def test_a_key_of_the_machine_counts_but_for_that_of_the_public_cache(make_host, peer, cache, name):
    """The public cache has signed whatever is in nixpkgs, old releases with holes among it."""
    host = make_host()
    cache.key = Key(name)
    path = closures.plain(cache, 1)
    with open(host.directory / "etc/nix.conf", "a") as conf:
        conf.write(f"trusted-public-keys = {cache.key.public}\n")
    host.fetch(cache.url, cache.key.public, path)
    peer.cache = {**cache.wire(), "publicKey": Key("workspace-1").public}
    start(host, peer)
    succeeded, line = deploy(peer, path)
    assert succeeded == (name == "attic-1"), line


@pytest.mark.parametrize("signed", [True, False])
def test_where_the_workspace_names_no_cache_a_key_of_the_machine_counts(host, cache, peer, signed):
    """As with a cache of attic or S3, whose key is in nix.conf."""
    path = closures.plain(cache, 1)
    with open(host.directory / "etc/nix.conf", "a") as conf:
        conf.write(f"trusted-public-keys = {cache.key.public}\nsubstituters = {cache.url}\n")
    if not signed:
        import_unsigned(host, cache, path)
    peer.cache = None
    start(host, peer)
    assert deploy(peer, path)[0] == signed


def test_no_key_at_all_does_not_mean_whatever_is_in_nixpkgs(host, cache, peer):
    """A stolen workspace could name no cache, and order an old package with a known hole."""
    cache.key = Key("cache.nixos.org-1")
    path, built = closures.plain(cache, 1), closures.plain(cache, 2)
    with open(host.directory / "etc/nix.conf", "a") as conf:
        conf.write(f"trusted-public-keys = {cache.key.public}\nsubstituters = {cache.url}\n")
    import_unsigned(host, cache, built)
    peer.cache = None
    start(host, peer)
    for _ in range(2):  # the first one has downloaded it
        succeeded, line = deploy(peer, path)
        assert not succeeded and "only cache.nixos.org has signed it" in line
    assert deploy(peer, built)[0]


def test_a_pinned_key_counts_for_what_is_there_already(host, cache, peer):
    path, pinned = closures.plain(cache, 1), Key("pinned-1", b"p" * 32)
    host.fetch(cache.url, cache.key.public, path)
    peer.cache = cache.wire()
    start(host, peer, f"--trusted-key={pinned.public}")
    succeeded, line = deploy(peer, path)
    assert not succeeded and pinned.public in line
    cache.key = pinned
    sign_again(cache, path)
    assert deploy(peer, path)[0]


def test_what_runs_already_needs_no_signature(host, cache, peer):
    path = closures.plain(cache, 1)
    import_unsigned(host, cache, path)
    host.output("nix-env", "--profile", "/nix/var/nix/profiles/system", "--set", path)
    peer.cache = cache.wire()
    start(host, peer)
    succeeded, line = deploy(peer, path)
    assert succeeded, line


def test_the_database_and_nix_tell_the_same(host, cache, monkeypatch):
    path = closures.plain(cache, 1)
    host.fetch(cache.url, cache.key.public, path)
    added = add(host, "some")
    monkeypatch.setattr(database, "DIRECTORY", str(host.path("/nix/var/nix/db")))
    facts = database.content_addresses([path, added])
    assert list(facts) == [added] and facts[added].startswith("fixed:")
    assert database.content_addresses([path, "/nix/store/" + "0" * 32 + "-none"]) is None
    text = host.output("nix", "path-info", "--json", path, added, *nix.EXPERIMENTAL)
    monkeypatch.setattr(signatures, "output", lambda *_: text)
    assert signatures.content_addresses([path, added], 1) == facts


def test_nix_is_asked_once_about_the_same_contents_and_keys(host, cache, monkeypatch):
    paths = [closures.plain(cache, number) for number in (1, 2)]
    host.fetch(cache.url, cache.key.public, *paths)
    monkeypatch.setattr(database, "DIRECTORY", str(host.path("/nix/var/nix/db")))
    asked, answers = [], [False, True]

    def are_signed(paths, keys, _timeout):
        asked.append((*paths, *keys))
        return answers[min(len(asked), len(answers)) - 1]

    monkeypatch.setattr(signatures, "are_signed", are_signed)
    monkeypatch.setattr(signatures, "_seen", set())
    ask = signatures.are_known_signed
    assert [ask(paths, ("k:1",)) for _ in range(4)] == [False, True, True, True]
    assert len(asked) == 2, "a refusal is not remembered, a signature is"
    assert ask(paths[:1], ("k:1",)) and len(asked) == 2
    assert ask(paths, ("l:2",)) and len(asked) == 3
    query = "UPDATE ValidPaths SET hash = 'sha256:1' WHERE path = ?"
    with sqlite3.connect(host.path("/nix/var/nix/db/db.sqlite")) as nix_database:
        nix_database.execute(query, (paths[1],))
    assert ask(paths, ("k:1",)) and len(asked) == 4
    monkeypatch.setattr(database, "DIRECTORY", "/nowhere")
    assert ask(paths, ("k:1",)) and ask(paths, ("k:1",)) and len(asked) == 6


OTHERS = [place for place in os.environ.get("CACHIX_DEPLOY_NIX", "").split(":") if place]
NO_OTHERS = "set CACHIX_DEPLOY_NIX=DIR:DIR, each with bin/nix of a release, to try more releases"


@pytest.mark.parametrize(
    "place",
    ["", *OTHERS] if OTHERS else ["", pytest.param("-", marks=pytest.mark.skip(NO_OTHERS))],
)
def test_each_release_of_nix_accepts_and_refuses_what_it_must(host, cache, peer, place):
    """Nix 2.3 has other names for the commands, and current ones print other JSON."""
    if place:
        host.environment["PATH"] = f"{place}/bin:{host.environment['PATH']}"
    signed, unsigned = closures.plain(cache, 1), closures.plain(cache, 2)
    import_unsigned(host, cache, unsigned)
    peer.cache = cache.wire()
    start(host, peer)
    succeeded, line = deploy(peer, signed)
    assert succeeded, line
    succeeded, line = deploy(peer, unsigned)
    assert not succeeded and f"the signature of {unsigned} is by none of the keys" in line
    sign_again(cache, unsigned)
    succeeded, line = deploy(peer, unsigned)
    assert succeeded, line
    succeeded, line = deploy(peer, path := add(host, "evil"))
    assert not succeeded and f"{path} is content-addressed" in line


@pytest.mark.parametrize(
    "text",
    [
        '[{"path": "/nix/store/a", "ca": "fixed:x"}, {"path": "/nix/store/b"}]',
        '{"/nix/store/a": {"ca": "fixed:x"}, "/nix/store/b": {"ca": null}}',
        '{"/nix/store/a": {"ca": "fixed:x"}, "/nix/store/b": null}',
    ],
)
def test_the_forms_in_which_releases_of_nix_print_paths(monkeypatch, text):
    monkeypatch.setattr(signatures, "output", lambda *_: text)
    assert signatures.content_addresses(["/nix/store/a"], 1) == {"/nix/store/a": "fixed:x"}


@pytest.mark.parametrize(
    ("answers", "expected", "commands"),
    [
        ([(0, "", "")], True, ["nix store verify"]),
        ([(1, "", "path is untrusted")], False, ["nix store verify"]),
        ([(1, "", "error: 'store' is not a recognised command"), (0, "", "")], True,
         ["nix store verify", "nix verify"]),
        ([(1, "", "error: 'store' is not a recognised command"), (2, "", "")], False,
         ["nix store verify", "nix verify"]),
    ],
)  # fmt: skip
def test_the_names_of_the_command_in_releases_of_nix(monkeypatch, answers, expected, commands):
    asked = []

    def ask(argv, _timeout):
        asked.append(argv)
        return answers[len(asked) - 1]

    monkeypatch.setattr(signatures, "ask", ask)
    assert signatures.are_signed(["/nix/store/a"], ("k:1", "l:2"), 1) == expected
    assert [" ".join(argv[: argv.index("verify") + 1]) for argv in asked] == commands
    assert "k:1 l:2" in asked[0]
