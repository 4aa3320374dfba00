"""The logs of deployments: lines in chunks, appended by their offset, read while they grow."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, func, insert, select, update

from cachix_protocol import FAILURE_LINE, SUCCESS_LINE, LogLine, Undecodable, dumps, loads
from cachix_workspace.deployments import DeploymentRow
from cachix_workspace.tables import deployments, log_chunks

CHUNK_LINES = 1000
CHUNK_CHARACTERS = 1 << 18
BATCH_CHARACTERS = 1 << 20  # a reader gets about so many at a time
BATCH_ROWS = 256


class Gap(Exception):
    """Lines were left out. `next` is the offset to continue at."""

    def __init__(self, next_offset: int) -> None:
        super().__init__(next_offset)
        self.next = next_offset


def decode(text: object) -> str:
    """A line as it is stored: its JSON, with the names of the protocol only. Raises Undecodable."""
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
    connection: Connection, deployment: DeploymentRow, offset: int | None, lines: Sequence[str]
) -> int:
    """Store the new ones of `lines`; the index that follows them. Raises Gap.

    `offset` is the index of the first line; None if all are new. `deployment` must have been read,
    and locked, in this transaction.
    """
    following = deployment.log_next
    if offset is not None:
        if offset > following:
            raise Gap(following)
        lines = lines[following - offset :]
    for chunk in split(lines):
        query = insert(log_chunks).values(
            deployment_id=deployment.id,
            first=following,
            count=len(chunk),
            body="\n".join(chunk),
        )
        connection.execute(query)
        following += len(chunk)
    if lines:
        mine = deployments.c.id == deployment.id
        connection.execute(update(deployments).where(mine).values(log_next=following))
    return following


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
    mine = log_chunks.c.deployment_id == deployment_id
    before = mine & (log_chunks.c.first <= offset)
    first = select(func.max(log_chunks.c.first)).where(before).scalar_subquery()
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
    """Whether a stored line is one of the two with which agents end a log."""
    return str(loads(line)["line"]).startswith((SUCCESS_LINE, FAILURE_LINE))
