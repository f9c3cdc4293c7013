"""Attention of new tokens over a paged cache. `AttentionBatch` says which token belongs where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from venturi.kernels.rotary import CacheScales, rotate_and_write


@dataclass
class LongChunks:
    """Prefill sequences with so many new tokens that gathering their keys first pays.

    starts: [2, sequences + 1] int64, first token in the step and first row among the gathered keys. lengths:
    [2, sequences] int32, new tokens and keys. blocks: [n] int32, every sequence's blocks one after another.
    max_queries, max_keys: no length is above. offsets: starts in elements, by strides; filled where they are used.
    """

    starts: Tensor
    lengths: Tensor
    blocks: Tensor
    max_queries: int
    max_keys: int
    offsets: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)


@dataclass
class AttentionBatch:
    """The tokens of a step, sequence after sequence.

    query_starts: [sequences + 1] int32, first token of each sequence. seq_lens: [sequences] int32, keys of each
    sequence, new ones included. block_tables: [tables, blocks] int32; table_rows: [sequences] int32, the table of each
    sequence. positions, slots: [tokens] int64, place of a
    token in its text and in the flattened cache. max_query, max_keys: largest counts. num_decodes: leading sequences of
    one token each. `host` has
    query_starts and seq_lens as lists (CPU only). `generated` (CPU only) takes what `rotated_attention` takes and gives
    its result, or None where it does not know how. `workspace` holds buffers of the decode kernels. `long_chunks` (CUDA
    only) are not in the tiles of the prefill kernel.
    """

    query_starts: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    table_rows: Tensor
    positions: Tensor
    slots: Tensor
    max_query: int
    max_keys: int
    num_decodes: int = 0
    host: tuple[list[int], list[int]] = ([], [])
    workspace: dict[str, Tensor] = field(default_factory=dict)
    long_chunks: list[LongChunks] = field(default_factory=list)
    generated: Callable[..., Tensor | None] | None = None


@dataclass(frozen=True)
class AttentionKind:
    """scale: factor of the scores. window: keys a query sees, itself included; None: all. softcap: scores become
    softcap * tanh(scores / softcap)."""

    scale: float
    window: int | None = None
    softcap: float | None = None


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, kind: AttentionKind,
    sinks: Tensor | None = None, scales: CacheScales | None = None,
) -> Tensor:  # fmt: skip
    """Causal softmax(q k^T) v of each token over its sequence's cache, which already holds the new tokens.

    The last slot of the cache is read in place of keys that a query must not see: it has to hold finite numbers.

    Args:
        q: [tokens, heads, k_dim]. k_cache: [blocks, block_tokens, kv_heads, k_dim], v_cache: [..., v_dim]; query head h
            reads kv head h * kv_heads // heads. sinks: [heads], a logit that is in the softmax and adds nothing.
            scales: of int8 caches.

    Returns:
        [tokens, heads, v_dim], q's dtype.
    """
    if q.is_cuda:
        from venturi.kernels.triton_kernels.attention import paged_attention as on_device

        return on_device(q, k_cache, v_cache, batch, kind, sinks, scales)
    caches = Caches(k_cache, v_cache, scales)
    if batch.max_query == 1:
        return _decode(q, caches, batch, kind, sinks)
    starts, lengths = batch.host
    parts = [
        _one_sequence(q[a:b], caches, batch.block_tables[row], length, kind, sinks)
        for row, a, b, length in zip(batch.table_rows.tolist(), starts, starts[1:], lengths)
    ]
    return torch.cat(parts)


def rotated_attention(
    q: Tensor, k: Tensor, v: Tensor, angles: Tensor | None, interleaved: bool, k_cache: Tensor, v_cache: Tensor,
    batch: AttentionBatch, kind: AttentionKind, sinks: Tensor | None = None, scales: CacheScales | None = None,
) -> Tensor:  # fmt: skip
    """`rotate_and_write` of a step's tokens, then `paged_attention`. On CUDA q may be rotated in place."""
    if q.is_cuda:
        from venturi.kernels.triton_kernels.attention import rotated_attention as on_device

        return on_device(q, k, v, angles, interleaved, k_cache, v_cache, batch, kind, sinks, scales)
    if batch.generated is not None and scales is None:
        out = batch.generated(q, k, v, angles, interleaved, k_cache, v_cache, batch, kind, sinks)
        if out is not None:
            return out
    q = rotate_and_write(q, k, v, angles, batch.positions, k_cache, v_cache, batch.slots, interleaved, scales)
    return paged_attention(q, k_cache, v_cache, batch, kind, sinks, scales)


@dataclass(frozen=True)
class Caches:
    """The parts of a layer's cache, read together."""

    k: Tensor
    v: Tensor
    scales: CacheScales | None

    def read(self, index: Tensor, dtype: torch.dtype, *, blocks: bool) -> tuple[Tensor, Tensor]:
        """Keys and values of slots, or of whole `blocks`, in their order."""
        found = []
        for place, cache in enumerate((self.k, self.v)):
            rows = (cache if blocks else cache.flatten(0, 1))[index]
            if self.scales is not None:
                scale = self.scales[place]
                rows = rows * (scale if blocks else scale.flatten(0, 1))[index][..., None]
            found.append((rows.flatten(0, 1) if blocks else rows).to(dtype))
        return found[0], found[1]


def _decode(q: Tensor, caches: Caches, batch: AttentionBatch, kind: AttentionKind, sinks: Tensor | None) -> Tensor:
    k_cache = caches.k
    size, rows = k_cache.shape[1], len(q)
    tables = batch.block_tables[batch.table_rows.long(), : -(-batch.max_keys // size)].long()
    lengths = batch.seq_lens[:, None]
    slots = (tables[..., None] * size + torch.arange(size)).flatten(1)[:, : batch.max_keys]
    place = torch.arange(batch.max_keys)
    seen = place < lengths
    if kind.window is not None:
        seen &= place >= lengths - kind.window
    spare = k_cache.shape[0] * size - 1
    slots = torch.where(seen, slots, spare)
    keys, values = caches.read(slots, q.dtype, blocks=False)
    heads, kv_heads = q.shape[1], keys.shape[2]
    grouped = q.view(rows, kv_heads, heads // kv_heads, -1)
    out = _softmax_product(grouped, keys.transpose(1, 2), values.transpose(1, 2), seen[:, None, None], kind, sinks)
    return out.reshape(rows, heads, -1)


def _one_sequence(
    q: Tensor, caches: Caches, table: Tensor, length: int, kind: AttentionKind, sinks: Tensor | None
) -> Tensor:
    tokens, heads, _ = q.shape
    blocks = table[: -(-length // caches.k.shape[1])].long()
    keys, values = (x[:length] for x in caches.read(blocks, q.dtype, blocks=True))
    place, own = torch.arange(length), torch.arange(length - tokens, length)[:, None]
    seen = place <= own
    if kind.window is not None:
        seen &= place > own - kind.window
    groups = heads // keys.shape[1]
    keys, values = (x.transpose(0, 1).repeat_interleave(groups, 0) for x in (keys, values))
    return _softmax_product(q.transpose(0, 1), keys, values, seen, kind, sinks, per_head=True).transpose(0, 1)


def _softmax_product(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, kind: AttentionKind, sinks: Tensor | None, per_head: bool = False
) -> Tensor:
    """[..., m, d] x [..., n, d] -> [..., m, v_dim]. With per_head the heads lead, else heads are kv_heads x m."""
    if kind.softcap is None and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=kind.scale)
    scores = (q.float() @ k.float().transpose(-1, -2)) * kind.scale
    if kind.softcap is not None:
        scores = kind.softcap * torch.tanh(scores / kind.softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        column = sinks.float().view(-1, 1, 1) if per_head else sinks.float().view(k.shape[-3], -1, 1)
        scores = torch.cat((scores, column.expand(*scores.shape[:-1], 1)), -1)
        return (scores.softmax(-1)[..., :-1] @ v.float()).to(q.dtype)
    return (scores.softmax(-1) @ v.float()).to(q.dtype)
