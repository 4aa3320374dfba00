"""The commands `token`, `cache`, `audit` and `agent move`, from afar: by the management API."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import quote, urlencode

from cachix_console import positive, tell, write_secret
from cachix_protocol import Error, UsageError
from cachix_workspace.cli.backend import Backend, backend
from cachix_workspace.cli.fleet import limit_of, number_of
from cachix_workspace.cli.output import show_json, show_secret, show_table

Json = dict[str, Any]
MAX_DAYS = 36_500
KINDS = ("agent", "activate", "admin", "metrics")
NEEDS_FILES = ("--names-from", "--out-dir", "--shared", "--and-agents")


def run(options: dict[str, Any]) -> None:
    """Run one of the commands. Raises Error."""
    wrong = [option for option in NEEDS_FILES if options[option]]
    if wrong:
        raise UsageError(f"{wrong[0]} works beside the workspace only, without --url")
    if options["--out"] and os.path.lexists(options["--out"]):  # before there is a secret to lose
        raise Error(f"{options['--out']} exists already: name a file that does not")
    where = backend(options)
    if options["token"]:
        _token(where, options)
    elif options["cache"]:
        _cache(where, options)
    elif options["audit"]:
        _audit(where, options)
    else:
        where.call("POST", f"/agents/{quote(options['NAME'], safe='')}/move")
        tell(f"{options['NAME']} is free: the next machine that enrols by this name has it")


def _secret(what: str, secret: str, out: str | None) -> None:
    """Print a secret, or write it into a file, in which case nothing else has it."""
    if out:
        write_secret(secret, out)
    show_secret(what, secret, out)


# --- tokens ---------------------------------------------------------------------------------------


def _token(where: Backend, options: dict[str, Any]) -> None:
    if options["list"]:
        _list_tokens(where, options)
        return
    if options["create"]:
        kind = next(kind for kind in KINDS if options[kind])
        made = where.call("POST", "/tokens", _new_token(options, kind))
        _secret(f"{kind} token {made['id']}", made["secret"], options["--out"])
        return
    number = number_of(options, "ID")
    if options["rotate"]:
        made = where.call("POST", f"/tokens/{number}/rotate")
        _secret(f"token {made['id']}, in place of {number}", made["secret"], options["--out"])
        return
    where.call("DELETE", f"/tokens/{number}")
    tell(f"token {number} is revoked")


def _new_token(options: dict[str, Any], kind: str) -> Json:
    days, count = options["--expires"], options["--count"]
    body: Json = {"kind": kind, "description": options["--description"] or ""}
    body["agents"] = options["--name"] or options["--names"] or options["--agents"]
    body["expiresInDays"] = positive(options, "--expires", "days", MAX_DAYS) if days else None
    body["cache"] = options["--cache"] or ""
    body["count"] = None if count is None else number_of(options, "--count")
    return body


def _list_tokens(where: Backend, options: dict[str, Any]) -> None:
    found: list[Json] = []
    page: int | None = 1
    while page is not None:
        answer = where.call("GET", f"/tokens?{urlencode({'page': page, 'limit': 1000})}")
        found, page = found + answer["tokens"], answer["next"]
    found.sort(key=lambda one: int(one["id"]))
    if options["--json"]:
        show_json(found)
        return
    table = [["ID", "KIND", "STATE", "AGENTS", "CREATED", "EXPIRES", "DESCRIPTION"]]
    for one in found:
        dates = [one["createdOn"][:10], (one["expiresOn"] or "-")[:10]]
        facts = [one["kind"], one["state"], one["agents"] or "any", *dates, one["description"]]
        table.append([str(one["id"]), *facts])
    show_table(table)


# --- caches and the audit -------------------------------------------------------------------------


def _cache(where: Backend, options: dict[str, Any]) -> None:
    name, path = options["NAME"], f"/caches/{quote(options['NAME'], safe='')}"
    if options["create"]:
        made = where.call("POST", "/caches", {"name": name, "public": not options["--private"]})
        tell(f"cache {name} at {made['url']}, public key {made['publicKey']}")
        _secret("secret key", made["secretKey"], options["--out"])
    elif options["rotate"]:
        made = where.call("POST", f"{path}/rotate")
        tell(f"cache {name} has the new public key {made['publicKey']}")
        _secret("secret key", made["secretKey"], options["--out"])
    elif options["retire"]:
        tell(f"cache {name} has one key, {where.call('POST', f'{path}/retire')['publicKey']}")
    else:
        found = [one for one in where.call("GET", "/caches")["caches"] if one["name"] == name]
        if not found:
            raise Error(f"there is no cache {name}: see `cachix-workspace cache list`")
        if options["--json"]:
            show_json(found[0])
        else:
            show_table([[key, str(value)] for key, value in found[0].items()])


def _audit(where: Backend, options: dict[str, Any]) -> None:
    found = where.call("GET", f"/audit?{urlencode({'limit': limit_of(options)})}")["entries"]
    found.reverse()  # the oldest first, as beside the workspace
    if options["--json"]:
        show_json(found)
        return
    table = [["TIME", "WHO", "FROM", "WHAT", "DETAIL"]]
    for one in found:
        facts = [one["actor"], one["address"] or "-", one["action"], one["detail"]]
        table.append([one["time"][:19], *facts])
    show_table(table)
