"""The logs of deployments: lines in chunks, appended by their offset, read while they grow."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Sequence

from sqlalchemy import Connection, bindparam, func, insert, select, update

from cachix_protocol import (
    FAILURE_LINE,
    SUCCEEDED,
    SUCCESS_LINE,
    TERMINAL,
    LogLine,
    Undecodable,
    dumps,
    loads,
    utc_now,
)
from cachix_workspace.database import Database
from cachix_workspace.deployments import DeploymentRow
from cachix_workspace.settings import Settings
from cachix_workspace.tables import deployments, log_chunks

CHUNK_LINES = 1000
CHUNK_CHARACTERS = 1 << 18
BATCH_CHARACTERS = 1 << 20  # a reader gets about so many at a time
BATCH_ROWS = 256
LATE = datetime.timedelta(hours=24)  # after the end of a deployment, lines are taken for so long
MAX_CLOSING = 1 << 16  # characters of a closing line that comes beyond the limit

# A line in JSON that differs from what is stored by blanks at most, as nearly all do.
BARE, ESCAPE = r"[ !#-\[\]-~]*", r"\\(?:[\\\"bfnrt]|u00(?:0[0-7bef]|1[0-9a-f]))"
TEXT = f"({BARE}(?:{ESCAPE}{BARE})*)"
USUAL = re.compile(f'\\{{"line": ?"{TEXT}", ?"time": ?"{TEXT}"\\}}')
# Statements are made once: SQLAlchemy takes longer to make them than the database to obey.
OF_LOG = log_chunks.c.deployment_id == bindparam("log")
FIRST = select(func.max(log_chunks.c.first)).where(OF_LOG & (log_chunks.c.first <= bindparam("at")))
FROM_FIRST = log_chunks.c.first >= func.coalesce(FIRST.scalar_subquery(), 0)
CHUNKS = select(log_chunks.c.first, log_chunks.c.body).where(OF_LOG & FROM_FIRST)
NEXT = CHUNKS.order_by(log_chunks.c.first).limit(BATCH_ROWS)
CHUNK = insert(log_chunks)
GROWTH = update(deployments).where(deployments.c.id == bindparam("mine"))


class Gap(Exception):
    """Lines were left out. `next` is the offset to continue at."""

    def __init__(self, next_offset: int) -> None:
        super().__init__(next_offset)
        self.next = next_offset


class Closed(Exception):
    """No more lines are taken. `next` is the offset after those that were."""

    def __init__(self, next_offset: int) -> None:
        super().__init__(next_offset)
        self.next = next_offset


def decode(text: object) -> str:
    """A line as it is stored: its JSON, with the names of the protocol only. Raises Undecodable."""
    if isinstance(text, bytes) and text.isascii():
        text = text.decode("ascii")
    if isinstance(text, str) and (usual := USUAL.fullmatch(text)):
        return f'{{"line":"{usual[1]}","time":"{usual[2]}"}}'
    record = LogLine.from_json(loads(text if isinstance(text, (str, bytes)) else b""))
    line = dumps(record.to_json())
    # JSON may escape half a surrogate pair, which UTF-8 can't encode
    return line.encode("utf-8", "replace").decode()


def decode_many(body: bytes) -> list[str]:
    """The lines of a request. Raises Undecodable that names the line by its number."""
    texts = body.split(b"\n")
    if texts[-1] == b"":
        texts.pop()
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            lines.append(decode(text))
        except Undecodable as error:
            raise Undecodable(f"line {number}: {error}") from None
    return lines


def append(
    connection: Connection,
    deployment: DeploymentRow,
    offset: int | None,
    lines: Sequence[str],
    most: int = Settings.max_log,
) -> int:
    """Take the new ones of `lines`; the index that follows them. Raises Gap or Closed.

    `offset` is the index of the first line; None if all are new. At most `most` bytes are stored:
    the rest of the lines that go beyond them is dropped, and of later ones only a closing line is
    taken. `deployment` must have been read, and locked, in this transaction.
    """
    following = taken(deployment)
    if offset is not None:
        if offset > following:
            raise Gap(following)
        lines = lines[following - offset :]
    if not lines:
        return following
    if _is_closed(connection, deployment):
        raise Closed(following)
    kept, dropped = _kept(connection, deployment, lines, most)
    if not kept:  # the log is full
        raise Closed(following)
    first = deployment.log_next
    for chunk in split(kept):
        body = "\n".join(chunk)
        values = {"deployment_id": deployment.id, "first": first, "count": len(chunk), "body": body}
        connection.execute(CHUNK, values)
        first += len(chunk)
    following += len(lines)
    size = (deployment.log_size or 0) + sum(map(_size, kept))
    changes = {"log_next": first, "log_size": size}
    if dropped:
        changes["log_dropped"] = following - first
    connection.execute(GROWTH, {"mine": deployment.id, **changes})
    return following


def finish(connection: Connection, deployment: DeploymentRow) -> None:
    """Give a full log its closing line, for whoever follows: its agent was told to send no more.

    `deployment` has ended, and must have been read, and locked, in this transaction.
    """
    if deployment.log_dropped is None or _has_end(connection, deployment):
        return
    append(connection, deployment, None, [_closing(deployment)], 0)


def _closing(deployment: DeploymentRow) -> str:
    """The closing line of a deployment that has ended."""
    is_success = deployment.status == SUCCEEDED
    line = SUCCESS_LINE if is_success else f"{FAILURE_LINE} {deployment.reason or ''}"
    text = " ".join(line.split())[: MAX_CLOSING // 8]  # JSON may take six for each
    return dumps(LogLine(text, utc_now()).to_json())


def taken(deployment: DeploymentRow) -> int:
    """The number of lines that the agent has sent, whether they are stored or not."""
    return deployment.log_next + (deployment.log_dropped or 0)


def _size(line: str) -> int:
    """The bytes that a line takes."""
    return (len(line) if line.isascii() else len(line.encode())) + 1


def _has_end(connection: Connection, deployment: DeploymentRow) -> bool:
    """Whether the last line that is stored is a closing one."""
    if not deployment.log_next:
        return False
    return is_closing(read(connection, deployment.id, deployment.log_next - 1)[-1])


def _is_closed(connection: Connection, deployment: DeploymentRow) -> bool:
    """Whether the log takes no more lines: its last one is there, or the end is too long ago."""
    if deployment.status not in TERMINAL:
        return False
    moment = datetime.datetime.now(datetime.timezone.utc) - LATE
    ended = deployment.ended_on or deployment.finished_on or ""
    is_late = ended < moment.strftime("%Y-%m-%dT%H:%M:%S")
    return is_late or _has_end(connection, deployment)


def _kept(
    connection: Connection, deployment: DeploymentRow, lines: Sequence[str], most: int
) -> tuple[list[str], bool]:
    """The lines to store, and whether others are dropped.

    A line says so, once. A closing line is stored all the same, as whoever follows waits for it.
    """
    kept, left = [], most - (deployment.log_size or 0)
    is_whole = deployment.log_dropped is None
    for line in lines if is_whole else []:
        left -= _size(line)
        if left < 0:
            break
        kept.append(line)
    rest, end = list(lines[len(kept) :]), []
    is_end = bool(rest) and len(rest[-1]) <= MAX_CLOSING and is_closing(rest[-1])
    if is_end and (kept or not _has_end(connection, deployment)):
        end = [rest.pop()]
    elif rest and deployment.status in TERMINAL:  # the agent is told to send no more
        end = [_closing(deployment)]
    note = [_note(most)] if rest and is_whole else []
    return [*kept, *note, *end], bool(rest)


def _note(most: int) -> str:
    """The line that says that others are dropped."""
    size = f"{round(most / (1 << 20), 3):g} MiB"
    line = f"the workspace keeps {size} of a log, which this one has reached: the rest is dropped"
    return dumps(LogLine(line, utc_now()).to_json())


def split(lines: Sequence[str]) -> list[list[str]]:
    """`lines` in chunks of bounded size. A single line may be larger than a chunk."""
    chunks: list[list[str]] = []
    size = 0
    for line in lines:
        if not chunks or len(chunks[-1]) >= CHUNK_LINES or size + len(line) > CHUNK_CHARACTERS:
            chunks.append([])
            size = 0
        chunks[-1].append(line)
        size += len(line)
    return chunks


def read(connection: Connection, deployment_id: str, offset: int) -> list[str]:
    """The next lines from `offset` on, about BATCH_CHARACTERS of them; none at the end."""
    lines: list[str] = []
    size = 0
    with connection.execute(NEXT, {"log": deployment_id, "at": offset}) as rows:
        for row in rows:
            lines += row.body.split("\n")[max(0, offset - row.first) :]
            size += len(row.body)
            if size >= BATCH_CHARACTERS:
                break
    return lines


def is_closing(line: str) -> bool:
    """Whether a stored line is one of the two with which agents end a log."""
    return str(loads(line)["line"]).startswith((SUCCESS_LINE, FAILURE_LINE))


def stream(database: Database, deployment_id: str) -> Iterator[bytes]:
    """The log as text, each line as the agent sent it, a part at a time."""
    offset = 0
    while True:
        with database.read() as connection:
            lines = read(connection, deployment_id, offset)
        if not lines:
            return
        offset += len(lines)
        yield "".join(f"{loads(line)['line']}\n" for line in lines).encode("utf-8", "replace")
