"""The cache that a workspace names: only an address and keys are taken from it."""

import base64

import pytest

from cachix_cache import Offer, offer, trusted_keys
from cachix_connection import Peer
from cachix_options import agent_options, parse
from cachix_protocol import Cache, Error, UsageError, decode_to_agent, dumps

pytestmark = pytest.mark.promise(13)

KEY = base64.b64encode(bytes(range(32))).decode()
OTHER = base64.b64encode(bytes(32)).decode()
OWN = f"own-1:{KEY}"


def wire(**fields):
    record = {"cacheName": "mycache", "publicKey": KEY, "isPublic": True, **fields}
    return Cache.from_json(record)


def host(text):
    return Peer.create(text, "token", "web").host


@pytest.mark.parametrize(
    ("workspace", "fields", "url", "key"),
    [
        ("https://cachix.org", {}, "https://mycache.cachix.org", f"mycache.cachix.org-1:{KEY}"),
        ("http://localhost", {}, "http://mycache.localhost", f"mycache.localhost-1:{KEY}"),
        ("http://localhost:80", {}, "http://mycache.localhost:80", f"mycache.localhost-1:{KEY}"),
        ("https://a.b/deploy", {}, "https://mycache.a.b", f"mycache.a.b-1:{KEY}"),
        ("https://a.b", {"uri": "http://c:1/x"}, "http://c:1/x", f"mycache.a.b-1:{KEY}"),
        ("https://a.b", {"publicKey": OWN}, "https://mycache.a.b", OWN),
        ("http://bücher.example", {"uri": "http://c"}, "http://c",
         f"mycache.xn--bcher-kva.example-1:{KEY}"),
        # to Nix the name of a key ends at its first colon
        ("http://[::1]:8080", {"uri": "http://[::1]/c"}, "http://[::1]/c", f"mycache.--1-1:{KEY}"),
        ("http://[FD00::1]", {"uri": "http://c"}, "http://c", f"mycache.fd00--1-1:{KEY}"),
    ],
)  # fmt: skip
def test_the_url_and_the_key_of_a_cache(workspace, fields, url, key):
    source = offer(host(workspace), wire(**fields))
    assert (source.url, source.keys) == (url, (key,))


def test_several_keys():
    keys = f"{OWN} next-1:{OTHER}"
    assert offer("https://a.b", wire(publicKey=keys)).keys == (OWN, f"next-1:{OTHER}")


@pytest.mark.parametrize(
    "url",
    [
        *["", " ", "daemon", "auto", "local", "/nix/store", "http://", "http:///x", "HTTP://c"],
        *["file:///x", "file:/x", "local?root=/x", "unix:///x", "dummy://", "s3://bucket"],
        *["ssh://-oProxyCommand=x", "ssh-ng://c", "http://-oProxyCommand=x/", "https+x://c"],
        *["http://c?trusted=1", "http://c/?trusted=1", "http://c/x?", "http://c#x", "http://c/#"],
        *["http://c d", "http://c http://d", "http://c\nhttp://d", "http://c\thttp://d"],
        *["http://c\n", "\nhttp://c", "http://c/\0", "http://c/\x1b", "http://c/ü", "http://bü"],
        *["http://u@c", "http://u:p@c", "http://c/x\\y", 'http://c/"', "http://c/<", "http://c/|"],
        *["http://c:", "http://c:x", "http://c:0", "http://c:99999", "http://c:-1", "http://c:1:2"],
        *["http://[::1", "http://::1", "http://[::1]x", "http://[::g]", "http://[]", "http://c;d"],
    ],
)
def test_another_url_than_an_address_is_refused(url):
    with pytest.raises(Error, match=r"names a cache that is not usable.*nothing was changed"):
        offer("https://a.b", wire(uri=url))


@pytest.mark.parametrize(
    "url",
    ["http://c", "https://c.d.e:8443/", "http://10.0.0.1:80/a-b/c_d/~e%20f", "http://[::1]:8080/x"],
)
def test_an_address_is_accepted(url):
    assert offer("https://a.b", wire(uri=url)).url == url


@pytest.mark.parametrize(
    "name", ["", "A", "a.b", "a_b", "a" * 64, "a/x?y=", "u@c", "a b", "a\n", "ü", "a]", "\ud800"]
)
@pytest.mark.parametrize("uri", [None, "http://c"])
def test_another_name_than_a_label_is_refused(name, uri):
    with pytest.raises(Error, match="no label"):
        offer("https://a.b", wire(cacheName=name, uri=uri))


@pytest.mark.parametrize(
    "key",
    [
        *["", " ", "x", ":", f":{KEY}", "own-1:", f"own-1:{KEY[:-4]}", f"own-1:{KEY}{KEY}"],
        *[KEY[:-1], KEY[:-4], KEY + "\n", KEY.replace("=", ""), f"{OWN}\nx-1:{OTHER}"],
        *[f"{OWN} bad", f"{OWN} {KEY}", f"a:b:{KEY}", f"--option:{KEY}", f"a b:{KEY}", "\ud800"],
        *["\0", f"own-1:{KEY}\0", f"ö:{KEY}", f"{OWN}\t{OWN}"],
    ],
)
def test_another_key_than_32_bytes_is_refused(key):
    with pytest.raises(Error, match="`publicKey`"):
        offer("https://a.b", wire(publicKey=key))


@pytest.mark.parametrize(
    "cache",
    [
        *["x", 1, [], {}, {"cacheName": "c"}, True],
        {"cacheName": 1, "publicKey": KEY, "isPublic": True},
        {"cacheName": "c", "publicKey": None, "isPublic": True},
        {"cacheName": "c", "publicKey": KEY, "isPublic": "yes"},
        {"cacheName": "c", "publicKey": KEY, "isPublic": True, "uri": 5},
    ],
)
def test_an_unreadable_cache_refuses_deployments_and_not_the_connection(cache):
    contents = {"id": "11111111-2222-4333-8444-555555555555", "cache": cache}
    command = {"tag": "AgentRegistered", "contents": contents}
    message = decode_to_agent(dumps({"command": command}))
    with pytest.raises(Error, match="can't be read"):
        offer("https://a.b", message.cache)


@pytest.mark.parametrize(
    ("workspace", "url", "near", "elsewhere"),
    [
        ("https://a.b", "https://a.b/cache/main", True, False),
        ("https://a.b", "https://c.a.b", True, False),
        ("https://a.b:8443", "https://A.B", True, False),
        ("http://a.b", "https://a.b", True, False),
        ("http://127.0.0.1:8080", "http://127.0.0.1:9000/x", True, False),
        ("https://a.b", "http://a.b", False, False),
        ("https://a.b", "http://c.a.b", False, False),
        ("https://a.b", "https://b", False, True),
        ("https://a.b", "https://xa.b", False, True),
        ("https://a.b", "https://a.b.evil.org", False, True),
        ("http://127.0.0.1", "http://localhost", False, True),
    ],
)
def test_the_token_goes_to_the_workspace_and_below_only(workspace, url, near, elsewhere):
    expected = Offer(url, (OWN,), False, near, elsewhere)
    assert offer(workspace, wire(publicKey=OWN, isPublic=False, uri=url)) == expected


def options(monkeypatch, *words, variable=None):
    monkeypatch.setenv("CACHIX_AGENT_TOKEN", "token")
    if variable is not None:
        monkeypatch.setenv("CACHIX_AGENT_TRUSTED_KEYS", variable)
    return agent_options(parse(["agent", "web", *words])).trusted_keys


def test_keys_that_the_machine_pins(monkeypatch):
    assert options(monkeypatch) == ()
    two = [f"--trusted-key={OWN}", f"--trusted-key=b-1:{OTHER}"]
    assert options(monkeypatch, *two) == (OWN, f"b-1:{OTHER}")
    variable = f"c-1:{OTHER}\n {OWN} "
    assert options(monkeypatch, two[0], variable=variable) == (OWN, f"c-1:{OTHER}")


@pytest.mark.parametrize("key", ["", "x", KEY, f"a b:{KEY}", f"own-1:{KEY[:-4]}", "own-1:\x1b"])
def test_a_pinned_key_that_is_none(key):
    with pytest.raises(UsageError, match=r"--trusted-key must be a key such as"):
        trusted_keys([key], None)
