"""The program `cachix-workspace`, also run as `python -m cachix_workspace`."""

from __future__ import annotations

import os
import sys
from typing import Any

from cachix_console import UnknownForm, complain, prepare, tell
from cachix_protocol import Error
from cachix_workspace.cli.usage import fitting_lines, parse


def main(argv: list[str] | None = None) -> int:
    """Run a command line (sys.argv by default) and return its exit status."""
    prepare()
    os.umask(0o077)  # the database, and whatever SQLite puts beside it, are for this user alone
    try:
        return _run(parse(sys.argv[1:] if argv is None else argv))
    except UnknownForm as error:
        lines = fitting_lines(error.words)
        tell(f"error: {error.reason}" if lines else f"error: {error}")
        for line in lines:
            tell(line)
        return error.status
    except Error as error:
        complain(error)
        return error.status
    except (KeyboardInterrupt, BrokenPipeError):  # Ctrl-C, or nobody reads stdout any more
        return 1


def _run(options: dict[str, Any]) -> int:
    """Each group of commands imports what it needs: SQLAlchemy, Flask and gunicorn start slowly."""
    if options["serve"]:
        from cachix_workspace.cli import serve

        return serve.run(options)
    if options["--url"] and _is_afar(options):
        from cachix_workspace.cli import afar

        afar.run(options)
    elif options["token"]:
        from cachix_workspace.cli import token

        token.run(options)
    elif options["cache"] and not options["list"]:
        from cachix_workspace.cli import cache

        cache.run(options)
    elif options["audit"]:
        from cachix_workspace.cli import audit

        audit.run(options)
    elif options["move"] or (options["agent"] and options["list"] and not options["--url"]):
        from cachix_workspace.cli import agent

        agent.run(options)
    else:
        _run_by_api(options)
    return 0


def _is_afar(options: dict[str, Any]) -> bool:
    """Whether the command works otherwise on a workspace beside it, with more options there."""
    is_cache = options["cache"] and not options["list"]
    return bool(options["token"] or is_cache or options["audit"] or options["move"])


def _run_by_api(options: dict[str, Any]) -> None:
    """Run a command that works from afar as well."""
    from cachix_workspace.cli import fleet, people

    commands = {
        "init": people.init,
        "login-link": people.login_link,
        "person": people.person,
        "webhook": people.webhook,
        "freeze": people.freeze,
        "thaw": people.freeze,
        "cache": people.list_caches,
    }
    name = next((name for name in commands if options[name]), "")
    commands.get(name, fleet.run)(options)


if __name__ == "__main__":
    sys.exit(main())
