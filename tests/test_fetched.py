"""The progress of a download, by the lines of Nix in a log."""

from __future__ import annotations

import pytest

from cachix_workspace.fetched import Progress, progress

A, B, C = (f"/nix/store/{letter * 32}-{letter}" for letter in "abc")
MIB = 1 << 20
ESTIMATE = "these 3 paths will be fetched (30.00 MiB download, 60.00 MiB unpacked):"
LIST = [ESTIMATE, f"  {A}", f"  {B}", f"  {C}"]


def copying(path: str) -> str:
    return f"copying path '{path}' from 'https://cache.example'..."


@pytest.mark.parametrize(
    ("lines", "sizes", "expected"),
    [
        ([], {}, None),
        (["$ nix-store --realise", copying(A)], {}, None),
        (LIST, {}, Progress(0, 30 * MIB)),
        ([*LIST, copying(A)], {}, Progress(0, 30 * MIB)),
        ([*LIST, copying(A), copying(B)], {}, Progress(10 * MIB, 30 * MIB)),
        ([*LIST, copying(A), copying(B)], {A: 20 * MIB}, Progress(20 * MIB, 30 * MIB)),
        ([*LIST, copying(C), copying(B)], {A: 20 * MIB}, Progress(5 * MIB, 30 * MIB)),
        # sizes that are larger than the estimate
        ([*LIST, copying(A), copying(B)], {A: 40 * MIB}, Progress(30 * MIB, 30 * MIB)),
        # a path that is not on the list, or twice
        ([*LIST, copying(A), copying(A), copying("/nix/store/x"), copying(B)], {}, 10 * MIB),
        # a second download counts from its own start
        ([*LIST, copying(A), copying(B), *LIST, copying(A)], {}, Progress(0, 30 * MIB)),
        # paths that a program prints later are none of the list
        ([*LIST, copying(A), A, f"  {B}", copying(B)], {}, 10 * MIB),
        (
            ["this path will be fetched (0.04 KiB download, 9 KiB unpacked):", f"  {A}"],
            {},
            Progress(0, 40),
        ),
        (["these 2 paths will be fetched (0.00 MiB download, 1.00 MiB unpacked):"], {}, None),
    ],
)
def test_progress(lines: list[str], sizes: dict[str, int], expected: Progress | int | None) -> None:
    if isinstance(expected, int):
        expected = Progress(expected, 30 * MIB)
    assert progress(lines, sizes.get) == expected
