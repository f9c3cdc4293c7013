"""Which kernels compute a step's attention over the paged cache on the device."""

from __future__ import annotations

from torch import Tensor

from venturi.kernels.attention import AttentionBatch, AttentionKind
from venturi.kernels.cudnn_prefill import prefill_long
from venturi.kernels.rotary import CacheScales
from venturi.kernels.triton_kernels import decode_rotated
from venturi.kernels.triton_kernels.decode import decode, num_splits
from venturi.kernels.triton_kernels.prefill import prefill
from venturi.kernels.triton_kernels.rotary import rotate_and_write


def rotated_attention(
    q: Tensor, k: Tensor, v: Tensor, angles: Tensor | None, interleaved: bool, k_cache: Tensor, v_cache: Tensor,
    batch: AttentionBatch, kind: AttentionKind, sinks: Tensor | None, scales: CacheScales | None,
) -> Tensor:  # fmt: skip
    """See `venturi.kernels.attention.rotated_attention`. Few decoding sequences take one launch instead of two."""
    if angles is not None and decode_rotated.fits(q, k, k_cache, v_cache, angles, batch):
        tile = decode_rotated.default_tile(len(q))
        splits = num_splits(len(q), k.shape[1], batch.max_keys, q.device, tile.keys)
        return decode_rotated.decode_rotated(
            q, k, v, angles, interleaved, k_cache, v_cache, batch, kind, sinks, splits, tile
        )  # fmt: skip
    q = rotate_and_write(q, k, v, angles, batch.positions, k_cache, v_cache, batch.slots, interleaved, scales)
    return paged_attention(q, k_cache, v_cache, batch, kind, sinks, scales)


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, kind: AttentionKind, sinks: Tensor | None,
    scales: CacheScales | None = None,
) -> Tensor:  # fmt: skip
    """See `venturi.kernels.attention.paged_attention`. For prefill, batch.workspace has tile_seq and tile_start.

    In a mixed batch the leading sequences of one token go through the decode kernel, long chunks through
    cuDNN, the others through our prefill kernel.
    """
    rows, kv_heads = len(batch.seq_lens), k_cache.shape[2]
    if batch.max_query == 1:
        splits = num_splits(rows, kv_heads, batch.max_keys, q.device)
        return decode(q, k_cache, v_cache, batch, kind, sinks, splits, scales=scales)
    out = prefill(q, k_cache, v_cache, batch, kind, sinks, scales=scales)
    for chunks in batch.long_chunks:
        prefill_long(q, k_cache, v_cache, chunks, kind, out)
    if batch.num_decodes:
        splits = num_splits(batch.num_decodes, kv_heads, batch.max_keys, q.device)
        decode(q[: batch.num_decodes], k_cache, v_cache, batch, kind, sinks, splits, out=out, scales=scales)
    return out
