"""The parts of a push: archives, what Nix says, the order of uploads, and the summary."""

import hashlib
import os
import sys
import threading
import time

import pytest
from caches import SELF, Executable, Link, base32, nar
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import drip, listen

import cachix_ed25519
import cachix_nar
from cachix_connection import Answer
from cachix_line import repeated
from cachix_narinfo import Archived, CacheKey, PathInfo, narinfo, parse_dump
from cachix_protocol import Error, Unreachable, UsageError
from cachix_push import counted, summary
from cachix_upload import Done, Order, new_compressor
from cachix_upstream import Upstream
from cachix_workspace.narinfo import Narinfo

NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1)
SHORT = NAMES.filter(lambda name: name not in (".", "..") and len(name.encode()) < 200)
FILES = st.one_of(st.binary(max_size=40), st.binary(max_size=40).map(Executable))
LINKS = NAMES.filter(lambda name: len(name.encode()) < 200).map(Link)
TREES = st.recursive(
    st.one_of(FILES, LINKS), lambda part: st.dictionaries(SHORT, part, max_size=4), max_leaves=9
)


def plant(path, tree):
    """Make a tree in the file system."""
    if isinstance(tree, dict):
        os.mkdir(path)
        for name, part in tree.items():
            plant(os.path.join(path, name), part)
    elif isinstance(tree, Link):
        os.symlink(tree.target, path)
    else:
        content = tree.content if isinstance(tree, Executable) else tree
        with open(path, "wb") as file:
            file.write(content)
        os.chmod(path, 0o555 if isinstance(tree, Executable) else 0o444)


def archive(path):
    blocks = []
    cachix_nar.write(str(path), blocks.append)
    return b"".join(blocks)


@settings(deadline=None, max_examples=60)
@given(TREES)
def test_archives(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("tree") / "top"
    plant(path, tree)
    assert archive(path) == nar(tree)


def test_a_large_file_comes_in_blocks(tmp_path):
    (tmp_path / "file").write_bytes(os.urandom(3 * cachix_nar.BLOCK + 5))
    sizes = []
    cachix_nar.write(str(tmp_path), lambda block: sizes.append(len(block)))
    assert len(sizes) >= 3 and max(sizes) < 2 * cachix_nar.BLOCK


def test_what_has_no_place_in_an_archive(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(Error, match="fifo is neither a file, nor a link or directory"):
        archive(tmp_path)


def test_names_of_macos(tmp_path, monkeypatch):
    for name in ("a", "A~nix~case~hack~1"):
        (tmp_path / name).write_bytes(b"")
    assert archive(tmp_path) == nar({"a": "", "A~nix~case~hack~1": ""})
    monkeypatch.setattr("sys.platform", "darwin")
    assert archive(tmp_path) == nar({"a": "", "A": ""})


# --- what Nix says --------------------------------------------------------------------------------

PATH, OTHER = (f"/nix/store/{letter * 32}-name" for letter in "ab")
DIGEST = "ab" * 32


def test_a_dump_of_the_database():
    text = (
        f"{PATH}\n{DIGEST}\n120\n\n0\n{OTHER}\nsha256:{DIGEST}\n7\n{PATH}.drv\n2\n{OTHER}\n{PATH}\n"
    )
    first, second = parse_dump(text)
    assert first == PathInfo(PATH, bytes.fromhex(DIGEST), 120, ())
    assert second.references == (PATH[11:], OTHER[11:]) and second.deriver == f"{PATH[11:]}.drv"
    assert list(parse_dump("")) == []


@pytest.mark.parametrize(
    "text",
    [
        f"{PATH}\n{DIGEST}\nx\n\n0\n",
        f"{PATH}\n{DIGEST}\n1\n\n\n",
        f"{PATH}\nab\n1\n\n0\n",
        f"/etc/passwd\n{DIGEST}\n1\n\n0\n",
    ],
)
def test_dumps_that_are_none(text):
    with pytest.raises(Error, match="printed no description of a path"):
        list(parse_dump(text))


@pytest.mark.parametrize("text", ["", "name:", "x:AAAA", "b\u00e4d", "A" * 86])
def test_keys_that_are_none(text):
    with pytest.raises(UsageError) as refusal:
        CacheKey.parse(text, "PLACE")
    assert "PLACE holds no secret key" in str(refusal.value)
    assert not text or text not in str(refusal.value)


# --- the order ------------------------------------------------------------------------------------


def info(letter, *references):
    names = tuple(f"{one * 32}-name" for one in references)
    return PathInfo(f"/nix/store/{letter * 32}-name", bytes(32), 1, names)


def work_through(order):
    """Do what is due, the archives first where there is a choice; the order of descriptions."""
    described = []
    while (task := order.take()) is not None:
        if isinstance(task, PathInfo):
            order.note_archive(task, b"")
        else:
            order.note_description(task[0])
            described.append(task[0].path[11])
    return described


def test_references_come_first():
    infos = [info("a"), info("b", "a", "b"), info("c", "z"), info("d", "b", "c")]
    described = work_through(Order(infos))
    assert sorted(described) == ["a", "b", "c", "d"]
    assert described.index("a") < described.index("b") < described.index("d")
    assert work_through(Order([])) == []


def test_a_reference_that_is_late():
    order = Order([info("a"), info("b", "a")])
    first, second = order.take(), order.take()
    order.note_archive(second, b"")
    assert not order.ready
    waiting = threading.Thread(target=order.take)
    waiting.start()
    order.note_archive(first, b"")
    waiting.join(5)
    assert not waiting.is_alive() and not order.ready


def test_a_failure_ends_all():
    order = Order([info("a"), info("b", "a")])
    order.take()
    order.take()
    waiting = threading.Thread(target=order.take)
    waiting.start()
    order.fail(Error("first"))
    order.fail(Error("second"))
    waiting.join(5)
    assert not waiting.is_alive() and order.take() is None and str(order.problem) == "first"


def test_a_python_without_lzma(monkeypatch):
    monkeypatch.setitem(sys.modules, "lzma", None)
    with pytest.raises(Error, match="this Python has no module lzma"):
        new_compressor()


# --- attempts -------------------------------------------------------------------------------------


class Stop:
    """An event that notes how long it was waited for."""

    def __init__(self):
        self.pauses = []

    def is_set(self):
        return False

    def wait(self, seconds):
        self.pauses.append(seconds)


@pytest.mark.parametrize(
    ("statuses", "headers", "result", "pauses"),
    [
        ([201], {}, 201, []),
        ([400, 201], {}, 400, []),
        ([503, 201], {}, 201, [1]),
        ([503, 429, 201], {}, 201, [1, 2]),
        ([503, 503, 503, 201], {}, 503, [1, 2]),
        ([507, 201], {"Retry-After": "5"}, 201, [5]),
        ([429, 201], {"Retry-After": "999999"}, 201, [120]),
        ([None, 201], {}, 201, [1]),
        ([None, None, None], {}, None, [1, 2]),
    ],
)
def test_attempts(statuses, headers, result, pauses):
    stop, left = Stop(), list(statuses)

    def call():
        status = left.pop(0)
        if status is None:
            raise Unreachable("no answer")
        return Answer(status, headers, b"")

    if result is None:
        with pytest.raises(Unreachable):
            repeated(call, stop)
    else:
        assert repeated(call, stop).status == result
    assert stop.pauses == pauses


@pytest.mark.parametrize("serve", [drip(b"HTTP/1.1 200 OK\r\n" * 99), lambda _: time.sleep(9)])
def test_an_upstream_that_is_slow_is_given_up(monkeypatch, serve):
    monkeypatch.setattr("cachix_upstream.PATIENCE", 0.3)
    listener, url = listen(serve)
    with listener:
        upstream = Upstream(url)
        assert upstream.ask([PATH, OTHER]) == set()
    assert upstream.problem == f"{url} has not answered for 0 s"


# --- the summary ----------------------------------------------------------------------------------


NOTHING = "pushed 0 paths (0 bytes)"


@pytest.mark.parametrize(
    ("done", "seconds", "there", "elsewhere", "line"),
    [
        ((43, 43, 210 << 20), 12.3, 0, 1912,
         "pushed 43 paths (210.0 MiB) in 12 s, 1,912 are in cache.nixos.org"),
        ((1, 1, 99), 0.04, 0, 0, "pushed 1 path (99 bytes) in 0.0 s"),
        ((0, 0, 0), 1.0, 1, 1,
         f"{NOTHING} in 1.0 s, 1 is in the cache already, 1 is in cache.nixos.org"),
    ],
)  # fmt: skip
def test_summaries(done, seconds, there, elsewhere, line):
    upstream = Upstream("https://cache.nixos.org")
    upstream.present = {str(number) for number in range(elsewhere)}
    assert summary(Done(*done), seconds, there, [upstream]) == line
    assert counted(2) == "2 paths"


def test_a_description_is_as_the_workspace_takes_it():
    key = CacheKey("main-1", b"x" * 32)
    one = PathInfo(PATH, hashlib.sha256(b"").digest(), 120, (PATH[11:], OTHER[11:]), "x.drv")
    digest = hashlib.sha256(b"file").digest()
    archived = Archived(f"nar/{base32(digest)}.nar.xz", "xz", 60, digest)
    parsed = Narinfo.parse(f"{one.hash}.narinfo", narinfo(one, archived, key))
    assert parsed.is_signed_by({"main-1": cachix_ed25519.public_key(b"x" * 32)})
    assert (parsed.size, parsed.file_size, parsed.url) == (120, 60, archived.url)
    assert SELF not in parsed.text()
