"""All penalties of a step in one launch. See `venturi/kernels/penalties.py`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from venturi.kernels.penalties import IN_PROMPT

BLOCK = 4096


@triton.jit
def penalize_kernel(
    logits, counts, rows, slots, repetition, presence, frequency, vocab, FLAG: tl.constexpr, BLOCK: tl.constexpr
):
    entry = tl.program_id(0)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    at = logits + tl.load(rows + entry) * vocab + token
    seen = tl.load(counts + tl.load(slots + entry) * vocab + token, mask=inside, other=0)
    x = tl.load(at, mask=inside & (seen != 0), other=0.0)
    factor = tl.load(repetition + entry)
    times = (seen & (FLAG - 1)).to(tl.float32)
    x = tl.where(x > 0, x / factor, x * factor)
    x -= tl.where(times > 0, tl.load(presence + entry), 0.0) + tl.load(frequency + entry) * times
    tl.store(at, x, mask=inside & (seen != 0))


def penalize(
    logits: Tensor, counts: Tensor, rows: Tensor, slots: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> None:
    """logits and counts are contiguous; only tokens that a sequence has are read and written."""
    if len(rows):
        vocab = logits.shape[1]
        penalize_kernel[(len(rows), triton.cdiv(vocab, BLOCK))](
            logits, counts, rows, slots, repetition, presence, frequency, vocab, FLAG=IN_PROMPT, BLOCK=BLOCK,
            num_warps=8,
        )  # fmt: skip
