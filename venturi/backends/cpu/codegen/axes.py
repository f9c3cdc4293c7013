"""The loops of a pointwise kernel at known shapes: output dimensions in memory order, merged where all inputs allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axes:
    """Sizes from the slowest to the fastest axis, and for each input its strides in elements (0 where it repeats)."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    def any_length(self) -> Axes:
        """The same for any size of the slowest axis, which is written as 0: code need not depend on it."""
        return Axes((0, *self.sizes[1:]), self.strides)


def axes_of(shape: Sequence[int], inputs: Sequence[Sequence[int]], order: Sequence[int], keep: int = 0) -> Axes | None:
    """Axes of an output of `shape` that lies in `order`, read through inputs that broadcast to it and lie compactly in
    the same order. The last `keep` dimensions of `order` become one axis of their own. None when an input does not
    broadcast to `shape`.

    >>> axes_of((2, 3, 4), [(2, 3, 4), (4,)], (0, 1, 2))
    Axes(sizes=(6, 4), strides=((4, 1), (0, 1)))
    """
    rank = len(shape)
    padded = [(1,) * (rank - len(s)) + tuple(s) for s in inputs]
    if any(len(s) > rank or any(n not in (1, m) for n, m in zip(p, shape)) for s, p in zip(inputs, padded)):
        return None
    sizes: list[int] = []
    spans: list[tuple[bool, ...]] = []
    for at, d in enumerate(order):
        first_kept = at == rank - keep
        if shape[d] == 1 and not (keep and at >= rank - keep and not _has(sizes, at, rank, keep)):
            continue
        mine = tuple(p[d] != 1 for p in padded)
        if sizes and spans[-1] == mine and not (keep and first_kept):
            sizes[-1] *= shape[d]
        else:
            sizes.append(shape[d])
            spans.append(mine)
    if not sizes:
        sizes, spans = [1], [tuple(True for _ in inputs)]
    strides = []
    for i in range(len(inputs)):
        step, mine_strides = 1, []
        for size, span in zip(reversed(sizes), reversed(spans)):
            mine_strides.append(step if span[i] else 0)
            step *= size if span[i] else 1
        strides.append(tuple(reversed(mine_strides)))
    return Axes(tuple(sizes), tuple(strides))


def _has(sizes: Sequence[int], at: int, rank: int, keep: int) -> bool:
    """Whether a kept axis was begun before position `at`."""
    return at > rank - keep and bool(sizes)
