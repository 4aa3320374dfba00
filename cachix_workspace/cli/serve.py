"""The command `serve`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from cachix_console import number, positive, tell
from cachix_protocol import UsageError
from cachix_workspace import people, server
from cachix_workspace.cli.place import data_of, further_urls, public_url
from cachix_workspace.database import open_database
from cachix_workspace.settings import Settings
from cachix_workspace.tls import Certificate

MIB, GIB = 1 << 20, 1 << 30
MOST_GIB = 1 << 20


def run(options: dict[str, Any]) -> int:
    """Serve until a signal; the exit status. Raises Error."""
    url = public_url(options)
    proxies = int(number(options, "--behind-proxy", 0, 9))
    connections = int(number(options, "--max-connections", 4, 100_000))
    certificate = certificate_of(options)
    listener = server.bind(options["--listen"])
    settings = Settings(
        data=data_of(options),
        public_url=url or server.url_of(listener, "http" if certificate is None else "https"),
        also_known_as=further_urls(options),
        behind_proxy=proxies,
        auth_header=auth_header_of(options, proxies),
        max_connections=connections,
        max_nar=int(positive(options, "--max-nar", "GiB", MOST_GIB) * GIB),
        keep_free=int(number(options, "--keep-free", 0, MOST_GIB) * GIB),
        max_log=int(positive(options, "--max-log", "MiB", 1 << 20) * MIB),
    )
    if certificate is None and not proxies and server.is_exposed(listener):
        tell(
            f"warning: --listen={options['--listen']} is plain http, and other machines reach it: "
            "anybody on the way can read tokens and change deployments; use --certificate and "
            "--key, or a proxy that speaks TLS and --behind-proxy=1"
        )
    tell_how_to_sign_in(settings)
    return server.serve(settings, listener, certificate)


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
