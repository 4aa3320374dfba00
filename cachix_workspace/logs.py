"""The logs of deployments: lines in chunks, appended by their offset, read while they grow."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, func, insert, select, update

from cachix_protocol import FAILURE_LINE, SUCCESS_LINE, LogLine, Undecodable, dumps, loads
from cachix_workspace.deployments import Record
from cachix_workspace.tables import deployments, log_chunks

CHUNK_LINES = 1000
CHUNK_CHARACTERS = 1 << 18
BATCH_CHARACTERS = 1 << 20  # what a reader gets at a time
BATCH_ROWS = 256


class Gap(Exception):
    """Lines were left out; `next` is the offset to go on at."""

    def __init__(self, next_offset: int) -> None:
        super().__init__(next_offset)
        self.next = next_offset


def decode(text: object) -> str:
    """A line as it is stored: its JSON without anything that the protocol does not name. Raises Undecodable."""
    record = LogLine.from_json(loads(text if isinstance(text, (str, bytes)) else b""))
    line = dumps(record.to_json())
    return line.encode(
        "utf-8", "replace"
    ).decode()  # JSON may escape half a surrogate pair, UTF-8 can't


def decode_many(body: bytes) -> list[str]:
    """The lines of a request. Raises Undecodable that counts the line."""
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


def append(connection: Connection, record: Record, offset: int | None, lines: Sequence[str]) -> int:
    """Store those of `lines` (the first has index `offset`) that are new; the next index. None: they are all new.

    `record` must have been read, locked, in this transaction. Raises Gap.
    """
    following = record.log_next
    if offset is not None:
        if offset > following:
            raise Gap(following)
        lines = lines[following - offset :]
    for chunk in chunks(lines):
        values = {
            "deployment_id": record.id,
            "first": following,
            "count": len(chunk),
            "body": "\n".join(chunk),
        }
        connection.execute(insert(log_chunks).values(**values))
        following += len(chunk)
    if lines:
        connection.execute(
            update(deployments).where(deployments.c.id == record.id).values(log_next=following)
        )
    return following


def chunks(lines: Sequence[str]) -> list[list[str]]:
    """`lines` in pieces that are small enough to be read one by one (a single line may be longer)."""
    pieces: list[list[str]] = []
    size = 0
    for line in lines:
        if not pieces or len(pieces[-1]) >= CHUNK_LINES or size + len(line) > CHUNK_CHARACTERS:
            pieces.append([])
            size = 0
        pieces[-1].append(line)
        size += len(line)
    return pieces


def read(connection: Connection, deployment_id: str, offset: int) -> list[str]:
    """Some of the lines from `offset` on, about BATCH_CHARACTERS; none at the end."""
    mine = log_chunks.c.deployment_id == deployment_id
    first = (
        select(func.max(log_chunks.c.first))
        .where(mine & (log_chunks.c.first <= offset))
        .scalar_subquery()
    )
    query = select(log_chunks).where(mine & (log_chunks.c.first >= func.coalesce(first, 0)))
    lines: list[str] = []
    size = 0
    with connection.execute(query.order_by(log_chunks.c.first).limit(BATCH_ROWS)) as rows:
        for row in rows:
            lines += row.body.split("\n")[max(0, offset - row.first) :]
            size += len(row.body)
            if size >= BATCH_CHARACTERS:
                break
    return lines


def is_closing(line: str) -> bool:
    """Whether a stored line is one of the two that end the log of an agent."""
    return loads(line)["line"].startswith((SUCCESS_LINE, FAILURE_LINE))  # type: ignore[no-any-return]
