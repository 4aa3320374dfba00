"""The deployments that wait for an agent's worker."""

from __future__ import annotations

import threading
from typing import Optional

from cachix_protocol import Deployment


class Inbox:
    """Deployments that have arrived, and that the worker has yet to take."""

    def __init__(self) -> None:
        self.arrival = threading.Condition()
        self.waiting: list[Deployment] = []
        self.is_awaited = False  # the worker has nothing else to do

    @property
    def is_idle(self) -> bool:
        """Whether the worker waits for a deployment, and there is none."""
        with self.arrival:
            return self.is_awaited and not self.waiting

    def put(self, deployment: Deployment) -> None:
        """Add a deployment."""
        with self.arrival:
            self.waiting.append(deployment)
            self.arrival.notify()

    def take_all(self, timeout: Optional[float] = None) -> list[Deployment]:
        """Wait for deployments, and take them all, in the order of their indexes.

        They may arrive out of order, as the workspace may send one again. There are none if none
        has arrived within `timeout` seconds.
        """
        with self.arrival:
            self.is_awaited = True
            self.arrival.wait_for(lambda: self.waiting, timeout)
            self.is_awaited = False
            taken, self.waiting = self.waiting, []
        return sorted(taken, key=lambda deployment: deployment.index)

    def has_newer(self, index: int) -> bool:
        """Whether a deployment with a higher index is waiting."""
        with self.arrival:
            return any(deployment.index > index for deployment in self.waiting)
