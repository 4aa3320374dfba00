"""A log of 200,000 lines: how long after the activation's end its last line is here.

The workspace is a thread of this process: of Cachix's frames it reads the heads only, and answers
pings; of reports by HTTP it counts the lines. An activation writes all lines as fast as `seq` does.
"""

from __future__ import annotations

import struct
import threading
import time
from typing import Any

import closures
from _figures import Light, directory, figure, say, spread
from caches import Cache
from hosts import Host
from peer import Answer, Connection

LINES = 200_000
ROUNDS = 3
TARGET = 1.5  # seconds; Cachix's compiled agent takes 1.6 and 4.9
STALL_TARGET = 0.5  # seconds from the end to its report while nobody answers to lines
PING, PONG, CLOSE = 9, "pong", 8


class Sink(Light):
    """A workspace that takes lines as fast as it can, and notes when the last one came."""

    def __init__(self, reports: str | None) -> None:
        super().__init__()
        self.reports = reports
        self.lines = 0
        self.last = 0.0
        self.stalls = threading.Event()  # cleared: lines get no answer
        self.stalls.set()

    def note(self, count: int) -> None:
        """Note that lines have come."""
        self.lines += count
        self.last = time.time()  # as the journal has it

    def _websocket(self, connection: Connection, kind: str) -> None:
        if "/log/" not in connection.path:
            super()._websocket(connection, kind)
            return
        connection.open = True
        buffer, connection.buffer = bytearray(connection.buffer), b""
        while block := connection.socket.recv(1 << 18):
            buffer += block
            start = 0
            while (end := whole(buffer, start)) is not None:
                opcode = buffer[start] & 15
                if opcode == PING:
                    connection.send(PONG, payload(buffer, start, end))
                elif opcode == CLOSE:
                    return
                else:
                    self.note(1)
                start = end
            del buffer[:start]

    def _take_log(self, deployment_id: str, offset: int, body: bytes) -> Answer:
        self.stalls.wait(60)
        self.note(body.count(b"\n"))
        return 200, {"next": self.lines}

    def _message(self, path: str, text: bytes) -> None:
        super()._message(path, text)
        if b"DeploymentFinished" in text:
            self.moment = time.monotonic()
            self.over.set()


def whole(buffer: bytearray, start: int) -> int | None:
    """Where the frame that begins here ends; None if it is not all here."""
    if len(buffer) < start + 14:
        size = buffer[start + 1] & 127 if len(buffer) >= start + 2 else 127
        if size > 125 or len(buffer) < start + 6 + size:
            return None
    size, head = buffer[start + 1] & 127, 6
    if size == 126:
        (size,), head = struct.unpack_from("!H", buffer, start + 2), 8
    elif size == 127:
        (size,), head = struct.unpack_from("!Q", buffer, start + 2), 14
    end = start + head + size
    return end if end <= len(buffer) else None


def payload(buffer: bytearray, start: int, end: int) -> bytes:
    """What a short masked frame says."""
    key, data = buffer[start + 2 : start + 6], buffer[start + 6 : end]
    return bytes(byte ^ key[index % 4] for index, byte in enumerate(data))


def measure(host: Host, name: str, reports: str | None, cache: Cache) -> list[float]:
    """Seconds from the activation's begin to the last line, in some rounds."""
    times: list[float] = []
    with Sink(reports) as sink:
        sink.cache = cache.wire()
        agent = host.agent(f"log-{name}", sink.url, f"log-{name}", f"log-{name}")
        agent.wait_for("is connected to")
        for number in range(ROUNDS):
            times.append(one(sink, host, closures.nixos(cache, number, closures.lines(LINES))))
        agent.stop()
    return times


def one(sink: Sink, host: Host, path: str) -> float:
    """Deploy; the seconds from the begin of the activation to the last line."""
    sink.lines = 0
    deployment_id, _, _ = sink.time(path)
    deadline = time.monotonic() + 60
    while sink.lines < LINES and time.monotonic() < deadline:
        time.sleep(0.02)
    assert sink.lines >= LINES, sink.lines
    times: dict[str, Any] = host.journal(deployment_id)["times"]
    began = float(times["activating"])
    return sink.last - began


def stalled(host: Host, cache: Cache) -> list[float]:
    """Seconds from an end to its report while the workspace does not answer to lines."""
    times: list[float] = []
    with Sink("http") as sink:
        sink.cache = cache.wire()
        agent = host.agent("log-stalled", sink.url, "log-stalled", "log-stalled")
        agent.wait_for("is connected to")
        for number in range(ROUNDS):
            sink.stalls.clear()
            deployment_id, _, _ = sink.time(closures.nixos(cache, number, closures.lines(1000)))
            came = time.time() - (time.monotonic() - sink.moment)
            ended: float = host.journal(deployment_id)["times"]["succeeded"]
            times.append(came - ended)
            sink.stalls.set()
        agent.stop()
    return times


def main() -> None:
    with directory() as place, Host(place / "host") as host:
        cache = Cache(place / "cache")
        for name, reports in (("hosted", None), ("ours", "http")):
            times = measure(host, name, reports, cache)
            say(f"{LINES} lines, the {name} protocol: {spread(times)} s to the last line")
            figure(
                f"{LINES} lines, the {name} protocol", sorted(times)[len(times) // 2], "s", TARGET
            )
        times = stalled(host, cache)
        say(f"an end whose log gets no answer: {spread(times)} s to its report")
        figure("an end whose log gets no answer", max(times), "s", STALL_TARGET)
        cache.close()


if __name__ == "__main__":
    main()
