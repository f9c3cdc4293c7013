"""The start of a decode step in one kernel: its numbers from a ring in the host's memory, its tokens' embeddings.

A captured step reads an entry of the ring after the other without being told: the device counts as the host does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from venturi.kernels.triton_kernels.launch import options

FIELDS = 8  # of a row: token, owner, position, slot, number of keys, and three to fill 64 bytes


@dataclass(frozen=True)
class StepNumbers:
    """A step's rows on the device. owners, lengths: [rows] int32; positions, slots: [rows] int64; entry: [1] int64,
    the one of the ring that this step has read. count and ticket are the kernel's own: [1] int64 and int32, zeros."""

    owners: Tensor
    positions: Tensor
    slots: Tensor
    lengths: Tensor
    entry: Tensor
    count: Tensor
    ticket: Tensor

    @classmethod
    def make(cls, rows: int, device: torch.device) -> StepNumbers:
        def zeros(n: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(n, dtype=dtype, device=device)

        long, short = torch.int64, torch.int32
        return cls(
            zeros(rows, short), zeros(rows, long), zeros(rows, long), zeros(rows, short), zeros(1, long),
            zeros(1, long), zeros(1, short),
        )  # fmt: skip


@triton.jit
def step_start_kernel(
    ring, last_tokens, weight, out, owners, positions, slots, lengths, entry, count, ticket, hidden, scale,
    ENTRIES: tl.constexpr, FIELDS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, rows = tl.program_id(0), tl.num_programs(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    number = tl.load(count) % ENTRIES
    # One request for all of a row's numbers: each one to the host's memory takes microseconds.
    field = tl.arange(0, FIELDS)
    numbers = tl.load(ring + (number * rows + row) * FIELDS + field, volatile=True)
    token = tl.sum(tl.where(field == 0, numbers, 0), 0)
    owner = tl.sum(tl.where(field == 1, numbers, 0), 0)
    tl.store(owners + row, owner.to(tl.int32))
    tl.store(positions + row, tl.sum(tl.where(field == 2, numbers, 0), 0))
    tl.store(slots + row, tl.sum(tl.where(field == 3, numbers, 0), 0))
    tl.store(lengths + row, tl.sum(tl.where(field == 4, numbers, 0), 0).to(tl.int32))
    if token < 0:
        token = tl.load(last_tokens + owner)
    for start in range(0, hidden, BLOCK):
        place = start + tl.arange(0, BLOCK)
        x = tl.load(weight + token * hidden + place, mask=place < hidden)
        tl.store(out + row * hidden + place, (x.to(tl.float32) * scale).to(x.dtype), mask=place < hidden)
    done = tl.atomic_add(ticket, 1, sem="acq_rel")
    if done == rows - 1:
        tl.store(entry, number)
        tl.store(count, number + 1)
        tl.store(ticket, 0)


def step_start(ring: Tensor, numbers: StepNumbers, last_tokens: Tensor, weight: Tensor, scale: float) -> Tensor:
    """[rows, hidden] embeddings times `scale`; fills `numbers`. Capture-safe.

    Args:
        ring: [entries, rows, FIELDS] int64, pinned: token, owner, position, slot, keys; the rest is not looked at. A
            token below 0 stands for its owner's in last_tokens.
        last_tokens: [slots] int64. weight: [vocab, hidden] of any float type.
    """
    entries, rows, fields = ring.shape
    assert fields == FIELDS, f"a row has {FIELDS} numbers, got {fields}"
    hidden = weight.shape[1]
    out = torch.empty(rows, hidden, dtype=weight.dtype, device=weight.device)
    n = numbers
    step_start_kernel[(rows,)](
        ring, last_tokens, weight, out, n.owners, n.positions, n.slots, n.lengths, n.entry, n.count, n.ticket, hidden,
        scale, ENTRIES=entries, FIELDS=fields, BLOCK=1024, num_warps=1, **options(weight),
    )  # fmt: skip
    return out
