"""The usage text of `cachix-workspace`, and command lines that do not fit it."""

from __future__ import annotations

import re
from typing import Any

import cachix_console
from cachix_protocol import __version__

USAGE = """\
The self-hosted workspace of Cachix Deploy.

Usage:
  cachix-workspace serve [--listen=ADDRESS] [--public-url=URL] [--data=DIR] [--max-connections=N]
                         [--certificate=FILE --key=FILE] [--behind-proxy=N]
                         [--also-known-as=URL]... [--max-nar=GIB] [--keep-free=GIB]
                         [--cache-directory=DIR [--cache-shared] | --cache-store=URL]
                         [--max-log=MIB] [--auth-header=NAME] [--keep-deployments=N]
                         [--keep-days=DAYS] [--max-per-address=N]
                         [--database=URL | --database-file=FILE]
  cachix-workspace init [--data=DIR] [--database=URL | --database-file=FILE]
  cachix-workspace login-link [NAME] [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace person list [--json] [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace person add NAME --role=ROLE [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace person (link | remove) NAME [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace person role NAME ROLE [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace token create (agent | activate | admin | metrics)
                                [--description=TEXT] [--expires=DAYS] [--cache=NAME]
                                [--name=NAME | --names=PATTERNS | --agents=PATTERNS | --shared]
                                [--out=FILE | --names-from=FILE --out-dir=DIR] [--count=N]
                                [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace token list [--json] [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace token rotate ID [--out=FILE] [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace token revoke ID [--and-agents]
                         [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace agent list [--label=LABEL] [--state=STATE] [--json]
                         [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace agent move NAME [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace agent (show | pause | resume | remove) NAME [--json]
                         [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace agent rename NAME NEW [--json] [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace agent label NAME [LABEL]... [--json]
                         [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace deployment list [--agent=NAME] [--limit=N] [--json]
                         [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace deployment (show | log | retry | cancel) AGENT INDEX [--json]
                         [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace run list [--limit=N] [--json] [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace run (show | retry) RUN [--json] [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace run rollback RUN [--yes] [--json]
                         [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace freeze REASON [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace thaw [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace webhook list [--json] [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace webhook add HOOK [--format=FORMAT] [--events=EVENTS] [--label=LABEL]
                         [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace webhook (test | remove) ID [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace cache list [--json] [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace cache create NAME [--private] [--out=FILE]
                         [[--public-url=URL] [--data=DIR] | --url=URL [--token-file=FILE]]
  cachix-workspace cache show NAME [--json] [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace cache key (rotate | retire) NAME [--out=FILE]
                         [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace cache gc NAME [--keep-deployments=N] [--keep-days=DAYS] [--dry-run] [--json]
                         [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace cache (pin | unpin) NAME PATH [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace audit [--limit=N] [--json] [--data=DIR | --url=URL [--token-file=FILE]]
  cachix-workspace prune [--keep-deployments=N] [--keep-days=DAYS] [--dry-run] [--data=DIR]
  cachix-workspace backup DIR [--data=DIR]
  cachix-workspace restore DIR [--data=DIR] [--database=URL | --database-file=FILE]
  cachix-workspace migrate-database (--to=URL | --database-file=FILE) [--data=DIR]
  cachix-workspace --help
  cachix-workspace --version

Commands:
  serve         Serve agents, CI, the dashboard and the binary caches.
  init          Make a workspace. Only this and `serve` do.
  login-link    Print a link that signs in the first admin, or the person NAME, once.
  person        The people who may sign in: viewers read, operators also deploy, admins do all.
  token create  Create a token for agents, for CI (activate), for an administrator (admin),
                or to read /metrics, and print it. It is not shown again.
  token list    List the tokens, without their secrets.
  token rotate  Create the successor of a token, and print it. The old one ends when the new one is
                used first (one of agents: for each agent by itself), after 7 days at the latest.
  token revoke  Revoke a token. A running server closes its connections within seconds.
  agent         List, show, pause, resume, label, rename or remove agents. While an agent is
                paused its deployments wait.
  deployment    List and show deployments and their logs, retry or cancel one.
  run           List, show, retry or roll back runs: a run is what one order deployed.
  freeze        Take no orders until `thaw`. They are refused with the reason.
  webhook       Who is told of failures, and of agents that are offline.
  agent move    Let another machine have the name of an agent that keeps a token of its own, because
                the former machine was reinstalled or is gone.
  cache create  Create a binary cache, and print the secret key to sign with. It is not shown
                again. A push signs with it.
  cache show    Show the URL and the public keys of a cache.
  cache key     rotate: make a new key for a cache, and print the secret one. Both keys count until
                the old one is retired: then no agent takes what only that has signed.
  cache gc      Remove store paths, and print them, that nothing needs: no agent, none of its last
                deployments, no pin, no late push. It works beside a running server.
  cache pin     Keep a store path with all that it needs; `unpin` lets go of it.
  audit         Show who did what when.
  prune         Remove old deployments with their logs, and write logs into less room. `serve` does
                so every night. Open deployments stay, and so do the last deployment of each
                agent and the last two paths that it succeeded with.
  backup        Copy database and caches into DIR, a new directory, beside a running server. Files
                of caches become hard links where DIR is on the same file system.
  restore       Make a workspace of the backup in DIR. Then start the server.
  migrate-database  Move the database from SQLite into an empty one of PostgreSQL, while the server
                is stopped. The data directory names it from then on.

Options:
  --data=DIR           The directory of the workspace. By default it is CACHIX_WORKSPACE_DATA, else
                       STATE_DIRECTORY, and for root /var/lib/cachix-workspace.
  --database=URL       Keep the database in PostgreSQL, such as postgresql+psycopg://USER@HOST/NAME,
                       not in a file of DIR. DIR names it from then on. A URL with a password
                       belongs in a file, or in CACHIX_WORKSPACE_DATABASE.
  --database-file=FILE  The file that has the URL, read at each start.
  --to=URL             The database to move to: as --database.
  --url=URL            Work from afar, on the workspace at this URL,
  --token-file=FILE    with the admin token in FILE, or in CACHIX_WORKSPACE_TOKEN; for agents,
                       deployments and runs one of CI will do.
  --listen=ADDRESS     HOST:PORT; port 0 picks a free one [default: 127.0.0.1:8080].
  --public-url=URL     The URL by which agents and CI reach the workspace. `serve` defaults to the
                       address it listens on, `cache create` to the URL that `serve` last used.
  --also-known-as=URL  A further URL of the workspace, such as one inside of the network. May be
                       repeated. Agents get the URL of their cache with the host that they came by,
                       if it is in one of these, else the public one.
  --behind-proxy=N     N proxies stand in front, and each adds what it has seen to X-Forwarded-For,
                       X-Forwarded-Proto and X-Forwarded-Host. With 0 nobody's are believed
                       [default: 0].
  --auth-header=NAME   The header in which such a proxy names who is signed in: a person of that
                       name. The proxy must overwrite what clients send.
  --certificate=FILE   Speak TLS, without a proxy: a PEM file with the certificate and the ones
                       that it is signed by. A renewed file is used at once.
  --key=FILE           Its private key, a PEM file without a password.
  --max-connections=N  Connections at a time, by default 16000, or fewer where the system allows
                       fewer open files. Three quarters of them may be websockets.
  --max-per-address=N  Connections of one address that have not shown a valid token: for a newer
                       one the oldest has to go. 0 for any number. Behind a proxy, which has one
                       address for all, it does not count [default: 512].
  --max-nar=GIB        The largest NAR that a cache takes. The unfinished uploads of one token may
                       have four times as much [default: 10].
  --cache-directory=DIR  Keep the files of caches in DIR, from now on, and not in the directory of
                       the workspace. Move the present ones there before.
  --cache-shared       Other nodes of the workspace, with the same database, use that directory
                       too: it is on a file system that they share.
  --cache-store=URL    Keep them in a bucket of S3, or of a server that speaks its protocol, such as
                       s3://BUCKET/PREFIX?endpoint=https://s3.example.org&region=REGION.
  --keep-free=GIB      No cache takes anything that would leave less of the disk free. They can
                       still be read [default: 1].
  --max-log=MIB        The largest log of a deployment. The rest is dropped, and the log says so
                       [default: 64].
  --keep-deployments=N  The number of deployments to keep of each agent, by default all; `cache gc`
                       keeps the paths of the last N, by default of 5.
  --keep-days=DAYS     How long to keep deployments, by default without end; `cache gc` keeps what
                       was pushed in the last DAYS days, by default 7, and 1 at least.
  --dry-run            Remove nothing, and say what would be removed.
  --description=TEXT   What the token is for.
  --expires=DAYS       The token expires after so many days. By default it never does.
  --name=NAME          The only agent that an agent token is for. By default it is the first one
                       that connects with it, if its name is new.
  --shared             Any agent may use the token, and take the place of another one by its name.
  --names=PATTERNS     The agents that an agent token is for, such as web,db-* or *. It is an
                       enrolment token: each agent of cachix-deploy that comes with it gets a token
                       of its own, keeps it, and from then on nobody else can use its name.
  --count=N            The number of agents that may enrol; by default any.
  --and-agents         Also revoke the tokens that agents got for this enrolment token.
  --agents=PATTERNS    The agents that another token may deploy to. By default it may to all.
  --out=FILE           Write the secret into FILE, which is made anew, and only you can read.
  --names-from=FILE    Make a token for each agent that FILE names, a line each, in files below
  --out-dir=DIR        DIR that have the agents' names (for sops or agenix).
  --cache=NAME         The only binary cache that the token is for. Agents use it; by default they
                       use the oldest one.
  --private            Only requests with a token may read the cache.
  --role=ROLE          viewer, operator or admin.
  --agent=NAME         The agent whose deployments are listed.
  --yes                Do it without asking.
  --format=FORMAT      json (signed), slack (Mattermost too) or ntfy [default: json].
  --events=EVENTS      Of failed,rollback-failed,offline,back; all by default.
  --label=LABEL        The agents that are listed, or that a webhook is about: those with this
                       label.
  --state=STATE        The agents that are listed: rollback-failed, lost, failed, under-way,
                       offline, never, by-hand, reboot-needed, well or paused.
  --limit=N            The number of entries, the newest ones [default: 100].
  --json               Print JSON.
  -h --help            Show this text.
  --version            Show the version.

The commands work beside a running server. Exit status: 0 done; 1 failed; 64 wrong usage.
"""


def parse(argv: list[str]) -> dict[str, Any]:
    """The command line as a dictionary. Raises UsageError, or SystemExit for --help."""
    return cachix_console.parse(argv, USAGE, __version__, explain)


def command_forms() -> list[tuple[tuple[str, ...], list[str]]]:
    """The forms of the usage text: the words of the command, and its lines.

    A form such as `agent (show | pause) NAME` counts for each of its commands.
    """
    forms: list[tuple[tuple[str, ...], list[str]]] = []
    for line in USAGE.split("Usage:\n")[1].split("\n\n")[0].splitlines():
        match = re.match(
            r"  cachix-workspace ([a-z][a-z-]*)(?: \(([a-z| -]+)\)| ([a-z-]+)\b)?", line
        )
        if match:
            commands = match[2].split(" | ") if match[2] else filter(None, [match[3]])
            words: list[tuple[str, ...]] = [(match[1], command) for command in commands]
            lines = [line]
            forms += [(each, lines) for each in words or [(match[1],)]]
        elif line.startswith("    "):
            forms[-1][1].append(line)
    return forms


def explain(words: list[str]) -> str:
    """Why a command line fits no form. Arguments are not shown: they may be a token."""
    group, command = _commands(words)
    groups = list(dict.fromkeys(form[0] for form, _ in command_forms()))
    commands = [form[1] for form, _ in command_forms() if form[0] == group and len(form) > 1]
    if group is None:
        return f"missing command: {', '.join(groups[:-1])} or {groups[-1]}"
    if group not in groups:
        return f"unknown command{_shown(group)}; there are: {', '.join(groups)}"
    if not commands or command in commands:
        name = " ".join(filter(None, (group, command if commands else None)))
        return f"missing or unexpected arguments for `{name}`"
    if command is None:
        return f"missing command after `{group}`; {group} has: {', '.join(commands)}"
    return f"unknown command{_shown(group, command)}; {group} has: {', '.join(commands)}"


def fitting_lines(words: list[str]) -> list[str]:
    """The lines of the usage text for the command of a command line, else for its group."""
    group, command = _commands(words)
    mine = [(form, lines) for form, lines in command_forms() if form[0] == group]
    exact = [(form, lines) for form, lines in mine if form == (group, command)]
    matches = {id(lines): lines for _, lines in exact or mine}
    return [line for lines in matches.values() for line in lines]


def _commands(words: list[str]) -> tuple[str | None, str | None]:
    """The words at the places of the group and of its command."""
    names = [word for word in words if not word.startswith("-")]
    return (*names, None, None)[0], (*names, None, None)[1]


def _shown(*names: str) -> str:
    """The names, quoted, if they look like commands."""
    plain = all(re.fullmatch("[a-z]{1,16}", name) for name in names)
    return f" `{' '.join(names)}`" if plain else ""
