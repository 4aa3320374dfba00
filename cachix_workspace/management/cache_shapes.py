"""The API's schemas of binary caches."""

from __future__ import annotations

import datetime

from marshmallow import Schema, fields, validate

from cachix_workspace.cache import CacheRow
from cachix_workspace.management.shapes import Json
from cachix_workspace.recent import Recent


class NewCache(Schema):
    """A cache."""

    name = fields.String(required=True, validate=validate.Length(max=63))
    public = fields.Boolean(load_default=True)


class Cache(Schema):
    """A cache."""

    name = fields.String(required=True)
    url = fields.String(required=True)
    publicKey = fields.String(required=True)
    formerKey = fields.String(allow_none=True)
    public = fields.Boolean(required=True)


class CacheWithKey(Cache):
    """A cache with its secret key, which is shown this once."""

    secretKey = fields.String(required=True)


class Pushed(Schema):
    """A top-level path that was pushed of late. `size` is in bytes."""

    storePath = fields.String(required=True)
    pushedOn = fields.String(required=True)
    size = fields.Integer(required=True)
    kind = fields.String(required=True)
    system = fields.String(allow_none=True)
    isSigned = fields.Boolean(required=True)


class Pin(Schema):
    """A store path that is kept."""

    storePath = fields.String(required=True, validate=validate.Length(max=400))


class Pins(Schema):
    """All pins of a cache."""

    pins = fields.List(fields.String(), required=True)


class Collection(Schema):
    """The terms of a garbage collection: what is needed by the last deployments of each agent, and
    what was pushed within some days, is kept. With `dryRun` nothing is removed.
    """

    keepDeployments = fields.Integer(load_default=5, validate=validate.Range(1, 1000))
    keepDays = fields.Float(load_default=7.0, validate=validate.Range(1, 36_500))
    dryRun = fields.Boolean(load_default=False)


class Collected(Schema):
    """The result: the store paths that were removed, how many are left, and the bytes."""

    removed = fields.List(fields.String(), required=True)
    kept = fields.Integer(required=True)
    bytes = fields.Integer(required=True)
    dryRun = fields.Boolean(required=True)


class CacheDetail(Cache):
    """A cache with its late pushes, its pins, and with paths that no key of it has signed."""

    pins = fields.List(fields.String(), required=True)

    recent = fields.List(fields.Nested(Pushed), required=True)
    unsigned = fields.List(fields.String(), required=True)


class Caches(Schema):
    """All caches."""

    caches = fields.List(fields.Nested(Cache), required=True)


def cache(row: CacheRow, url: str, secret: str | None = None) -> Json:
    """A cache as the API shows it."""
    former = f"{row.old_key_name}:{row.old_public_key}" if row.old_key_name else None
    facts = {"name": row.name, "url": url, "publicKey": row.key, "public": row.public}
    return {**facts, "formerKey": former, **({} if secret is None else {"secretKey": secret})}


def pushed(one: Recent) -> Json:
    """A path that was pushed of late."""
    moment = datetime.datetime.fromtimestamp(one.pushed, datetime.timezone.utc)
    return {
        "storePath": one.store_path,
        "pushedOn": moment.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "size": one.size,
        "kind": one.kind,
        "system": one.system,
        "isSigned": one.is_signed,
    }
