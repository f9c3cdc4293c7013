"""The index of each row's largest logit, the first of equals; rows are cut so that a single one uses the whole device.

A part's best is packed into 64 bits (order-preserving value above, inverted index below) and joined by atomic maximum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from venturi.kernels.triton_kernels.launch import options

LOWEST = -(2**63)


@dataclass(frozen=True)
class ArgmaxState:
    """Buffers of up to `rows` rows, in their initial state between calls."""

    keys: Tensor
    tickets: Tensor

    @classmethod
    def make(cls, rows: int, device: torch.device) -> ArgmaxState:
        return cls(
            torch.full((rows,), LOWEST, dtype=torch.int64, device=device),
            torch.zeros(rows, dtype=torch.int32, device=device),
        )


@triton.jit
def argmax_kernel(
    logits, out, keys, tickets, last_tokens, owners, ring, entry, vocab, row_stride,
    REMEMBER: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = part * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(logits + row * row_stride + place, mask=place < vocab, other=-float("inf")).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    key = tl.max(tl.where(place < vocab, ordered * 4294967296 + (2147483647 - place), -9223372036854775808), 0)
    tl.atomic_max(keys + row, key, sem="acq_rel")
    ticket = tl.atomic_add(tickets + row, 1, sem="acq_rel")
    if ticket == tl.num_programs(1) - 1:
        best = tl.atomic_max(keys + row, -9223372036854775808, sem="acq_rel")
        token = 2147483647 - (best & 0x7FFFFFFF)
        tl.store(out + row, token)
        if REMEMBER:
            tl.store(last_tokens + tl.load(owners + row), token)
            tl.store(ring + tl.load(entry) * tl.num_programs(0) + row, token)
        tl.store(keys + row, -9223372036854775808)
        tl.store(tickets + row, 0)


@dataclass(frozen=True)
class Memory:
    """Where tokens are put besides the result: last_tokens[owners[row]], and ring[entry] [entries, rows] int64, which
    may lie in the host's memory."""

    last_tokens: Tensor
    owners: Tensor
    ring: Tensor
    entry: Tensor


def argmax(logits: Tensor, state: ArgmaxState, memory: Memory | None = None) -> Tensor:
    """[rows, vocab] of any float type -> [rows] int64. Capture-safe; one call at a time per state."""
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    m = memory or Memory(out, out, out, out)
    grid = (rows, triton.cdiv(vocab, 8192))
    argmax_kernel[grid](
        logits, out, state.keys, state.tickets, m.last_tokens, m.owners, m.ring, m.entry, vocab, logits.stride(0),
        REMEMBER=memory is not None, BLOCK=8192, num_warps=8, **options(logits),
    )  # fmt: skip
    return out
