"""Which sequences of a step go to cuDNN, and how they are grouped. No GPU."""

from __future__ import annotations

import numpy as np

from venturi.llm import long_chunks
from venturi.llm.step_inputs import StepInputs

NONE = np.zeros(0, dtype=np.int64)


def inputs_of(counts: list[int], lengths: list[int]) -> StepInputs:
    starts = np.concatenate(([0], np.cumsum(counts)))
    tables = np.zeros((len(counts), 1), dtype=np.int32)
    return StepInputs(NONE, NONE, NONE, NONE, starts, np.array(lengths), tables, NONE, NONE, NONE, 0, max(counts))


def test_only_long_chunks_are_taken_in_order() -> None:
    least = long_chunks.MIN_QUERIES
    counts = [1, least - 1, least, 3 * least, 2]
    assert long_chunks.group(inputs_of(counts, counts)) == [[2, 3]]
    assert long_chunks.group(inputs_of([1, 2], [4000, 9])) == []


def test_groups_bound_the_gathered_keys() -> None:
    counts = [600] * 5
    lengths = [long_chunks.MAX_KEYS // 2, long_chunks.MAX_KEYS // 2, 600, 2 * long_chunks.MAX_KEYS, 600]
    assert long_chunks.group(inputs_of(counts, lengths)) == [[0, 1], [2], [3], [4]]


def test_few_sizes_serve_all_lengths() -> None:
    sizes = {long_chunks._size_above(n) for n in range(1, 40_000, 7)}
    assert sizes == {1024, 2048, 4096, 8192, 16384, 32768, 65536}
    assert all(long_chunks._size_above(n) >= n for n in (1, 1024, 1025, 65535, 65536))
