"""A bucket of S3, or of a server that speaks its protocol, in place of a directory for caches.

NARs are read from the bucket itself, by links that hold for an hour. Who may do what in the bucket
is found as boto3 does, in the environment and in files:
https://boto3.amazonaws.com/v1/documentation/api/latest/guide/credentials.html
"""

from __future__ import annotations

import contextlib
import errno
import functools
import re
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cachix_protocol import Error, UsageError
from cachix_workspace.files import Content, Entry, StoreError

SCHEME = "s3"
EXAMPLE = "s3://BUCKET?endpoint=https://s3.example.org&region=REGION"
NAME = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
PREFIX = re.compile(r"(/[0-9A-Za-z._-]+)*/?")
OPTIONS = ("endpoint", "region", "profile")
LINKS_LAST = 3600  # seconds
KEPT = 10.0  # seconds for which a narinfo is known: another node may change or remove it
MOST_KEPT = 20_000
LOOK = 30  # seconds after which a push by another node is seen in lists
MISSING = ("404", "NoSuchKey", "NotFound")
TAKEN = ("412", "PreconditionFailed", "409", "ConditionalRequestConflict")
UNKNOWN = 501  # the status of a server that does not know what was asked


@dataclass(frozen=True)
class Place:
    """The parts of a bucket's URL."""

    bucket: str
    prefix: str  # empty, or ends with a slash
    options: tuple[tuple[str, str], ...]


def checked_url(text: str) -> str:
    """The URL of a bucket. Raises UsageError."""
    place_of(text)
    return text


def place_of(url: str) -> Place:
    """The parts of a bucket's URL. Raises UsageError."""
    try:
        parts = urllib.parse.urlsplit(url)
        options = urllib.parse.parse_qsl(parts.query, strict_parsing=True) if parts.query else []
    except ValueError:
        raise UsageError(f"--cache-store is no URL: use {EXAMPLE}") from None
    names = [name for name, _ in options]
    is_known = set(names) <= set(OPTIONS) and len(names) == len(set(names))
    if parts.scheme != SCHEME or not NAME.fullmatch(parts.netloc) or not is_known:
        raise UsageError(f"--cache-store must be {EXAMPLE}, not {url[:200]!r}")
    if not PREFIX.fullmatch(parts.path):
        raise UsageError(f"--cache-store has a prefix of letters and digits, not {parts.path!r}")
    prefix = parts.path.strip("/")
    return Place(parts.netloc, f"{prefix}/" if prefix else "", tuple(options))


@functools.lru_cache(maxsize=1000)
def bucket_of(url: str, cache_name: str, place: Path) -> Bucket:
    """The files of a cache, below its name. `place` is for temporary files. Raises Error."""
    parts = place_of(url)
    return Bucket(_client(parts), parts.bucket, f"{parts.prefix}{cache_name}/", place)


@functools.lru_cache(maxsize=10)
def _client(place: Place) -> Any:
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError:
        hint = "install the extra `s3` of cachix-deploy"
        raise Error(f"a bucket needs the Python package boto3: {hint}") from None
    options = dict(place.options)
    config = Config(
        connect_timeout=5,
        read_timeout=30,
        retries={"total_max_attempts": 3, "mode": "standard"},
        max_pool_connections=64,
        signature_version="s3v4",
        # servers but Amazon's own have no host for each bucket
        s3={"addressing_style": "path" if "endpoint" in options else "auto"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        session = boto3.session.Session(
            profile_name=options.get("profile"), region_name=options.get("region")
        )
        region = session.region_name or "us-east-1"
        endpoint = options.get("endpoint")
        return session.client("s3", endpoint_url=endpoint, config=config, region_name=region)
    except (BotoCoreError, ValueError) as error:
        raise Error(f"the bucket {place.bucket} can't be used: {error}") from None


def check(url: str) -> None:
    """Raises Error unless the bucket can be listed, and a file written and removed in it."""
    parts = place_of(url)
    bucket = Bucket(_client(parts), parts.bucket, parts.prefix, Path("/nonexistent"))
    try:
        bucket.put(".writable", b"")
        next(bucket.entries(), None)
        bucket.remove(".writable")
    except OSError as error:
        raise Error(str(error.strerror)) from None


@dataclass(frozen=True)
class Bucket:
    """A cache in a bucket, below a prefix."""

    client: Any
    bucket: str
    prefix: str
    uploads: Path
    known: dict[str, tuple[Content, float]] = field(default_factory=dict, compare=False, repr=False)

    def place(self, name: str) -> Path:
        return self.uploads

    def read(self, name: str) -> Content | None:
        content, until = self.known.get(name, (None, 0.0))
        if content is not None and time.monotonic() < until:
            return content
        with self._asking() as asked:
            answer = self.client.get_object(**self._key(name))
            with contextlib.closing(answer["Body"]) as body:
                content = Content(body.read(), _nanoseconds(answer["LastModified"]))
        if asked.is_missing or content is None:
            return None
        self._keep(name, content)
        return content

    def entry(self, name: str) -> Entry | None:
        answer: Any = None
        with self._asking():
            answer = self.client.head_object(**self._key(name))
        if answer is None:
            return None
        return Entry(name, answer["ContentLength"], _nanoseconds(answer["LastModified"]))

    def entries(self, folder: str = "") -> Iterator[Entry]:
        yield from self._list(folder, {"Delimiter": "/"})

    def all_entries(self) -> Iterator[Entry]:
        yield from self._list("", {})

    def create(self, temporary: Path, name: str) -> bool:
        if self.entry(name) is not None:
            return False
        if not name.endswith(".narinfo"):  # all others are named after their contents
            self._upload(temporary, name)
            return True
        return self.put(name, temporary.read_bytes(), is_new=True)

    def replace(self, temporary: Path, name: str) -> None:
        self._upload(temporary, name)

    def touch(self, name: str) -> None:
        with self._asking():
            self.client.copy_object(
                **self._key(name),
                CopySource={"Bucket": self.bucket, "Key": self.prefix + name},
                MetadataDirective="REPLACE",
            )

    def remove(self, name: str) -> None:
        self.known.pop(name, None)
        with self._asking():
            self.client.delete_object(**self._key(name))

    def changed(self) -> int:
        return int(time.time() / LOOK)

    def source(self, name: str) -> Path | str:
        return str(
            self.client.generate_presigned_url(
                "get_object", Params=self._key(name), ExpiresIn=LINKS_LAST
            )
        )

    def put(self, name: str, body: bytes, is_new: bool = False) -> bool:
        """Write a small file; False if it must be new and is not, as far as the server looks."""
        condition = {"IfNoneMatch": "*"} if is_new else {}
        with self._asking() as asked:
            self.client.put_object(**self._key(name), Body=body, **condition)
        if asked.is_unknown:  # a server that knows no conditions: `create` has looked before
            with self._asking():
                self.client.put_object(**self._key(name), Body=body)
        self.known.pop(name, None)
        return not asked.is_taken

    def _key(self, name: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + name}

    def _list(self, folder: str, options: dict[str, str]) -> Iterator[Entry]:
        pages = self.client.get_paginator("list_objects_v2")
        with self._asking():
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix + folder, **options):
                for file in page.get("Contents", ()):
                    name = file["Key"][len(self.prefix) :]
                    yield Entry(name, file["Size"], _nanoseconds(file["LastModified"]))

    def _upload(self, temporary: Path, name: str) -> None:
        self.known.pop(name, None)
        with self._asking():
            self.client.upload_file(str(temporary), self.bucket, self.prefix + name)

    def _keep(self, name: str, content: Content) -> None:
        if name.endswith(".narinfo"):
            if len(self.known) >= MOST_KEPT:
                self.known.clear()
            self.known[name] = (content, time.monotonic() + KEPT)

    @contextlib.contextmanager
    def _asking(self) -> Iterator[_Asked]:
        """Ask the bucket. An answer that says no ends the block. Raises StoreError for others."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        asked = _Asked()
        try:
            yield asked
        except ClientError as error:
            asked.code = str(error.response.get("Error", {}).get("Code", ""))
            asked.status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if not (asked.is_missing or asked.is_taken or asked.is_unknown):
                raise self._error(error) from None
        except (BotoCoreError, Boto3Error) as error:
            raise self._error(error) from None

    def _error(self, error: Exception) -> StoreError:
        sentence = " ".join(str(error).split())[:300]
        return StoreError(errno.EIO, f"the bucket {self.bucket} can't be used: {sentence}")


@dataclass
class _Asked:
    """The answer that ended a question to a bucket; empty if nothing did."""

    code: str = ""
    status: int = 0

    @property
    def is_missing(self) -> bool:
        return self.code in MISSING

    @property
    def is_taken(self) -> bool:
        return self.code in TAKEN

    @property
    def is_unknown(self) -> bool:
        return self.status == UNKNOWN


def _nanoseconds(moment: Any) -> int:
    return int(moment.timestamp() * 1e9)
