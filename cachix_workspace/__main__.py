"""The self-hosted workspace of cachix-deploy.

Usage:
  cachix-workspace serve [--listen=ADDRESS] [--public-url=URL] [--data=DIR] [--max-connections=N]
  cachix-workspace token create (agent | activate | admin) [--description=TEXT] [--expires=DAYS] [--cache=NAME]
                                [--data=DIR]
  cachix-workspace token list [--json] [--data=DIR]
  cachix-workspace token revoke ID [--data=DIR]
  cachix-workspace agent list [--json] [--data=DIR]
  cachix-workspace cache create NAME [--private] [--public-url=URL] [--data=DIR]
  cachix-workspace cache show NAME [--json] [--data=DIR]
  cachix-workspace --help
  cachix-workspace --version

Commands:
  serve         Serve agents, CI and the binary caches.
  token create  Print a new token, this once: for agents, for CI (activate), or for everything (admin).
  token revoke  End a token. A running server closes its connections within seconds.
  agent list    The agents that have ever connected.
  cache create  Make a binary cache. Its secret key, with which you sign what you push, is printed this once.
  cache show    A cache's URL and public key.

Options:
  --data=DIR           Where the workspace lives [default: ./cachix-workspace].
  --listen=ADDRESS     HOST:PORT; port 0 picks a free one [default: 127.0.0.1:8080].
  --public-url=URL     How agents and CI reach the workspace. Default: where `serve` listens;
                       for `cache create`, which names keys after it: what `serve` last used.
  --max-connections=N  Connections at a time; sockets take three quarters of them at most [default: 4096].
  --description=TEXT   What the token is for.
  --expires=DAYS       The token counts for so many days only.
  --cache=NAME         The binary cache of the agents with this token (default: the first one).
  --private            Only tokens may read the cache.
  --json               Print JSON.
  -h --help            Show this text.
  --version            Show the version.

The commands work beside a running server. Exit status: 0 done; 1 failed; 64 wrong usage.
"""

from __future__ import annotations

import json
import re
import sys
import urllib.parse
from pathlib import Path
from typing import Any

import cachix_protocol
from cachix_workspace import Error, Settings, UsageError
from cachix_workspace.tables import Database, get_meta, open_database

DEFAULT_URL = "http://127.0.0.1:8080"


def main(argv: list[str] | None = None) -> int:
    """Run a command line (sys.argv by default); its exit status."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return 1
    except BrokenPipeError:  # the reader of stdout has left
        sys.stderr.close()
        return 1


def _run(argv: list[str]) -> int:
    options = parse(argv)
    if options["--help"]:
        print((__doc__ or "").strip())
    elif options["--version"]:
        print(cachix_protocol.__version__)
    elif options["serve"]:
        return _serve(options)
    elif options["token"]:
        _token(options)
    elif options["cache"]:
        _cache(options)
    else:
        _agents(options)
    return 0


def parse(argv: list[str]) -> dict[str, Any]:
    """The options and commands of a command line. Raises UsageError that says what is wrong."""
    from docopt import DocoptExit, docopt

    usage = __doc__ or ""
    known = set(re.findall(r"--[a-z-]+", usage))
    for argument in argv:
        name = argument.partition("=")[0]
        if argument == "--":
            break
        if (
            name.startswith("--") and name not in known
        ):  # docopt would take any prefix that is unambiguous
            raise UsageError(f"there is no option {name}: see cachix-workspace --help")
    if not {"-h", "--help"}.isdisjoint(argv):
        return {"--help": True}
    try:
        return dict(docopt(usage, argv, help=False))
    except DocoptExit as error:
        reason = str(error).partition("\n")[0]
        detail = (
            "the arguments fit no form of the command" if reason.startswith("Usage:") else reason
        )
        raise UsageError(f"{detail}: see cachix-workspace --help") from None


def public_url(text: str) -> str:
    """A URL as others are made from: without a slash at its end. Raises UsageError."""
    parts = urllib.parse.urlsplit(text)
    try:
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment or parts.username:
        raise UsageError(
            f"--public-url must be a URL such as https://deploy.example.org, not {text!r}"
        )
    return text.rstrip("/")


def _number(options: dict[str, Any], name: str, low: float, high: float) -> float:
    text = options[name]
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise UsageError(f"{name} must be a number from {low:g} to {high:g}, not {text!r}")
    return value


def _serve(options: dict[str, Any]) -> int:
    from cachix_workspace import server

    given = options["--public-url"] and public_url(options["--public-url"])
    connections = int(_number(options, "--max-connections", 4, 100_000))
    listener = server.bind(options["--listen"])
    settings = Settings(
        Path(options["--data"]).absolute(), given or server.url_of(listener), connections
    )
    return server.serve(settings, listener)


def _open(options: dict[str, Any], create: bool = False) -> tuple[Database, Settings]:
    """The workspace that --data names, and its settings as `serve` last had them."""
    data = Path(options["--data"])
    database = open_database(Settings(data), create)
    with database.read() as connection:
        stored = get_meta(connection, "public_url")
    given = options.get("--public-url")
    return database, Settings(data, public_url(given) if given else stored or DEFAULT_URL)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _print_table(rows: list[list[str]]) -> None:
    """Columns as wide as they need to be; the first row is the head."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


# --- commands --------------------------------------------------------------------------------------------------------


def _token(options: dict[str, Any]) -> None:
    if options["create"]:
        _create_token(options)
    elif options["revoke"]:
        _revoke_token(options)
    else:
        _list_tokens(options)


def _create_token(options: dict[str, Any]) -> None:
    from cachix_workspace import cache, tokens

    kind = next(kind for kind in tokens.KINDS if options[kind])
    days = _number(options, "--expires", 0, 36_500) if options["--expires"] else None
    database, _ = _open(options, create=True)
    with database.write() as connection:
        found = cache.find(connection, options["--cache"]) if options["--cache"] else None
        if options["--cache"] and found is None:
            raise Error(
                f"there is no cache {options['--cache']}: make it with `cachix-workspace cache create`"
            )
        cache_id = None if found is None else found.id
        number, secret = tokens.create(
            connection, kind, options["--description"] or "", days, cache_id
        )
    print(f"{kind} token {number}, shown only this once:", file=sys.stderr)
    print(secret)


def _revoke_token(options: dict[str, Any]) -> None:
    from cachix_workspace import tokens

    if not re.fullmatch("[0-9]{1,18}", options["ID"]):
        raise UsageError(
            f"ID is a number of `cachix-workspace token list`, not {options['ID'][:20]!r}"
        )
    database, _ = _open(options)
    with database.write() as connection:
        if not tokens.revoke(connection, int(options["ID"])):
            raise Error(f"there is no token {options['ID']}: see `cachix-workspace token list`")
    print(f"token {options['ID']} is revoked", file=sys.stderr)


def _list_tokens(options: dict[str, Any]) -> None:
    from cachix_workspace import tokens

    database, _ = _open(options)
    with database.read() as connection:
        known = tokens.everyone(connection)
    now = cachix_protocol.utc_now()
    if options["--json"]:
        shown = {"id", "kind", "description", "created_on", "expires_on", "revoked_on"}
        _print_json(
            [
                {k: v for k, v in vars(token).items() if k in shown} | {"state": token.state(now)}
                for token in known
            ]
        )
        return
    rows = [
        [
            str(token.id),
            token.kind,
            token.state(now),
            token.created_on[:10],
            (token.expires_on or "-")[:10],
            token.description,
        ]
        for token in known
    ]
    _print_table([["ID", "KIND", "STATE", "CREATED", "EXPIRES", "DESCRIPTION"], *rows])


def _agents(options: dict[str, Any]) -> None:
    from cachix_workspace import deployments

    database, _ = _open(options)
    with database.read() as connection:
        known = deployments.every_agent(connection)
    if options["--json"]:
        shown = ("id", "name", "system", "version", "created_on", "seen_on", "connected")
        _print_json([{key: getattr(agent, key) for key in shown} for agent in known])
        return
    rows = [
        [
            agent.name,
            "online" if agent.connected else "offline",
            agent.system or "-",
            agent.version or "-",
            agent.seen_on,
        ]
        for agent in known
    ]
    _print_table([["NAME", "STATE", "SYSTEM", "VERSION", "SINCE"], *rows])


def _cache(options: dict[str, Any]) -> None:
    from cachix_workspace import cache

    database, settings = _open(options, create=bool(options["create"]))
    if options["create"]:
        with database.write() as connection:
            made, secret = cache.create(
                connection, options["NAME"], not options["--private"], settings
            )
        print(
            f"cache {made.name} at {cache.url(settings, made)}, public key {made.key}",
            file=sys.stderr,
        )
        print("secret key, shown only this once:", file=sys.stderr)
        print(secret)
        return
    with database.read() as connection:
        found = cache.find(connection, options["NAME"])
    if found is None:
        raise Error(
            f"there is no cache {options['NAME']}: make it with `cachix-workspace cache create`"
        )
    facts = {
        "name": found.name,
        "url": cache.url(settings, found),
        "public_key": found.key,
        "public": found.public,
    }
    if options["--json"]:
        _print_json(facts)
    else:
        _print_table([[key.replace("_", " "), str(value)] for key, value in facts.items()])


if __name__ == "__main__":
    sys.exit(main())
