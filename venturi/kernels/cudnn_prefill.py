"""Prefill of long chunks through cuDNN's fused attention, over keys and values gathered from the paged cache.

Gathering costs a few percent of a long chunk's attention, and cuDNN's kernel is twice as fast as ours on Hopper. A plan
serves all lengths up to its own: lengths and offsets are data ("ragged" tensors with a padding mask), so that plans are
built for a few sizes only.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from venturi.kernels.attention import AttentionKind, LongChunks
from venturi.kernels.cudnn import frontend, handle

_Q, _K, _V, _OUT, _Q_LENGTHS, _K_LENGTHS, _Q_OFFSETS, _K_OFFSETS, _OUT_OFFSETS = range(1, 10)


def fits(k_dim: int, v_dim: int, kind: AttentionKind, sinks: bool) -> str | None:
    """Why cuDNN does not compute a layer's long chunks; None when it does."""
    if frontend() is None:
        return "nvidia-cudnn-frontend is not installed"
    if k_dim != v_dim or k_dim % 8 or k_dim > 128:
        return f"heads are {k_dim} and {v_dim} wide, not equal and a multiple of 8 up to 128"
    if kind.window is not None or kind.softcap is not None or sinks:
        return "a window, soft cap or sink"
    return None


@dataclass(frozen=True)
class Problem:
    """What a plan is built for: sizes are upper bounds, strides are in elements."""

    sequences: int
    max_queries: int
    max_keys: int
    heads: int
    kv_heads: int
    width: int
    q_row: int
    dtype: torch.dtype
    scale: float
    device: int


class Plan:
    """Raises RuntimeError or cudnnGraphNotSupportedError when cuDNN has none. Used by one thread at a time."""

    def __init__(self, p: Problem) -> None:
        cudnn = frontend()
        kind = {torch.float16: cudnn.data_type.HALF, torch.bfloat16: cudnn.data_type.BFLOAT16}[p.dtype]
        wide, whole, long = cudnn.data_type.FLOAT, cudnn.data_type.INT32, cudnn.data_type.INT64
        graph = cudnn.pygraph(io_data_type=kind, intermediate_data_type=wide, compute_data_type=wide, handle=handle())

        def heads(uid: int, count: int, length: int, row: int, offsets: Any) -> Any:
            shape, strides = [p.sequences, count, length, p.width], [length * row, p.width, row, 1]
            made = graph.tensor(dim=shape, stride=strides, data_type=kind).set_uid(uid)
            made.set_ragged_offset(offsets)
            return made

        def numbers(uid: int, count: int, kind: Any) -> Any:
            return graph.tensor(dim=[count, 1, 1, 1], stride=[1, 1, 1, 1], data_type=kind).set_uid(uid)

        n = p.sequences
        k_offsets, out_offsets = numbers(_K_OFFSETS, n + 1, long), numbers(_OUT_OFFSETS, n + 1, long)
        kv_row, out_row = p.kv_heads * p.width, p.heads * p.width
        out, _ = graph.sdpa(
            q=heads(_Q, p.heads, p.max_queries, p.q_row, numbers(_Q_OFFSETS, n + 1, long)),
            k=heads(_K, p.kv_heads, p.max_keys, kv_row, k_offsets),
            v=heads(_V, p.kv_heads, p.max_keys, kv_row, k_offsets),
            attn_scale=p.scale, generate_stats=False, use_padding_mask=True,
            seq_len_q=numbers(_Q_LENGTHS, n, whole), seq_len_kv=numbers(_K_LENGTHS, n, whole),
            diagonal_alignment=cudnn.diagonal_alignment.BOTTOM_RIGHT, diagonal_band_right_bound=0,
        )  # fmt: skip
        out.set_output(True).set_data_type(kind).set_uid(_OUT).set_dim([n, p.heads, p.max_queries, p.width])
        out.set_stride([p.max_queries * out_row, p.width, out_row, 1])
        out.set_ragged_offset(out_offsets)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A])
        graph.check_support()
        graph.build_plan_at_index(0)
        self._graph, self._workspace = graph, int(graph.get_workspace_size_plan_at_index(0))

    def run(self, tensors: dict[int, Tensor]) -> None:
        work = torch.empty(max(self._workspace, 1), dtype=torch.uint8, device=tensors[_Q].device)
        pack = {uid: tensor.data_ptr() for uid, tensor in tensors.items()}
        self._graph.execute_plan_at_index(pack, work, 0, handle=handle())


plan_for = functools.lru_cache(maxsize=256)(Plan)


def prefill_long(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, chunks: LongChunks, kind: AttentionKind, out: Tensor
) -> None:  # fmt: skip
    """Attention of the chunks' tokens, into their rows of out [tokens, heads, width]. q: rows of any stride."""
    from venturi.kernels.triton_kernels.gather import gather

    _, heads, width = q.shape
    kv_heads = k_cache.shape[2]
    rows = (q.stride(0), kv_heads * width, heads * width)
    if rows not in chunks.offsets:
        first_query, first_key = chunks.starts
        chunks.offsets[rows] = first_query * rows[0], first_key * rows[1], first_query * rows[2]
    q_offsets, k_offsets, out_offsets = chunks.offsets[rows]
    keys, values = gather(k_cache, v_cache, chunks.blocks, q.dtype)
    plan = plan_for(
        Problem(
            len(chunks.lengths[0]), chunks.max_queries, chunks.max_keys, heads, kv_heads, width, q.stride(0), q.dtype,
            kind.scale, q.device.index or 0,
        )
    )  # fmt: skip
    plan.run(
        {
            _Q: q, _K: keys, _V: values, _OUT: out, _Q_LENGTHS: chunks.lengths[0], _K_LENGTHS: chunks.lengths[1],
            _Q_OFFSETS: q_offsets, _K_OFFSETS: k_offsets, _OUT_OFFSETS: out_offsets,
        }
    )  # fmt: skip
