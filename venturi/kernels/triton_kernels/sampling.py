"""One program a row: temperature, thresholds by bisection instead of sorting, Gumbel-max. See `kernels/sampling.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROUNDS = 26  # halvings of the interval of logits: 2^-26 of its width is below fp32 resolution of the largest logits


@triton.jit
def mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def mass_above(logits, bound, floor, top, inverse, vocab, BLOCK: tl.constexpr):
    """(count, probability mass relative to exp(top)) of scaled logits > bound, of those >= floor only."""
    count = tl.zeros([BLOCK], tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    for at in range(0, vocab, BLOCK):
        place = at + tl.arange(0, BLOCK)
        x = tl.load(logits + place, mask=place < vocab, other=-float("inf")) * inverse
        kept = (x > bound) & (x >= floor)
        count += tl.where(kept, 1.0, 0.0)
        mass += tl.where(kept, tl.exp(x - top), 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def sample_kernel(
    logits, out, temperature, top_k, top_p, min_p, seeds, steps, vocab, ROUNDS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab
    t = tl.load(temperature + row)
    inverse = 1.0 / tl.where(t > 0, tl.maximum(t, 1e-6), 1.0)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    worst = tl.full([BLOCK], float("inf"), tl.float32)
    index = tl.zeros([BLOCK], tl.int32)
    for at in range(0, vocab, BLOCK):
        place = at + tl.arange(0, BLOCK)
        x = tl.load(logits + place, mask=place < vocab, other=-float("inf")) * inverse
        index = tl.where(x > best, place, index)
        best = tl.maximum(best, x)
        worst = tl.minimum(worst, tl.where(x > -float("inf"), x, float("inf")))
    top = tl.max(best, 0)
    bottom = tl.min(worst, 0)
    greedy = tl.min(tl.where(best == top, index, 2147483647), 0)
    if t == 0:
        tl.store(out + row, greedy.to(tl.int64))
    else:
        floor = top + tl.log(tl.load(min_p + row))
        k, p = tl.load(top_k + row), tl.load(top_p + row)
        if (k > 0) & (k < vocab):
            low, high = bottom - 1.0, top
            for _ in range(ROUNDS):
                middle = 0.5 * (low + high)
                count, mass = mass_above(logits, middle, -float("inf"), top, inverse, vocab, BLOCK)
                if count >= k:
                    low = middle
                else:
                    high = middle
            floor = tl.maximum(floor, next_above(logits, low, inverse, vocab, BLOCK))
        if p < 1:
            count, whole = mass_above(logits, bottom - 1.0, floor, top, inverse, vocab, BLOCK)
            low, high = bottom - 1.0, top
            for _ in range(ROUNDS):
                middle = 0.5 * (low + high)
                count, mass = mass_above(logits, middle, floor, top, inverse, vocab, BLOCK)
                if mass >= p * whole:
                    low = middle
                else:
                    high = middle
            floor = tl.maximum(floor, next_above(logits, low, inverse, vocab, BLOCK))
        seed = tl.load(seeds + row)
        step = tl.load(steps + row).to(tl.uint32)
        key = mix(mix(seed.to(tl.uint32)) ^ (seed >> 32).to(tl.uint32) ^ (step * 0x9E3779B1))
        best = tl.full([BLOCK], -float("inf"), tl.float32)
        index = tl.zeros([BLOCK], tl.int32)
        for at in range(0, vocab, BLOCK):
            place = at + tl.arange(0, BLOCK)
            x = tl.load(logits + place, mask=place < vocab, other=-float("inf")) * inverse
            bits = mix(key + place.to(tl.uint32) * 0x85EBCA6B)
            uniform = ((bits >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
            noisy = tl.where(x >= floor, x - tl.log(-tl.log(uniform)), -float("inf"))
            index = tl.where(noisy > best, place, index)
            best = tl.maximum(best, noisy)
        winner = tl.max(best, 0)
        tl.store(out + row, tl.min(tl.where(best == winner, index, 2147483647), 0).to(tl.int64))


@triton.jit
def next_above(logits, bound, inverse, vocab, BLOCK: tl.constexpr):
    """The smallest scaled logit that is larger than bound."""
    least = tl.full([BLOCK], float("inf"), tl.float32)
    for at in range(0, vocab, BLOCK):
        place = at + tl.arange(0, BLOCK)
        x = tl.load(logits + place, mask=place < vocab, other=-float("inf")) * inverse
        least = tl.minimum(least, tl.where(x > bound, x, float("inf")))
    return tl.min(least, 0)


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, steps: Tensor
) -> Tensor:
    """See `venturi.kernels.sampling.sample`. logits are contiguous; the row's settings may be strided views."""
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    fields = [x.contiguous() for x in (temperature, top_k, top_p, min_p, seeds, steps)]
    if rows:
        block = min(4096, triton.next_power_of_2(vocab))
        sample_kernel[(rows,)](logits.contiguous(), out, *fields, vocab, ROUNDS=ROUNDS, BLOCK=block, num_warps=8)
    return out
