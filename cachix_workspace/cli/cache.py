"""The commands `cache list`, `cache create`, `cache show` and `cache key`."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote, urlencode

from cachix_console import number, tell
from cachix_workspace.cli.backend import Backend, backend
from cachix_workspace.cli.output import (
    Json,
    new_files,
    show,
    show_json,
    show_secret,
    show_table,
)
from cachix_workspace.sentences import megabytes


def run(options: dict[str, Any]) -> None:
    """Run one of the commands. Raises Error."""
    where, path = backend(options), f"/caches/{quote(options['NAME'] or '', safe='')}"
    if options["create"]:
        create(where, options)
    elif options["rotate"]:
        rotate(where, path, options["--out"])
    elif options["retire"]:
        retire(where, path)
    elif options["gc"]:
        collect(where, path, options)
    elif options["pin"]:
        show_pins(where.call("POST", f"{path}/pins", {"storePath": options["PATH"]}))
    elif options["unpin"]:
        query = urlencode({"storePath": options["PATH"]})
        show_pins(where.call("DELETE", f"{path}/pins?{query}"))
    elif options["show"]:
        show_cache(where.call("GET", path), bool(options["--json"]))
    else:
        list_all(where, bool(options["--json"]))


def create(where: Backend, options: dict[str, Any]) -> None:
    """Create a cache and print its secret key."""
    out = options["--out"]
    body = {"name": options["NAME"], "public": not options["--private"]}
    with new_files([out] if out else []) as write:
        answer = where.call("POST", "/caches", body)
        write([answer["secretKey"]])
    tell(f"cache {answer['name']} at {answer['url']}, public key {answer['publicKey']}")
    show_secret("secret key", answer["secretKey"], out)


def rotate(where: Backend, path: str, out: str | None) -> None:
    """Make a new key, and print the secret one."""
    with new_files([out] if out else []) as write:
        answer = where.call("POST", f"{path}/rotate")
        write([answer["secretKey"]])
    tell(f"cache {answer['name']} has the new public key {answer['publicKey']}")
    tell(f"sign with the new secret key; drop the old one by `cache key retire {answer['name']}`")
    show_secret("secret key", answer["secretKey"], out)


def retire(where: Backend, path: str) -> None:
    """Drop the old key."""
    left = where.call("POST", f"{path}/retire")
    tell(f"cache {left['name']} has one key, {left['publicKey']}")
    if paths := where.call("GET", path)["unsigned"]:
        count = f"{len(paths)} paths have no signature by it, and no agent takes them any more"
        tell(f"{count}: push them again (`cachix-workspace cache show {left['name']}` lists them)")


def collect(where: Backend, path: str, options: dict[str, Any]) -> None:
    """Remove what nothing needs, or name it."""
    body: Json = {"dryRun": bool(options["--dry-run"])}
    if options["--keep-deployments"] is not None:
        body["keepDeployments"] = int(number(options, "--keep-deployments", 1, 1000))
    if options["--keep-days"] is not None:
        body["keepDays"] = number(options, "--keep-days", 1, 36_500)
    answer = where.call("POST", f"{path}/gc", body)
    if options["--json"]:
        show_json(answer)
        return
    for store_path in answer["removed"]:
        show(store_path)
    verb = "would be removed" if answer["dryRun"] else "are removed"
    size = megabytes(answer["bytes"])
    tell(f"{len(answer['removed'])} store paths ({size}) {verb}, {answer['kept']} stay")


def show_pins(answer: Json) -> None:
    """Show all pins of a cache."""
    for store_path in answer["pins"]:
        show(store_path)
    tell(f"{len(answer['pins'])} store paths are pinned")


def show_cache(facts: Json, as_json: bool) -> None:
    """Show a cache."""
    if as_json:
        show_json(facts)
        return
    words = {"name": "name", "url": "url", "publicKey": "public key", "public": "public"}
    show_table([[word, str(facts[key])] for key, word in words.items()])
    if facts["unsigned"]:
        remedy = "push them again by `cachix-deploy push`"
        tell(f"{len(facts['unsigned'])} store paths are not signed by this cache's key, {remedy}:")
        for path in facts["unsigned"]:
            show(path)


def list_all(where: Backend, as_json: bool) -> None:
    """List the caches."""
    caches = where.call("GET", "/caches")["caches"]
    if as_json:
        show_json(caches)
        return
    table = [["NAME", "READ BY", "URL", "KEY"]]
    for one in caches:
        readers = "anybody" if one["public"] else "tokens"
        table.append([one["name"], readers, one["url"], one["publicKey"]])
    show_table(table)
