"""The command `serve`."""

from __future__ import annotations

import contextlib
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from cachix_console import number, positive, tell
from cachix_protocol import UsageError
from cachix_workspace import people, server
from cachix_workspace.cli.keep import limits_of
from cachix_workspace.cli.place import (
    cache_of,
    data_of,
    further_urls,
    note_database,
    public_url,
    settings_of,
)
from cachix_workspace.database import CACHE_STORE, get_meta, open_database, put_meta
from cachix_workspace.directory import alone
from cachix_workspace.limits import connections_of
from cachix_workspace.settings import Settings
from cachix_workspace.tls import Certificate

MIB, GIB = 1 << 20, 1 << 30
MOST_GIB = 1 << 20


def run(options: dict[str, Any]) -> int:
    """Serve until a signal; the exit status. Raises Error."""
    url = public_url(options)
    proxies = int(number(options, "--behind-proxy", 0, 9))
    is_named = options["--max-connections"] is not None
    named = int(number(options, "--max-connections", 4, 100_000)) if is_named else None
    limits = limits_of(options)
    certificate, caches = certificate_of(options), cache_of(options)
    listener = server.bind(options["--listen"])
    settings = Settings(
        data=data_of(options),
        database=settings_of(options).database,
        public_url=url or server.default_url(listener, "http" if certificate is None else "https"),
        also_known_as=further_urls(options),
        has_shared_directory=bool(options["--cache-shared"]),
        is_nameless=url is None and server.is_wildcard(listener),
        behind_proxy=proxies,
        auth_header=auth_header_of(options, proxies),
        max_connections=connections_of(named),
        max_per_address=int(number(options, "--max-per-address", 0, 100_000)),
        max_nar=int(positive(options, "--max-nar", "GiB", MOST_GIB) * GIB),
        keep_free=int(number(options, "--keep-free", 0, MOST_GIB) * GIB),
        keep_deployments=limits.count,
        keep_days=limits.days,
        max_log=int(positive(options, "--max-log", "MiB", 1 << 20) * MIB),
    )
    is_plain = certificate is None and not proxies and server.is_exposed(listener)
    _warn(settings, options["--listen"] if is_plain else "")
    with alone(settings.data):
        settings = with_cache(settings, caches)
        tell_how_to_sign_in(settings)
        note_database(options)
        return server.serve(settings, listener, certificate)


def _warn(settings: Settings, exposed: str) -> None:
    """Tell what is surprising; `exposed` is the address that others reach by plain http."""
    if exposed:
        tell(
            f"warning: --listen={exposed} is plain http, and other machines reach it: "
            "anybody on the way can read tokens and change deployments; use --certificate and "
            "--key, or a proxy that speaks TLS and --behind-proxy=1"
        )
    if settings.is_nameless:
        tell(
            "without --public-url agents and CI are told the address that they came by, and links "
            f"begin with {settings.public_url}"
        )


def with_cache(settings: Settings, named: str) -> Settings:
    """The settings with the place of the caches, which later commands find. Raises Error.

    It is the one of the last time, unless another one is named.
    """
    with contextlib.closing(open_database(settings, create=True)) as database:
        with database.read() as connection:
            noted = get_meta(connection, CACHE_STORE) or ""
        result = replace(settings, cache_store=named or noted)
        if result.is_bucket:
            from cachix_workspace import bucket

            bucket.check(result.cache_store)
        if named and named != noted:
            with database.write() as connection:
                put_meta(connection, CACHE_STORE, named)
            former = noted or str(settings.caches)
            tell(f"caches are kept in {named} now, and no longer in {former}")
    return result


def tell_how_to_sign_in(settings: Settings) -> None:
    """Say how the first person signs in, unless somebody has. Raises Error.

    A link is a secret: only a terminal shows it, as logs are kept.
    """
    database = open_database(settings, create=True)
    try:
        with database.read() as connection:
            if people.has_signed_in(connection):
                return
        if not sys.stderr.isatty():
            tell("nobody has signed in yet: run `cachix-workspace login-link`")
            return
        with database.write() as connection:
            person = people.first_admin(connection)
            secret = people.make_link(connection, person)
        minutes = people.LINK_LASTS.total_seconds() / 60
        tell(f"sign in as {person.name}, once, within {minutes:.0f} minutes:")
        tell(f"  {settings.public_url}/sign-in/{secret}")
    finally:
        database.close()


def auth_header_of(options: dict[str, Any], proxies: int) -> str:
    """The header that names who is signed in; empty for none. Raises UsageError."""
    name = options["--auth-header"] or ""
    if name and not re.fullmatch("[A-Za-z0-9-]{1,64}", name):
        raise UsageError(f"--auth-header is the name of a header, not {name[:64]!r}")
    if name and not proxies:
        raise UsageError("--auth-header goes with --behind-proxy: without a proxy anybody sends it")
    return name


def certificate_of(options: dict[str, Any]) -> Certificate | None:
    """The certificate to speak TLS with, if one is named. Raises Error."""
    certificate, key = options["--certificate"], options["--key"]
    if not (certificate or key):
        return None
    if not (certificate and key):
        raise UsageError("--certificate and --key must be given together")
    return Certificate(Path(certificate).absolute(), Path(key).absolute())
