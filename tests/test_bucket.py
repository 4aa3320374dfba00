"""Caches in a bucket: a real S3 server, real Nix, and what the directory does likewise."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import closures
import pytest
import requests
from hosts import Host
from live import Workspace
from machines import Machine
from workspace_support import command, wait_for

from cachix_protocol import UsageError
from cachix_workspace import bucket, stores
from cachix_workspace.files import TEMPORARY, Store, StoreError
from cachix_workspace.settings import Settings
from cachix_workspace.stores import Directory

pytestmark = pytest.mark.slow

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "somebody",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_EC2_METADATA_DISABLED": "true",
}
SERVER = "from moto.server import main; main(['--host', '127.0.0.1', '--port', '{port}'])"


class S3:
    """A server of S3 with the bucket `caches`."""

    def __init__(self, directory: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.log = directory / "s3.log"
        self.start()

    def start(self) -> None:
        argv = [sys.executable, "-c", SERVER.format(port=self.port)]
        with open(self.log, "ab") as file:
            self.process = subprocess.Popen(argv, stdout=file, stderr=file)
        wait_for(self.listens, 60)
        client = boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1")
        client.create_bucket(Bucket="caches")

    def listens(self) -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"s3://caches/team?endpoint={self.endpoint}&region=us-east-1"

    def names(self) -> list[str]:
        """The names of all files in the bucket."""
        client = boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1")
        return [file["Key"] for file in client.list_objects_v2(Bucket="caches").get("Contents", ())]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(10)


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """A server of S3; this process may use it."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    server = S3(tmp_path)
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(server.stop)
        yield server


@pytest.fixture(params=["directory", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """The files of a cache, in each of both kinds of places."""
    if request.param == "directory":
        return stores.store_of(Settings(tmp_path / "data"), "main")
    server: S3 = request.getfixturevalue("s3")
    return stores.store_of(Settings(tmp_path / "data", cache_store=server.url), "main")


def upload(store: Store, text: str) -> Path:
    place = store.place("nar/x.nar")
    stores.make_directory(place)
    path = place / f"{TEMPORARY}{text}"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["nar/x.nar", f"{'b' * 32}.narinfo", "log/x.drv"])
def test_both_kinds_do_the_same(store: Store, name: str) -> None:
    assert store.read(name) is None and store.entry(name) is None
    assert list(store.entries()) == list(store.all_entries()) == []
    assert store.create(upload(store, "first"), name)
    assert not store.create(upload(store, "second"), name)
    content, entry = store.read(name), store.entry(name)
    assert content is not None and content.body == b"first"
    assert entry is not None and (entry.name, entry.size) == (name, 5)
    folder = name[: name.rfind("/") + 1]
    assert [each.name for each in store.entries(folder)] == [name]
    assert [each.name for each in store.entries()] == ([] if folder else [name])
    assert [each.name for each in store.all_entries()] == [name]
    store.touch(name)
    later = store.entry(name)
    assert later is not None and later.modified >= entry.modified and later.size == 5
    store.replace(upload(store, "another"), name)
    content = store.read(name)
    assert content is not None and content.body == b"another"
    store.remove(name)
    store.remove(name)
    assert store.read(name) is None and store.entry(name) is None


def test_a_link_is_read_by_anybody_for_a_while(s3: S3, tmp_path: Path) -> None:
    store = stores.store_of(Settings(tmp_path, cache_store=s3.url), "main")
    store.create(upload(store, "contents"), "nar/x.nar")
    link = store.source("nar/x.nar")
    assert isinstance(link, str) and "Expires=3600" in link
    assert requests.get(link, timeout=10).text == "contents"


def test_a_bucket_that_does_not_answer_is_no_missing_file(s3: S3, tmp_path: Path) -> None:
    store = stores.store_of(Settings(tmp_path, cache_store=s3.url), "main")
    s3.stop()
    for ask in (store.read, store.entry, store.remove, store.touch):
        with pytest.raises(StoreError, match="the bucket caches can't be used: "):
            ask("nar/x.nar")
    with pytest.raises(StoreError):
        list(store.entries())


@pytest.mark.parametrize(
    "url",
    ["s3://", "s3://A_B", "https://x", "s3://caches?region", "s3://caches?color=red"]
    + ["s3://caches/a b", "s3://caches?region=a&region=b", "s3://[x"],
)
def test_wrong_urls(url: str) -> None:
    with pytest.raises(UsageError, match="--cache-store"):
        bucket.checked_url(url)


def test_a_wrong_option(tmp_path: Path) -> None:
    options = ("--listen=127.0.0.1:0", f"--data={tmp_path}/d", "--cache-store=s3://x/y?a=b")
    message = command("serve", *options, status=64).stderr
    assert message.startswith("error: --cache-store must be s3://BUCKET")


def test_a_bucket_that_is_not_there(s3: S3, tmp_path: Path) -> None:
    url = s3.url.replace("caches", "others")
    arguments = (f"--data={tmp_path}/d", "--listen=127.0.0.1:0", f"--cache-store={url}")
    message = command("serve", *arguments, status=1).stderr
    assert re.fullmatch("error: the bucket others can't be used: .*NoSuchBucket.*\n", message)


def test_files_of_others_stay_in_a_shared_directory(tmp_path: Path) -> None:
    shared = Settings(tmp_path, cache_store=str(tmp_path / "shared"), has_shared_directory=True)
    store = stores.store_of(shared, "main")
    assert isinstance(store, Directory)
    theirs = upload(store, "theirs")
    old = theirs.parent / f"{TEMPORARY}old"
    old.touch()
    os.utime(old, (1, 1))
    stores.remove_leftovers(shared)
    assert theirs.exists() and not old.exists()
    stores.remove_leftovers(Settings(tmp_path, cache_store=shared.cache_store))
    assert not theirs.exists()


@pytest.fixture
def workspace(s3: S3, tmp_path: Path) -> Iterator[Workspace]:
    """A workspace whose caches are in the bucket."""
    workspace = Workspace(tmp_path / "workspace")
    workspace.environment.update(CREDENTIALS)
    workspace.serve(f"--cache-store={s3.url}", "--keep-free=0")
    try:
        yield workspace
    finally:
        workspace.kill()


@pytest.mark.long
def test_an_agent_deploys_from_a_bucket(
    host: Host, workspace: Workspace, s3: S3, name: str
) -> None:
    """The NARs come from the bucket itself. Later commands and servers find it by themselves."""
    files = workspace.cache(private=True)
    machine = Machine(host, workspace, name)
    path = closures.nixos(machine.files, 1)
    assert workspace.wait(machine.order(path)) == "Succeeded"
    assert any(one.startswith("team/main/nar/") for one in s3.names())
    assert not (workspace.data / "cache").exists()
    assert list((workspace.data / "uploads").iterdir()) == []
    log = s3.log.read_text()
    assert "GET /caches/team/main/nar/" in log and "X-Amz-Signature" in log
    workspace.stop()
    workspace.serve("--keep-free=0")
    shown = json.loads(workspace.cli("cache", "show", "main", "--json"))
    assert path in [one["store_path"] for one in shown["recent"]]
    assert shown["unsigned"] == []
    other = files.add("other", b"other\n")
    workspace.push(other)
    assert "0 files" in workspace_backup(workspace)
    assert other not in workspace.cli("cache", "gc", "main")  # a late push


def workspace_backup(workspace: Workspace) -> str:
    """What the command `backup` says."""
    target = workspace.directory / "backup"
    argv = [sys.executable, "-m", "cachix_workspace", "backup", str(target)]
    result = subprocess.run(
        [*argv, f"--data={workspace.data}"],
        env={**workspace.environment, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "the caches are in s3://caches/team" in result.stderr
    return result.stderr


@pytest.mark.long
def test_a_bucket_that_is_away_for_a_while(workspace: Workspace, s3: S3) -> None:
    files = workspace.cache()
    path = files.add("first", b"1\n")
    workspace.push(path)
    url = f"{workspace.cache_url}/{path[11:43]}.narinfo"
    assert requests.get(url, timeout=30).ok
    s3.stop()
    missing = f"{workspace.cache_url}/{'z' * 32}.narinfo"
    answer = requests.get(missing, timeout=60)
    assert answer.status_code == 503 and "the bucket caches can't be used" in answer.json()["error"]
    assert answer.headers["Retry-After"] == "5"
    s3.start()
    assert requests.get(missing, timeout=30).status_code == 404
    assert (
        b"Traceback"
        not in (
            workspace.directory
            / next(file.name for file in workspace.directory.glob("workspace-*.out"))
        ).read_bytes()
    )
