"""The commands `cache create`, `cache show` and `cache key`."""

from __future__ import annotations

from typing import Any

from cachix_console import tell, write_secret
from cachix_workspace import audit, cache
from cachix_workspace.cli.output import show, show_json, show_secret, show_table
from cachix_workspace.cli.place import open_workspace, operator


def run(options: dict[str, Any]) -> None:
    """Run one of the commands. Raises Error."""
    if options["create"]:
        create(options)
    elif options["rotate"]:
        rotate(options)
    elif options["retire"]:
        retire(options)
    else:
        show_cache(options)


def create(options: dict[str, Any]) -> None:
    """Create a cache and print its secret key."""
    database, settings = open_workspace(options)
    with database.write() as connection:
        row, secret_key = cache.create(
            connection, options["NAME"], not options["--private"], settings
        )
        kind = "private" if options["--private"] else "public"
        audit.record(connection, operator(), "cache create", f"{row.name} ({kind})")
        if options["--out"]:  # a cache whose key could not be written is not made
            write_secret(secret_key, options["--out"])
    tell(f"cache {row.name} at {cache.url(settings, row.name)}, public key {row.key}")
    show_secret("secret key", secret_key, options["--out"])


def rotate(options: dict[str, Any]) -> None:
    """Make a new key, and print the secret one."""
    database, _ = open_workspace(options)
    with database.write() as connection:
        row, secret_key = cache.rotate(connection, options["NAME"])
        audit.record(connection, operator(), "cache key rotate", f"{row.name}, now {row.key}")
        if options["--out"]:
            write_secret(secret_key, options["--out"])
    tell(f"cache {row.name} has the new public key {row.key}")
    tell(f"sign with the new secret key; drop the old one by `cache key retire {row.name}`")
    show_secret("secret key", secret_key, options["--out"])


def retire(options: dict[str, Any]) -> None:
    """Drop the old key."""
    database, settings = open_workspace(options)
    with database.write() as connection:
        row = cache.retire(connection, options["NAME"])
        audit.record(connection, operator(), "cache key retire", f"{row.name}, left {row.key}")
    tell(f"cache {row.name} has one key, {row.key}")
    if paths := cache.unsigned(settings, row):
        count = f"{len(paths)} paths have no signature by it, and no agent takes them any more"
        tell(f"{count}: push them again (`cachix-workspace cache show {row.name}` lists them)")


def show_cache(options: dict[str, Any]) -> None:
    """Show a cache."""
    database, settings = open_workspace(options)
    with database.read() as connection:
        row = cache.find_named(connection, options["NAME"])
    unsigned = cache.unsigned(settings, row)
    facts = {
        "name": row.name,
        "url": cache.url(settings, row.name),
        "public_key": row.key,
        "public": row.public,
    }
    if options["--json"]:
        show_json({**facts, "unsigned": unsigned})
    else:
        show_table([[key.replace("_", " "), str(value)] for key, value in facts.items()])
        show_unsigned(unsigned)


def show_unsigned(paths: list[str]) -> None:
    """Name the store paths that agents refuse, and the remedy."""
    if paths:
        remedy = "push them again by `nix copy --refresh`"
        tell(f"{len(paths)} store paths are not signed by this cache's key, {remedy}:")
        for path in paths:
            show(path)
