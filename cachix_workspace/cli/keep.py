"""The commands `prune`, `backup`, `restore` and `migrate-database`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cachix_console import number, positive, tell
from cachix_protocol import UsageError
from cachix_workspace import audit, backup, retention
from cachix_workspace.cli.place import (
    data_of,
    database_of,
    note_database,
    open_workspace,
    operator,
    settings_of,
)
from cachix_workspace.retention import Limits

MOST = 1_000_000


def limits_of(options: dict[str, Any]) -> Limits:
    """How many deployments to keep, and how long. Raises UsageError."""
    has_count, has_days = options["--keep-deployments"], options["--keep-days"]
    count = int(number(options, "--keep-deployments", 1, MOST)) if has_count else 0
    return Limits(count, positive(options, "--keep-days", "days", MOST) if has_days else 0.0)


def prune(options: dict[str, Any]) -> None:
    """Remove old deployments. Raises Error."""
    limits = limits_of(options)
    if limits == Limits():
        raise UsageError("say how much to keep, by --keep-deployments, --keep-days or both")
    database, _ = open_workspace(options)
    if options["--dry-run"]:
        tell(f"{len(retention.expired(database, limits))} deployments would be removed")
        return
    result = retention.prune(database, limits)
    detail = f"removed {result.deployments} deployments, made {result.logs} logs compact"
    with database.write() as connection:
        audit.record(connection, operator(), "prune", detail)
    tell(f"{detail}; new entries take the room that is free now in the database")


def back_up(options: dict[str, Any]) -> None:
    """Copy the workspace. Raises Error."""
    _, settings = open_workspace(options)
    target = Path(options["DIR"]).absolute()
    facts = backup.back_up(settings, target)
    tell(f"{target} has a backup: {facts.sentence}")
    if settings.is_bucket:
        tell(f"the caches are in {settings.cache_store}, and not in the backup")


def migrate_database(options: dict[str, Any]) -> None:
    """Move the database to PostgreSQL. Raises Error."""
    from cachix_workspace import moving

    wanted = {"--database": options["--to"], "--database-file": options["--database-file"]}
    url, file = database_of(wanted)
    data = data_of(options)
    count = moving.move(data, url, file, operator())
    tell(f"PostgreSQL has the {count} rows of the workspace; {data} names it from now on")
    tell(f"{data / moving.MOVED} is what it was before: remove it once all is well")


def restore(options: dict[str, Any]) -> None:
    """Make a workspace of a backup. Raises Error."""
    settings = settings_of(options)
    data = settings.data
    facts = backup.restore(Path(options["DIR"]).absolute(), settings, operator())
    note_database(options)
    tell(f"{data} has the workspace of {facts.time[:19]}: {facts.sentence}")
    if facts.ended:
        tell(f"{facts.ended} deployments had not ended: order them again, if they are wanted")
    tell("tokens that were revoked since then count again: `cachix-workspace token list` has them")
    tell("CI must push once by `nix copy --refresh`: its Nix believes that newer paths are here")
