"""The names that all templates have: the frame, and filters for times, paths, sizes and text."""

from __future__ import annotations

import datetime
import hashlib
import re
from pathlib import Path
from typing import Any

from flask import Flask, Response, make_response, render_template
from markupsafe import Markup, escape

from cachix_protocol import __version__
from cachix_workspace import freeze
from cachix_workspace.context import current_workspace
from cachix_workspace.database import get_meta
from cachix_workspace.pages.access import viewer
from cachix_workspace.sentences import lasting

STATIC = Path(__file__).parent.parent / "static"
STORE_PATH = re.compile(r"(?:/nix/store/)?([0-9a-z]{32})-(.+)")
# what turns text around or hides it: bidi controls, zero-width characters, tags
HIDDEN = re.compile("[\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]")
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
UNSEEN = "\N{REPLACEMENT CHARACTER}"  # stands for what one would not see
UNITS = ("B", "kB", "MB", "GB", "TB")


def page(template: str, status: int = 200, topics: str = "", **values: Any) -> Response:
    """A page from a template. It is drawn anew when one of the feed's `topics` changes."""
    workspace = current_workspace()
    since = workspace.feed.last  # before anything is read: what changes meanwhile is told
    with workspace.database.read() as connection:
        name = get_meta(connection, "name") or "workspace"
        frozen = freeze.get(connection)
    frame = {"viewer": viewer(), "name": name, "frozen": frozen, "topics": topics, "since": since}
    text = render_template(template, **frame, version=__version__, **values)
    return make_response(text, status)


def prepare(app: Flask) -> None:
    """Give an application's templates their filters."""
    for function in (is_older, ago, code, exact, lines, store_name, store_hash, since, size, plain):
        app.jinja_env.filters[function.__name__] = function
    app.jinja_env.filters["span"] = lasting
    app.jinja_env.globals["static"] = static_url
    app.jinja_env.trim_blocks = app.jinja_env.lstrip_blocks = True


def static_url(name: str) -> str:
    """The address of a static file, which changes with its contents."""
    return f"/static/{_hash_of(name)}/{name}"


def _hash_of(name: str) -> str:
    return hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:12]


def moment(time: str) -> datetime.datetime:
    """A time of the protocol."""
    text = re.sub(r"(\.\d{1,6})\d*Z$", r"\1Z", time).replace("Z", "+00:00")
    text = re.sub(r"\.(\d{1,5})(?=\+)", lambda match: "." + match[1].ljust(6, "0"), text)
    return datetime.datetime.fromisoformat(text)


def exact(time: str | None) -> str:
    """A time to the second, in UTC."""
    return "" if not time else f"{time[:10]} {time[11:19]} UTC"


def ago(time: str | None) -> Markup:
    """A time relative to now, with the exact one on hover; the script keeps it up to date."""
    if not time:
        return Markup("")
    then = moment(time)
    seconds = (datetime.datetime.now(datetime.timezone.utc) - then).total_seconds()
    return Markup('<time datetime="{}" title="{}">{}</time>').format(
        time, exact(time), relative(seconds)
    )


def since(seconds: float) -> Markup:
    """Seconds since 1970, as `ago` does."""
    then = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return ago(then.strftime("%Y-%m-%dT%H:%M:%SZ"))


def relative(seconds: float) -> str:
    """A span in words, with one unit: `5 min ago`, `in 3 days`."""
    span_ = abs(seconds)
    if span_ < 10:
        return "just now"
    for limit, unit, word in (
        (60, 1, "s"),
        (3600, 60, "min"),
        (86_400, 3600, "h"),
        (30 * 86_400, 86_400, "days"),
        (365 * 86_400, 30 * 86_400, "months"),
        (float("inf"), 365 * 86_400, "years"),
    ):
        if span_ < limit:
            count = int(span_ // unit)
            word = word[:-1] if count == 1 and word.endswith("s") and len(word) > 1 else word
            return f"in {count} {word}" if seconds < 0 else f"{count} {word} ago"
    return ""


def store_name(path: str | None) -> str:
    """The name in a store path, without hash."""
    match = STORE_PATH.fullmatch(path or "")
    return plain(match[2] if match else path or "")


def store_hash(path: str | None) -> str:
    """The first characters of the hash in a store path."""
    match = STORE_PATH.fullmatch(path or "")
    return match[1][:8] if match else ""


def size(count: int | None) -> str:
    """A number of bytes."""
    if count is None:
        return ""
    number, unit = float(count), 0
    while number >= 1000 and unit < len(UNITS) - 1:
        number, unit = number / 1000, unit + 1
    digits = 0 if number >= 10 or unit == 0 else 1
    return f"{number:.{digits}f} {UNITS[unit]}"


def plain(text: str | None) -> str:
    """Text from agents or CI without what hides or turns text: one can see what it says."""
    return HIDDEN.sub(UNSEEN, CONTROLS.sub(UNSEEN, text or ""))


def is_older(version: str, than: str) -> bool:
    """Whether a release such as 0.9.1 is older than another one, as far as their numbers tell."""
    mine, other = (
        [int(part) for part in re.findall(r"[0-9]{1,6}", one)] for one in (version, than)
    )
    return bool(mine) and mine < other


def lines(text: str | None) -> str:
    """Text of several lines without what hides or turns text."""
    return "\n".join(plain(line) for line in (text or "").splitlines())


def code(text: str) -> Markup:
    """Text in which what stands between backticks is code."""
    parts = str(escape(text)).split("`")
    if len(parts) % 2 == 0:
        return Markup(str(escape(text)))
    marked = [f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts)]
    return Markup("".join(marked))
