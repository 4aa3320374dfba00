"""Log lines for people: pages of a log, colours, search. Control characters are removed.

A log has up to hundreds of thousands of lines, and a line up to megabytes: a page has some of them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from ansi2html import Ansi2HTMLConverter
from markupsafe import Markup
from sqlalchemy import Connection, select

from cachix_protocol import loads
from cachix_workspace import logs
from cachix_workspace.tables import log_chunks

PAGE = 500  # lines
LONGEST = 4000  # characters of a line on a page
LOOK_BACK = 300  # lines before a page that may have set a colour which still holds
MOST_FOUND = 200
MOST_CHUNKS = 400  # that a search reads
UNSEEN = "\N{REPLACEMENT CHARACTER}"
# OSC, DCS, SOS, PM and APC, with all that they carry
STRINGS = re.compile("(?:\x1b[\\]PX^_]|[\x90\x98\x9d-\x9f]).*?(?:\x07|\x1b\\\\|\x9c|$)")
OTHERS = re.compile("\x1b\\[[0-?]*[ -/]*[@-ln-~]|\x1b[^\\[]|\x1b$|\x9b[0-?]*[ -/]*[@-~]?")
COLOUR = re.compile("\x1b\\[([0-9;:]*)m")
CONTROLS = re.compile("[\x00-\x08\x0a-\x1a\x1c-\x1f\x7f-\x9f]")
HIDDEN = re.compile("[\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]")
MAY_BE = re.compile("error:|failed|cannot|fatal", re.IGNORECASE)  # in JSON, colours and all
ERROR = re.compile(r"\berror:|\bfailed\b|\bcannot\b|\bfatal\b", re.IGNORECASE)


@dataclass(frozen=True)
class Line:
    """A line on a page: its number from 1, its markup, and how many characters were left out."""

    number: int
    time: str
    markup: Markup
    left_out: int
    is_error: bool


@dataclass(frozen=True)
class Match:
    """A line that has what was looked for."""

    number: int
    text: str


def cleaned(text: str) -> str:
    """A line without what a terminal obeys, but for colours."""
    text = STRINGS.sub("", text)
    text = OTHERS.sub("", text)
    text = COLOUR.sub(lambda match: match[0] if len(match[1]) < 40 else "", text)
    text = re.sub("\x1b(?!\\[[0-9;:]*m)", "", text)
    return HIDDEN.sub(UNSEEN, CONTROLS.sub(UNSEEN, text))


def bare(text: str) -> str:
    """A line without colours too."""
    return COLOUR.sub("", cleaned(text))


def active(colours: str, text: str) -> str:
    """The colours that hold after a line, where `colours` held before it."""
    for match in COLOUR.finditer(text):
        colours = "" if match[1] in ("", "0", "00") else colours + match[0]
    return colours[-200:] if colours.count("m") < 20 else ""


def read_lines(connection: Connection, deployment_id: str, start: int, count: int) -> list[str]:
    """`count` stored lines from `start` on (from 0), fewer at the end."""
    lines: list[str] = []
    while len(lines) < count:
        batch = logs.read(connection, deployment_id, start + len(lines))
        if not batch:
            break
        lines += batch[: count - len(lines)]
    return lines


def page(connection: Connection, deployment_id: str, start: int, count: int = PAGE) -> list[Line]:
    """The lines of a page that begins with the line `start` (from 0)."""
    back = min(LOOK_BACK, start)
    stored = read_lines(connection, deployment_id, start - back, back + count)
    converter = Ansi2HTMLConverter(inline=False, escaped=True)
    colours, lines = "", []
    for number, text in enumerate(stored, start - back + 1):
        record = loads(text)
        whole = str(record["line"])
        line = cleaned(whole[:LONGEST])
        if number > start:
            markup = Markup(converter.convert(colours + line, full=False).rstrip("\n"))
            left_out = max(0, len(whole) - LONGEST)
            is_error = ERROR.search(line) is not None
            lines.append(Line(number, str(record["time"]), markup, left_out, is_error))
        colours = active(colours, line)
    return lines


def first_error(connection: Connection, deployment_id: str, lines: int) -> int | None:
    """The index of the first line that looks like an error, in the last 5,000 lines."""
    start = max(0, lines - 5000)
    for index, text in enumerate(read_lines(connection, deployment_id, start, 5000), start):
        if MAY_BE.search(text) and ERROR.search(bare(str(loads(text)["line"])[:LONGEST])):
            return index
    return None


def search(connection: Connection, deployment_id: str, wanted: str) -> list[Match]:
    """The first lines that have this text, in upper or lower case."""
    escaped = json.dumps(wanted, ensure_ascii=False)[1:-1]
    pattern = re.sub(r"([\\%_])", r"\\\1", escaped)
    mine = log_chunks.c.deployment_id == deployment_id
    matches = log_chunks.c.body.ilike(f"%{pattern}%", escape="\\")
    query = select(log_chunks).where(mine & matches).order_by(log_chunks.c.first)
    hits: list[Match] = []
    with connection.execute(query.limit(MOST_CHUNKS)) as chunks:
        for chunk in chunks:
            for index, text in enumerate(chunk.body.split("\n"), chunk.first + 1):
                line = bare(str(loads(text)["line"]))
                at = line.lower().find(wanted.lower())
                if at >= 0:
                    hits.append(Match(index, line[max(0, at - 100) : at + 300]))
                if len(hits) >= MOST_FOUND:
                    return hits
    return hits
