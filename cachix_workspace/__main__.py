"""The program `cachix-workspace`, also run as `python -m cachix_workspace`."""

from __future__ import annotations

import os
import sqlite3
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
    except Exception as error:
        sentence = sentence_on(error)
        if not sentence:
            raise
        complain(Error(sentence))
        return Error.status


def sentence_on(error: Exception) -> str:
    """The sentence on a disk or a database that fails; empty for any other error."""
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}"
    if isinstance(error, sqlite3.Error) or type(error).__module__ == "sqlalchemy.exc":
        from cachix_workspace.database import reason_of

        return f"the workspace can't use its database: {reason_of(error)}"
    return ""


def _run(options: dict[str, Any]) -> int:
    """Commands import what they need only here: SQLAlchemy, Flask and gunicorn start slowly."""
    if options["serve"]:
        from cachix_workspace.cli import serve

        return serve.run(options)
    from cachix_workspace.cli import audit, cache, fleet, keep, people, token

    commands = {
        "init": people.init,
        "login-link": people.login_link,
        "person": people.person,
        "webhook": people.webhook,
        "freeze": people.freeze,
        "thaw": people.freeze,
        "cache": cache.run,
        "audit": audit.run,
        "token": token.run,
        "prune": keep.prune,
        "backup": keep.back_up,
        "restore": keep.restore,
        "migrate-database": keep.migrate_database,
    }
    name = next((name for name in commands if options[name]), "")
    commands.get(name, fleet.run)(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
