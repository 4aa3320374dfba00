"""Ways to a database that lose all: rules of nftables that drop packets, a program that stops."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys

import pytest
from clusters import Cluster
from test_workspace_front import free_port
from workspace_support import DEADLINE, wait_for

PORT = 5432
TO, FROM = f"ip daddr {{}} tcp dport {PORT} drop", f"ip saddr {{}} tcp sport {PORT} drop"
WAYS = {"both": (TO, FROM), "to": (TO,), "from": (FROM,)}  # the ways on which packets are dropped


def address() -> str:
    """An address of this machine that nothing else uses."""
    return ".".join(map(str, (127, *(random.randint(1, 254) for _ in range(3)))))


def are_possible() -> bool:
    """Whether packets can be dropped."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    return os.geteuid() == 0 and shutil.which("nft", path=path) is not None


def require() -> None:
    """Skip a test where no packets can be dropped, except in a CI."""
    if are_possible():
        return
    hint = "root and nft are needed: `apt-get install nftables`"
    if os.environ.get("CI") == "true":
        raise AssertionError(hint)
    pytest.skip(hint)


def _url(url: str, host: str, port: int) -> str:
    """The URL of a database of a cluster by another way."""
    name = url.partition("@/")[2].partition("?")[0]
    return f"postgresql+psycopg://tests@{host}:{port}/{name}?sslmode=disable"


class Wire:
    """The way to a database that listens at `address`: packets on it can be dropped."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.table = f"inet cachix_tests_{os.getpid()}_{address.replace('.', '_')}"

    def url(self, url: str) -> str:
        """The URL of a database by this way."""
        return _url(url, self.address, PORT)

    def cut(self, ways: str = "both") -> None:
        """Drop packets: on both ways, or those `to` the database, or `from` it."""
        rules = [f"add rule {self.table} lost {rule.format(self.address)}" for rule in WAYS[ways]]
        chain = f"add chain {self.table} lost {{ type filter hook input priority 0; }}"
        _nft("\n".join([f"add table {self.table}", chain, *rules]))

    def mend(self) -> None:
        """Drop none any more."""
        _nft(f"add table {self.table}\ndelete table {self.table}")

    close = mend


def _nft(script: str) -> None:
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    argv = ["nft", "-f", "-"]
    subprocess.run(argv, input=script, text=True, env=environment, timeout=30, check=True)


class Proxy:
    """A program between a node and the database; stopped, it is a network that loses all."""

    CODE = """
import socket, sys, threading
target = sys.argv[1]
listener = socket.create_server(("127.0.0.1", int(sys.argv[2])))
def pump(one, other):
    try:
        while data := one.recv(1 << 16):
            other.sendall(data)
    except OSError:
        pass
    for sock in (one, other):
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
while True:
    inside, _ = listener.accept()
    outside = socket.socket(socket.AF_UNIX)
    try:
        outside.connect(target)
    except OSError:
        inside.close()
        continue
    for pair in ((inside, outside), (outside, inside)):
        threading.Thread(target=pump, args=pair, daemon=True).start()
"""

    def __init__(self, cluster: Cluster) -> None:
        self.port = free_port()
        target = str(cluster.directory / ".s.PGSQL.5432")
        argv = [sys.executable, "-c", self.CODE, target, str(self.port)]
        self.process = subprocess.Popen(argv)

        def listens() -> bool:
            with socket.socket() as sock:
                return sock.connect_ex(("127.0.0.1", self.port)) == 0

        wait_for(listens)

    def url(self, url: str) -> str:
        """The URL of a database by this way."""
        return _url(url, "127.0.0.1", self.port)

    def send(self, signal: int) -> None:
        self.process.send_signal(signal)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE)
