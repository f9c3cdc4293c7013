"""Which kernels compute a step's attention over the paged cache on the device."""

from __future__ import annotations

from torch import Tensor

from venturi.kernels.attention import AttentionBatch, AttentionKind
from venturi.kernels.cudnn_prefill import prefill_long
from venturi.kernels.triton_kernels.decode import decode, num_splits
from venturi.kernels.triton_kernels.prefill import prefill


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, kind: AttentionKind, sinks: Tensor | None
) -> Tensor:
    """See `venturi.kernels.attention.paged_attention`. For prefill, batch.workspace has tile_seq and tile_start.

    In a mixed batch the leading sequences of one token go through the decode kernel, long chunks through
    cuDNN, the others through our prefill kernel.
    """
    rows, kv_heads = len(batch.seq_lens), k_cache.shape[2]
    if batch.max_query == 1:
        return decode(q, k_cache, v_cache, batch, kind, sinks, num_splits(rows, kv_heads, batch.max_keys, q.device))
    out = prefill(q, k_cache, v_cache, batch, kind, sinks)
    for chunks in batch.long_chunks:
        prefill_long(q, k_cache, v_cache, chunks, kind, out)
    if batch.num_decodes:
        splits = num_splits(batch.num_decodes, kv_heads, batch.max_keys, q.device)
        decode(q[: batch.num_decodes], k_cache, v_cache, batch, kind, sinks, splits, out=out)
    return out
