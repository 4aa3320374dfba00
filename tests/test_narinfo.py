"""Narinfos that a cache accepts and refuses."""

import pytest
from caches import Key

from cachix_protocol import base32
from cachix_workspace.narinfo import Narinfo
from cachix_workspace.refusal import Refusal

DIGEST = "a" * 32
NAME = f"{DIGEST}.narinfo"
PATH = f"/nix/store/{DIGEST}-system"
NAR_HASH = "sha256:" + "1" * 52
OTHER = f"{'b' * 32}-other"
KEY = Key("main.example.org-1")
KEYS = {KEY.name: KEY._private.public_key().public_bytes_raw()}


def content(*more, key=KEY, **changes):
    fields = {
        "StorePath": PATH,
        "URL": f"nar/{'1' * 52}.nar.xz",
        "Compression": "xz",
        "FileHash": NAR_HASH,
        "FileSize": "10",
        "NarHash": NAR_HASH,
        "NarSize": "120",
        "References": f"{OTHER} {DIGEST}-system",
        "Sig": key.sign(PATH, NAR_HASH, 120, [OTHER, f"{DIGEST}-system"]),
        **changes,
    }
    lines = [f"{name}: {value}" for name, value in fields.items() if value is not None]
    return "".join(f"{line}\n" for line in [*lines, *more]).encode()


def test_a_narinfo_as_nix_writes_it():
    info = Narinfo.parse(NAME, content("Deriver: x.drv", "System: x86_64-linux"))
    assert (info.store_path, info.size, info.file_size, info.compression) == (PATH, 120, 10, "xz")
    assert info.references == (OTHER, f"{DIGEST}-system") and info.is_signed_by(KEYS)
    assert (
        info.text().encode()
        == content("Deriver: x.drv", "System: x86_64-linux").replace(
            sig := f"Sig: {info.signatures[0]}\n".encode(), b""
        )
        + sig
    )


def test_a_path_without_references():
    sig = KEY.sign(PATH, NAR_HASH, 120, [])
    assert Narinfo.parse(NAME, content(References="", Sig=sig)).is_signed_by(KEYS)
    assert Narinfo.parse(NAME, content(References=None, Sig=sig)).is_signed_by(KEYS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("StorePath", None),
        ("StorePath", PATH.replace("system", "a b")),
        ("StorePath", PATH + "/bin"),
        ("StorePath", "/nix/store/" + DIGEST),
        ("StorePath", PATH.replace("a" * 32, "b" * 32)),
        ("URL", None),
        ("URL", "nar/../x"),
        ("URL", f"http://evil/{'1' * 52}.nar"),
        ("URL", f"nar/{'1' * 51}.nar"),
        ("NarHash", None),
        ("NarHash", "md5:" + "1" * 26),
        ("NarHash", "sha256:" + "e" * 52),
        ("NarSize", None),
        ("NarSize", "0"),
        ("NarSize", "-1"),
        ("NarSize", "1e3"),
        ("NarSize", "9" * 30),
        ("FileSize", "x"),
        ("Compression", "xz; rm"),
        ("References", "../../etc"),
        ("References", f"{OTHER},{OTHER}"),
    ],
)
def test_a_field_that_is_missing_or_wrong(field, value):
    with pytest.raises(Refusal, match=f"`{field}`") as refusal:
        Narinfo.parse(NAME, content(**{field: value}))
    assert refusal.value.code == 400


@pytest.mark.parametrize(
    "data",
    [
        *[b"", b"\xff", b"\n", b"x", content()[:-1], content() + b"\n"],
        *[content(f"URL: nar/{'2' * 52}.nar"), content("NarSize: 5"), content("StorePath: x")],
        *[content("URL:http://evil/x"), content("no field"), content(": x"), content(" URL: x")],
        *[content("Note: a\x0cURL: x"), content("Note: a\rURL: x"), content("Note: \x1b]0;x\x07")],
        *[content("Note: a\u2028URL: x"), content("Note: a\x85URL: x"), content("Note: \0")],
    ],
)
def test_a_text_that_readers_may_split_in_another_way(data):
    with pytest.raises(Refusal) as refusal:
        Narinfo.parse(NAME, data)
    assert refusal.value.code == 400 and str(refusal.value).startswith(NAME)


@pytest.mark.parametrize(
    "changes",
    [
        {"Sig": None},
        {"Sig": ""},
        {"Sig": "main.example.org-1"},
        {"Sig": "main.example.org-1:"},
        {"Sig": "main.example.org-1:x"},
        {"key": Key("other-1")},
        {"key": Key(KEY.name, b"x" * 32)},
        {"NarSize": "121"},
        {"NarHash": "sha256:" + "2" * 52},
        {"References": OTHER},
    ],
)
def test_a_signature_that_does_not_count(changes):
    assert not Narinfo.parse(NAME, content(**changes)).is_signed_by(KEYS)


def test_any_of_several_signatures_counts():
    foreign = Key("other-1").sign(PATH, NAR_HASH, 120, [OTHER, f"{DIGEST}-system"])
    info = Narinfo.parse(NAME, content(f"Sig: {foreign}"))
    assert len(info.signatures) == 2 and info.is_signed_by(KEYS)
    alone = Narinfo.parse(NAME, content(Sig=foreign))
    assert not alone.is_signed_by(KEYS) and alone.describes_the_same(info)
    assert set(alone.signed_also(info).signatures) == set(info.signatures)


def test_base32_as_nix_writes_it():
    assert base32(bytes(32)) == "0" * 52
    empty = bytes.fromhex("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
    assert base32(empty) == "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73"
