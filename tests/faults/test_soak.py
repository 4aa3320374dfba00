"""Random schedules: a machine of any kind, five deployments, and faults that a seed draws.

`make soak SECONDS=600 SEED=1` starts with that seed and continues with the next ones. A schedule
that fails prints its seed.
"""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
import scenes
from invariants import assert_invariants
from world import Reply, Visit, World

pytestmark = [pytest.mark.promise(*range(1, 16)), pytest.mark.soak]
DEPLOYMENTS = 5
COMMANDS = [
    "^systemd-run",
    r"^nix-store .*--indirect --max-jobs 32",
    r"^nix-store .*/previous",
    "^script",
]
POINTS = {
    "nixos": [
        *COMMANDS,
        r"^test ",
        r"^test\.end",
        r"^nix-env ",
        r"^nix-env\.end",
        r"^boot ",
        r"^boot\.end",
    ],
    "darwin": [*COMMANDS, r"^activate ", r"^activate\.end", r"^nix-env ", r"^nix-env\.end"],
    "home_manager": [*COMMANDS, r"^activate ", r"^activate\.middle", r"^activate\.end"],
    "plain": [*COMMANDS, r"^nix-env ", r"^nix-env\.end"],
}
REPLIES: dict[str, Reply] = {**scenes.FAULTS, **scenes.ENDINGS}
AT_ANY_MOMENT = [
    "kill-switch",
    "kill-agent",
    "kill-both",
    "power",
    "stop-agent",
    "stop-switch",
    "shutdown",
]


@dataclass(frozen=True)
class Fault:
    """A fault at a point, after it was passed `skipped` times, and `times` times in all.

    Without a point it happens `after` seconds after the order.
    """

    name: str
    point: str = ""
    skipped: int = 0
    times: int = 1
    after: float = 0.0


@dataclass(frozen=True)
class Turn:
    """One deployment: how its system behaves, its faults, and whether another follows at once."""

    how: str
    faults: tuple[Fault, ...]
    hurried: bool


@dataclass
class Schedule:
    """The machine and the deployments that a seed draws."""

    seed: int
    kind: str = ""
    turns: list[Turn] = field(default_factory=list)

    def __post_init__(self) -> None:
        draw = random.Random(self.seed)
        self.kind = draw.choice(["nixos", "nixos", *POINTS])
        ways = [scenes.GOOD, scenes.GOOD, scenes.BAD_CHECK]
        if self.kind != "plain":
            ways.append(scenes.BAD)
        if self.kind == "nixos":
            ways.append(scenes.BAD_COMMIT)
        for _ in range(DEPLOYMENTS):
            faults = tuple(self.fault(draw) for _ in range(draw.choice([0, 1, 1, 2])))
            self.turns.append(Turn(draw.choice(ways), faults, draw.random() < 0.15))

    def fault(self, draw: random.Random) -> Fault:
        if draw.random() < 0.3:
            return Fault(draw.choice(AT_ANY_MOMENT), after=round(draw.uniform(0.0, 1.5), 3))
        point = draw.choice(POINTS[self.kind])
        return Fault(
            draw.choice(list(REPLIES)),
            point,
            draw.choice([0, 0, 0, 1, 2]),
            draw.choice([1, 1, 2, 4]),
        )


def reply(fault: Fault, busy: threading.Lock) -> Reply:
    """Return the driver's reply at the fault's point. One fault at a time, by the lock `busy`."""
    remaining = [fault.skipped, fault.times]

    def answer(world: World, visit: Visit) -> str:
        if remaining[0] or not remaining[1]:
            remaining[0] = max(0, remaining[0] - 1)
            return "go"
        remaining[1] -= 1
        action = REPLIES[fault.name]
        with busy:
            return action if isinstance(action, str) else action(world, visit)

    return answer


def run(world: World, schedule: Schedule) -> None:
    """Run the deployments of a schedule with their faults, and check the invariants after each."""
    busy = threading.Lock()
    for number, turn in enumerate(schedule.turns):
        world.orders.clear()
        for fault in turn.faults:
            if fault.point:
                world.order(fault.point, reply(fault, busy), 1 << 30)
        ordered = [scenes.deploy(world, f"v{number}", turn.how)]
        if turn.hurried:
            ordered.append(scenes.deploy(world, f"w{number}"))
        timed = [fault for fault in turn.faults if not fault.point]
        for fault in sorted(timed, key=lambda fault: fault.after):
            time.sleep(fault.after)
            with busy:
                action = REPLIES[fault.name]
                assert not isinstance(action, str)
                action(world, Visit("", "", 0, 0, ""))
        for deployment in ordered:
            if world.workspace.wait(deployment, 90) != "Cancelled" or world.host.step(deployment):
                world.ended(deployment, 30)
        world.heal()
        assert_invariants(world)
    deployment = scenes.deploy(world, "last")
    assert world.ended(deployment) == "succeeded"
    assert_invariants(world)


@pytest.mark.parametrize("lane", range(2))
def test_random_schedules(
    make_world: Any, pytestconfig: pytest.Config, record_property: Any, lane: int
) -> None:
    seconds, option = pytestconfig.getoption("--seconds"), pytestconfig.getoption("--seed")
    first: int = random.randrange(1 << 30) if option is None else option + lane * 1_000_000
    until, seed = time.monotonic() + seconds, first
    while seed == first or time.monotonic() < until:
        schedule = Schedule(seed)
        record_property("soak", seed)
        print(f"seed {seed}: {schedule}")  # pytest shows this if the test fails
        run(make_world(schedule.kind), schedule)
        make_world.close()
        seed += 1
