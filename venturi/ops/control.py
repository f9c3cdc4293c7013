"""If, Loop and Scan. Subgraphs arrive as callables from the body's inputs to the tuple of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from venturi.core.errors import RequestError
from venturi.core.knobs import int_knob
from venturi.ops.table import CONTROL, VENTURI, OpContext, op
from venturi.ops.tensors import STORAGE

T = torch.Tensor
Body = Callable[..., Sequence[Any]]
MAX_TRIPS = int_knob("VENTURI_MAX_TRIPS", 10_000_000, "A Loop that runs longer is taken for endless and stopped.")


@op("If", CONTROL, ulps=0.0)
def if_(condition: T, *, then_branch: Body, else_branch: Body) -> tuple[Any, ...]:
    return tuple(then_branch() if bool(condition.reshape(())) else else_branch())


@op("Loop", CONTROL, ulps=0.0)
def loop(trips: T | None, condition: T | None, *carried: Any, body: Body, ctx: OpContext) -> tuple[Any, ...]:
    limit = int(trips.reshape(())) if trips is not None else None
    cap = MAX_TRIPS.get()
    keep_going = condition is None or bool(condition.reshape(()))
    state, rows, i = list(carried), [], 0
    while keep_going and (limit is None or i < limit):
        if i >= cap:
            raise RequestError(f"Loop ran {cap} iterations without ending; raise VENTURI_MAX_TRIPS if this is meant")
        flag = torch.tensor(True)
        result = list(body(torch.tensor(i, dtype=torch.int64), flag, *state))
        keep_going = bool(result[0].reshape(()))
        state = result[1 : 1 + len(carried)]
        rows.append(result[1 + len(carried) :])
        i += 1
    scans = ctx.num_outputs - len(carried)
    stacked = [
        _stack([r[j] for r in rows], ctx.out_dtypes[len(carried) + j] if ctx.out_dtypes else None) for j in range(scans)
    ]
    return (*state, *stacked)


def _stack(rows: list[T], dtype: Any, axis: int = 0) -> T:
    if rows:
        return torch.stack(rows, axis)
    return torch.zeros(0, dtype=STORAGE.get(dtype, torch.float32))


@op("Scan", CONTROL, ulps=0.0)
def scan(
    *inputs: Any,
    body: Body,
    num_scan_inputs: int,
    scan_input_axes: list[int] | None = None,
    scan_input_directions: list[int] | None = None,
    scan_output_axes: list[int] | None = None,
    scan_output_directions: list[int] | None = None,
    ctx: OpContext,
) -> tuple[Any, ...]:
    split = len(inputs) - num_scan_inputs
    state, scanned = list(inputs[:split]), inputs[split:]
    axes = scan_input_axes or [0] * num_scan_inputs
    backward = scan_input_directions or [0] * num_scan_inputs
    length = scanned[0].shape[axes[0]]
    rows = []
    for t in range(length):
        slices = [x.select(a, length - 1 - t if b else t) for x, a, b in zip(scanned, axes, backward)]
        result = list(body(*state, *slices))
        state = result[:split]
        rows.append(result[split:])
    outputs = ctx.num_outputs - split
    out_axes = scan_output_axes or [0] * outputs
    out_backward = scan_output_directions or [0] * outputs
    stacked = []
    for j in range(outputs):
        column = [r[j] for r in rows]
        dtype = ctx.out_dtypes[split + j] if ctx.out_dtypes else None
        stacked.append(_stack(column[::-1] if out_backward[j] else column, dtype, out_axes[j]))
    return (*state, *stacked)


@op("BatchedScan", CONTROL, domain=VENTURI, ulps=0.0)
def batched_scan(
    lengths: T | None,
    *inputs: Any,
    body: Body,
    num_scan_inputs: int,
    directions: list[int] | None = None,
    ctx: OpContext,
) -> tuple[Any, ...]:
    """Scan of opset 8: every input has a leading batch axis, rows may have their own lengths."""
    split = len(inputs) - num_scan_inputs
    rows = []
    for b in range(inputs[0].shape[0]):
        length = None if lengths is None else int(lengths[b])
        scanned = [x[b] if length is None else x[b, :length] for x in inputs[split:]]
        states = [x[b] for x in inputs[:split]]
        options: dict[str, Any] = {"num_scan_inputs": num_scan_inputs, "scan_input_directions": directions}
        rows.append(scan(*states, *scanned, body=body, ctx=ctx, **options))
    return tuple(torch.stack([r[j] for r in rows]) for j in range(len(rows[0])))
