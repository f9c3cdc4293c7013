"""Mixture of experts: which experts a token goes to, and which tiles of tokens each expert multiplies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from venturi.kernels.moe import Routing
from venturi.kernels.triton_kernels.launch import options


@triton.jit
def route_kernel(
    logits, correction, weights, experts, count, groups, logits_row, scale,
    KIND: tl.constexpr, RENORMALIZE: tl.constexpr, TOP_K: tl.constexpr, TOP_GROUPS: tl.constexpr,
    G: tl.constexpr, EACH: tl.constexpr, K_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A token a program; its experts lie as [groups, experts of a group], padded to [G, EACH]."""
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    each = count // groups
    group, place = tl.arange(0, G)[:, None], tl.arange(0, EACH)[None, :]
    ids = group * each + place
    valid = (group < groups) & (place < each)
    x = tl.load(logits + row * logits_row + ids, mask=valid, other=-float("inf")).to(tl.float32)
    if KIND == "grouped-sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-x))
        choice = scores + tl.load(correction + ids, mask=valid, other=0.0).to(tl.float32)
    elif KIND == "topk-softmax":
        scores, choice = x, x
    else:
        powers = tl.exp(x - tl.max(tl.max(x, 1), 0))
        scores = powers / tl.sum(tl.sum(powers, 1), 0)
        choice = scores
    choice = tl.where(valid, choice, -float("inf"))
    if TOP_GROUPS > 0:
        value = tl.max(choice, 1)
        if KIND == "grouped-sigmoid":
            first = tl.argmax(choice, 1)
            value += tl.max(tl.where(place == first[:, None], -float("inf"), choice), 1)
        number = tl.arange(0, G)
        value = tl.where(number < groups, value, -float("inf"))
        kept = number < 0
        for _ in tl.static_range(TOP_GROUPS):
            best = tl.argmax(value, 0)
            kept = kept | (number == best)
            value = tl.where(number == best, -float("inf"), value)
        choice = tl.where(valid & (kept[:, None] == 0), 0.0, choice)
    ids = tl.reshape(tl.where(valid, ids, 0), [G * EACH])
    scores = tl.reshape(scores, [G * EACH])
    choice = tl.reshape(choice, [G * EACH])
    flat, slot = tl.arange(0, G * EACH), tl.arange(0, K_BLOCK)
    chosen = tl.full([K_BLOCK], -float("inf"), tl.float32)
    for i in tl.static_range(TOP_K):
        best = flat == tl.argmax(choice, 0)
        tl.store(experts + row * TOP_K + i, tl.sum(tl.where(best, ids, 0), 0))
        chosen = tl.where(slot == i, tl.sum(tl.where(best, scores, 0.0), 0), chosen)
        choice = tl.where(best, -float("inf"), choice)
    inside = slot < TOP_K
    if KIND == "topk-softmax":
        chosen = tl.exp(chosen - tl.max(chosen, 0))
    chosen = tl.where(inside, chosen, 0.0)
    if KIND == "topk-softmax" or RENORMALIZE:
        total = tl.sum(chosen, 0)
        if KIND == "grouped-sigmoid":
            total += 1e-20
        chosen = chosen / total
    tl.store(weights + row * TOP_K + slot, chosen * scale, mask=inside)


def route(logits: Tensor, correction: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """`venturi.kernels.moe.route` in one launch, experts as int32. Of equal scores the lower expert comes first.

    logits: [tokens, experts], experts of a row contiguous.
    """
    (tokens, count), top_k, groups = logits.shape, routing.top_k, routing.groups
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    experts = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    if tokens:
        route_kernel[(tokens,)](
            logits, correction if correction is not None else logits, weights, experts, count, groups,
            logits.stride(0), float(routing.scale), KIND=routing.kind, RENORMALIZE=routing.renormalize, TOP_K=top_k,
            TOP_GROUPS=routing.top_groups if groups > 1 else 0, G=triton.next_power_of_2(groups),
            EACH=triton.next_power_of_2(count // groups), K_BLOCK=triton.next_power_of_2(top_k), num_warps=1,
            **options(logits),
        )  # fmt: skip
    return weights, experts


@dataclass(frozen=True)
class Tiles:
    """order: [pairs] int32, pairs (token * top_k + choice) by expert, then by number. table: [tiles, 3] int32: expert,
    first and end of the tile in `order`; expert -1: nothing to do. rows: most pairs in a tile."""

    order: Tensor
    table: Tensor
    rows: int


@triton.jit
def group_kernel(
    experts, order, table, pairs, most, count, ROWS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """An expert a program: it counts everyone's pairs, so that it knows where its own begin, then writes those."""
    expert = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    bins, lane = tl.arange(0, BINS), tl.arange(0, BLOCK)
    counts = tl.zeros([BINS], tl.int32)
    for at in range(0, pairs, BLOCK):
        counts += tl.histogram(tl.load(experts + at + lane, mask=at + lane < pairs, other=BINS - 1), BINS)
    counts = tl.where(bins < count, counts, 0)
    needed = (counts + ROWS - 1) // ROWS
    start = tl.sum(tl.where(bins < expert, counts, 0), 0)
    end = start + tl.sum(tl.where(bins == expert, counts, 0), 0)
    tile = tl.sum(tl.where(bins < expert, needed, 0), 0)
    place = start
    for at in range(0, pairs, BLOCK):
        own = (tl.load(experts + at + lane, mask=at + lane < pairs, other=BINS - 1) == expert).to(tl.int32)
        tl.store(order + place + tl.cumsum(own, 0) - 1, at + lane, mask=own > 0)
        place += tl.sum(own, 0)
    for first in range(start, end, ROWS):
        tl.store(table + tile * 3, expert)
        tl.store(table + tile * 3 + 1, first)
        tl.store(table + tile * 3 + 2, tl.minimum(first + ROWS, end))
        tile += 1
    if expert == count - 1:
        for at in range(tile, most, BLOCK):
            tl.store(table + (at + lane) * 3, -1, mask=at + lane < most)


def group(experts: Tensor, count: int, rows: int) -> Tiles:
    """The pairs of `experts`, int32 [tokens, top_k] below `count`, in tiles of at most `rows` of one expert."""
    pairs = experts.numel()
    most = pairs // rows + min(count, pairs)
    order = torch.empty(pairs, dtype=torch.int32, device=experts.device)
    table = torch.empty(most, 3, dtype=torch.int32, device=experts.device)
    if pairs:
        group_kernel[(count,)](
            experts, order, table, pairs, most, count, ROWS=rows, BINS=triton.next_power_of_2(count + 1),
            BLOCK=max(128, min(1024, triton.next_power_of_2(pairs))), **options(experts),
        )  # fmt: skip
    return Tiles(order, table, rows)
