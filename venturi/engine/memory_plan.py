"""Places buffers with known lifetimes in one arena. Pure: sizes and steps in, offsets out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 64


@dataclass(frozen=True)
class Lifetime:
    """A buffer of `size` bytes, alive from step `first` to step `last`, both included."""

    key: int
    size: int
    first: int
    last: int


@dataclass(frozen=True)
class MemoryPlan:
    """Byte offset of every buffer, and the bytes the arena needs.

    ```
    offset ^        +--------+
           |        |   b    |
           | +------+--+-----+--+
           | |    a    |   c    |     a and c share bytes: a is dead when c is born
           +-+---------+--------+--> step
    ```
    """

    offsets: dict[int, int]
    total: int


def align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def plan_memory(lifetimes: Sequence[Lifetime]) -> MemoryPlan:
    """Greedy by size: the largest buffer first, each at the lowest offset free during its whole life.

    Source: Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference" (2020), greedy by size.

    >>> plan_memory([Lifetime(0, 64, 0, 1), Lifetime(1, 64, 1, 2), Lifetime(2, 64, 2, 3)]).total
    128
    """
    placed: list[tuple[int, int, Lifetime]] = []
    offsets: dict[int, int] = {}
    total = 0
    for item in sorted(lifetimes, key=lambda x: (-x.size, x.first, x.key)):
        at, size = 0, align(item.size)
        for start, end, other in placed:
            alive_together = item.first <= other.last and other.first <= item.last
            if alive_together and at < end and start < at + size:
                at = end
            elif alive_together and start >= at + size:
                break
        placed.append((at, at + size, item))
        placed.sort(key=lambda p: p[0])
        offsets[item.key] = at
        total = max(total, at + size)
    return MemoryPlan(offsets, total)


def check_integrity(plan: MemoryPlan, lifetimes: Sequence[Lifetime]) -> None:
    """Assert that no two buffers alive together overlap."""
    for i, a in enumerate(lifetimes):
        for b in lifetimes[i + 1 :]:
            if a.first <= b.last and b.first <= a.last:
                x, y = plan.offsets[a.key], plan.offsets[b.key]
                assert x + align(a.size) <= y or y + align(b.size) <= x, f"buffers {a} and {b} overlap"
        assert plan.offsets[a.key] + a.size <= plan.total, f"buffer {a} leaves the arena"
