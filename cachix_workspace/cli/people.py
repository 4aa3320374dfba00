"""The commands `person`, `login-link`, `webhook`, `freeze`, `thaw` and `init`."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from cachix_console import tell
from cachix_protocol import UsageError
from cachix_workspace.cli.backend import backend
from cachix_workspace.cli.fleet import number_of
from cachix_workspace.cli.output import show, show_json, show_table
from cachix_workspace.cli.place import note_database, open_workspace, operator


def init(options: dict[str, Any]) -> None:
    """Make a workspace, unless there is one."""
    _, settings = open_workspace(options, create=True)
    note_database(options)
    tell(f"there is a workspace in {settings.data}")


def login_link(options: dict[str, Any]) -> None:
    """Print a link by which an admin, or the person of a name, signs in."""
    if options["NAME"] or options["--url"]:
        name = options["NAME"]
        if not name:
            raise UsageError("from afar, name the person: `cachix-workspace login-link NAME`")
        show(backend(options).call("POST", f"/people/{quote(name, safe='')}/link")["link"])
        return
    from cachix_workspace import audit, people

    database, settings = open_workspace(options)
    with database.write() as connection:
        person = people.first_admin(connection)
        secret = people.make_link(connection, person)
        audit.record(connection, operator(), "login link", person.name)
    minutes = people.LINK_LASTS.total_seconds() / 60
    tell(f"this signs in {person.name}, once, within {minutes:.0f} minutes:")
    show(f"{settings.public_url}/sign-in/{secret}")


def person(options: dict[str, Any]) -> None:
    """Run one of the commands about people. Raises Error."""
    where, name = backend(options), options["NAME"]
    path = f"/people/{quote(name or '', safe='')}"
    if options["list"]:
        people = where.call("GET", "/people")["people"]
        if options["--json"]:
            show_json(people)
        else:
            rows = [[one["name"], one["role"], one["createdOn"][:10]] for one in people]
            show_table([["NAME", "ROLE", "SINCE"], *rows])
    elif options["add"]:
        answer = where.call("POST", "/people", {"name": name, "role": options["--role"]})
        tell(f"{name} is a person of role {answer['role']}, and signs in by this link, once:")
        show(answer["link"])
    elif options["link"]:
        show(where.call("POST", f"{path}/link")["link"])
    elif options["role"]:
        where.call("PATCH", path, {"role": options["ROLE"]})
        tell(f"{name} has the role {options['ROLE']}")
    else:
        where.call("DELETE", path)
        tell(f"{name} is removed, and signed out")


def webhook(options: dict[str, Any]) -> None:
    """Run one of the commands about webhooks. Raises Error."""
    where = backend(options)
    if options["list"]:
        webhooks = where.call("GET", "/webhooks")["webhooks"]
        if options["--json"]:
            show_json(webhooks)
            return
        table = [["ID", "FORMAT", "EVENTS", "LAST ANSWER", "URL"]]
        for one in webhooks:
            facts = [one["format"], ",".join(one["events"]), one["lastAnswer"] or "-"]
            table.append([str(one["id"]), *facts, one["url"]])
        show_table(table)
    elif options["add"]:
        body = {"url": options["HOOK"], "format": options["--format"], "label": options["--label"]}
        if options["--events"]:
            body["events"] = options["--events"].split(",")
        answer = where.call("POST", "/webhooks", body)
        tell(f"webhook {answer['id']}; this key signs its messages, and is not shown again:")
        show(answer["key"])
    else:
        number = number_of(options, "ID")
        if options["test"]:
            where.call("POST", f"/webhooks/{number}/test")
            tell("a test is sent; `cachix-workspace webhook list` shows the answer")
        else:
            where.call("DELETE", f"/webhooks/{number}")
            tell(f"webhook {number} is removed")


def freeze(options: dict[str, Any]) -> None:
    """Take no more orders, or take them again. Raises Error."""
    where = backend(options)
    if options["thaw"]:
        where.call("DELETE", "/freeze")
        tell("the workspace takes orders")
        return
    frozen = where.call("PUT", "/freeze", {"reason": options["REASON"]})
    tell(f"the workspace takes no orders: {frozen['reason']}")
