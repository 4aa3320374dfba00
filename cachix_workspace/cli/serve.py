"""The command `serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cachix_console import number, positive, tell
from cachix_protocol import UsageError
from cachix_workspace import server
from cachix_workspace.cli.place import further_urls, public_url
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
        data=Path(options["--data"]).absolute(),
        public_url=url or server.url_of(listener, "http" if certificate is None else "https"),
        also_known_as=further_urls(options),
        behind_proxy=proxies,
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
    return server.serve(settings, listener, certificate)


def certificate_of(options: dict[str, Any]) -> Certificate | None:
    """The certificate to speak TLS with, if one is named. Raises Error."""
    certificate, key = options["--certificate"], options["--key"]
    if not (certificate or key):
        return None
    if not (certificate and key):
        raise UsageError("--certificate and --key must be given together")
    return Certificate(Path(certificate).absolute(), Path(key).absolute())
