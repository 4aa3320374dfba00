"""A look at the closure of 2,001 paths: Nix's database and the disk, as before each activation."""

from __future__ import annotations

import os
import time

from _figures import directory, figure
from caches import Cache
from closures import chain
from hosts import Host

from activate.agent import database

ROUNDS = 11
TARGET = 10.0  # ms


def main() -> None:
    with directory() as place, Host(place / "host") as host:
        cache = Cache(place / "cache")
        path = chain(cache, 2000)
        host.fetch(cache.url, cache.key.public, path)
        cache.close()
        database.DIRECTORY = str(host.path("/nix/var/nix/db"))
        paths = [str(host.path(one)) for one in database.requisites([path]) or []]
        assert len(paths) == 2001, f"Nix's database names {len(paths)} paths"
        times = []
        for _ in range(ROUNDS):
            began = time.process_time()
            database.requisites([path])
            assert all(map(os.path.lexists, paths)), "a path is gone"
            times.append(1000 * (time.process_time() - began))
        figure("look at a closure of 2,001 paths, processor", min(times), "ms", TARGET)


if __name__ == "__main__":
    main()
