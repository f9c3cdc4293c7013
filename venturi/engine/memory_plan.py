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


@dataclass(frozen=True)
class Join:
    """Buffer `key` is made of others: `parts` are (key, byte offset inside it)."""

    key: int
    parts: tuple[tuple[int, int], ...]


def join_lifetimes(
    lifetimes: Sequence[Lifetime], joins: Sequence[Join]
) -> tuple[list[Lifetime], dict[int, tuple[int, int]]]:
    """(buffers to place, where each part lies: its holder and the offset in it). A holder lives as long as its parts.

    >>> join_lifetimes([Lifetime(0, 8, 0, 2), Lifetime(1, 8, 1, 2), Lifetime(2, 16, 2, 5)], [Join(2, ((0, 0), (1, 8)))])
    ([Lifetime(key=2, size=16, first=0, last=5)], {0: (2, 0), 1: (2, 8)})
    """
    by_key = {item.key: item for item in lifetimes}
    inside: dict[int, tuple[int, int]] = {}
    for join in joins:
        held = [by_key.pop(part) for part, _ in join.parts]
        inside.update({part: (join.key, offset) for part, offset in join.parts})
        own = by_key[join.key]
        first = min([own.first, *(h.first for h in held)])
        by_key[join.key] = Lifetime(own.key, own.size, first, max([own.last, *(h.last for h in held)]))
    return list(by_key.values()), inside


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
