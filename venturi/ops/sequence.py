"""Sequences (Python lists) and optionals (None or the value)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from venturi.core.errors import RequestError
from venturi.ops.table import CONTROL, op

T = torch.Tensor


def _position(sequence: list[Any], position: T | None, extra: int = 0) -> int:
    """Positions count from the end when negative; outside is an error."""
    at = int(position.reshape(())) if position is not None else len(sequence) - (0 if extra else 1)
    limit = len(sequence) + extra
    if not -len(sequence) <= at < limit:
        raise RequestError(f"sequence position {at} is outside a sequence of {len(sequence)}")
    return at + len(sequence) if at < 0 else at


@op("SequenceConstruct", ulps=0.0)
def sequence_construct(*xs: Any) -> list[Any]:
    return list(xs)


@op("SequenceEmpty", ulps=0.0)
def sequence_empty(*, dtype: int = 1) -> list[Any]:
    return []


@op("SequenceAt", ulps=0.0)
def sequence_at(sequence: list[Any], position: T) -> Any:
    return sequence[_position(sequence, position)]


@op("SequenceErase", ulps=0.0)
def sequence_erase(sequence: list[Any], position: T | None = None) -> list[Any]:
    at = _position(sequence, position)
    return sequence[:at] + sequence[at + 1 :]


@op("SequenceInsert", ulps=0.0)
def sequence_insert(sequence: list[Any], x: Any, position: T | None = None) -> list[Any]:
    at = _position(sequence, position, extra=1)
    return [*sequence[:at], x, *sequence[at:]]


@op("SequenceLength", ulps=0.0)
def sequence_length(sequence: list[Any]) -> T:
    return torch.tensor(len(sequence), dtype=torch.int64)


@op("ConcatFromSequence", ulps=0.0)
def concat_from_sequence(sequence: list[Any], *, axis: int, new_axis: int = 0) -> Any:
    if sequence and isinstance(sequence[0], np.ndarray):
        return np.stack(sequence, axis) if new_axis else np.concatenate(sequence, axis)
    return torch.stack(sequence, axis) if new_axis else torch.cat(sequence, axis)


@op("SplitToSequence", ulps=0.0)
def split_to_sequence(x: T, split: T | None = None, *, axis: int = 0, keepdims: int = 1) -> list[T]:
    if split is None:
        parts = list(torch.split(x, 1, axis))
        return parts if keepdims else [p.squeeze(axis) for p in parts]
    if split.dim() == 0:
        return list(torch.split(x, int(split), axis))
    return list(torch.split(x, [int(s) for s in split.tolist()], axis))


@op("SequenceMap", CONTROL, ulps=0.0)
def sequence_map(sequence: list[Any], *extra: Any, body: Callable[..., Sequence[Any]]) -> tuple[list[Any], ...]:
    rows = [body(item, *(e[i] if isinstance(e, list) else e for e in extra)) for i, item in enumerate(sequence)]
    count = len(rows[0]) if rows else 1
    return tuple([row[j] for row in rows] for j in range(count))


@op("Optional", ulps=0.0)
def optional(x: Any = None, *, type: Any = None) -> Any:
    return x


@op("OptionalGetElement", ulps=0.0)
def optional_get_element(x: Any) -> Any:
    if x is None:
        raise RequestError("OptionalGetElement of an empty optional")
    return x


@op("OptionalHasElement", ulps=0.0)
def optional_has_element(x: Any = None) -> T:
    return torch.tensor(x is not None)
