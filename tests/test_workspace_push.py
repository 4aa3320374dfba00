"""Questions of CI before it pushes: the cache, and the paths that it lacks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from caches import Files, Key
from workspace_support import Peer, running

CACHE, MISSING = "/api/v1/deploy/cache", "/api/v1/deploy/cache/missing"
NOWHERE = "a" * 32


@pytest.fixture
def peer() -> Iterator[Peer]:
    with running() as server:
        yield Peer(server)


def create(peer: Peer, name: str, *options: str) -> Key:
    return Key.parse(peer.server.command("cache", "create", name, *options))


def test_which_cache(peer: Peer) -> None:
    answer = peer.http("GET", CACHE)
    assert answer.status_code == 404 and answer.json()["error"].startswith("there is no cache: ")
    key = create(peer, "main")
    create(peer, "other", "--private")
    for query in ("", "?name=main", "?name="):
        assert peer.http("GET", CACHE + query).json() == {
            "cacheName": "main",
            "publicKey": key.bare,
            "isPublic": True,
            "uri": f"{peer.server.url}/cache/main",
        }
    other = peer.http("GET", f"{CACHE}?name=other").json()
    assert (other["cacheName"], other["isPublic"]) == ("other", False)
    assert peer.http("GET", f"{CACHE}?name=none").status_code == 404
    bound = peer.server.command("token", "create", "activate", "--cache=other").strip()
    assert peer.http("GET", CACHE, bound).json() == other
    refused = peer.http("GET", f"{CACHE}?name=main", bound)
    assert (refused.status_code, refused.json()["error"]) == (
        403,
        "this token is for another cache",
    )
    for method, path in (("GET", CACHE), ("POST", MISSING)):
        assert peer.http(method, path, peer.agent_token).status_code == 403
        assert peer.http(method, path, "unknown").status_code == 401


def test_what_is_missing(peer: Peer, tmp_path: Path) -> None:
    files = Files(tmp_path / "files", create(peer, "main"))
    create(peer, "other")
    paths = [files.add(name, name) for name in ("whole", "no-archive", "unsigned", "no-narinfo")]
    files.push(f"{peer.server.url}/cache/main", peer.ci_token, *paths)
    place = peer.server.data / "cache/main"
    (place / "nar" / files.archive(paths[1]).name).unlink()
    info = place / files.narinfo(paths[2]).name
    info.write_text(info.read_text().replace("Sig: ", "Sig: other-"))
    (place / files.narinfo(paths[3]).name).unlink()
    hashes = [path[11:43] for path in paths]
    answer = peer.http("POST", MISSING, json=[*hashes, NOWHERE])
    assert answer.json() == {"missing": [*hashes[1:], NOWHERE]}
    answer = peer.http("POST", f"{MISSING}?name=other", json=hashes)
    assert answer.json() == {"missing": hashes}
    assert peer.http("POST", MISSING, json=[]).json() == {"missing": []}
    many = [f"{number:032}" for number in range(5000)]
    assert peer.http("POST", MISSING, json=many).json() == {"missing": many}


@pytest.mark.parametrize("body", [{}, None, "x", 7, [7], ["x"], [[]], ["../" + "a" * 29]])
def test_lists_that_are_none(peer: Peer, body: object) -> None:
    create(peer, "main")
    answer = peer.http("POST", MISSING, json=body)
    assert answer.status_code == 400 and answer.json()["error"]
    assert peer.http("POST", MISSING, data=b"x" * (5 << 20)).status_code == 413
