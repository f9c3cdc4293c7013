"""Attention kernels on the GPU against the torch reference in fp32: fp8 words, long chunks through cuDNN."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from venturi.kernels.attention import AttentionBatch, AttentionKind, paged_attention
from venturi.kernels.cudnn import frontend
from venturi.llm import long_chunks
from venturi.llm.staging import Staging
from venturi.llm.step_inputs import StepInputs

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def batch_of(counts: list[int], lengths: list[int], size: int, blocks: int) -> AttentionBatch:
    wide = -(-max(lengths) // size)
    tables = torch.randperm(blocks)[: len(counts) * wide].view(len(counts), wide).int()
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    return AttentionBatch(
        torch.tensor(starts, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32), tables,
        torch.arange(len(counts)).int(), torch.zeros(0), torch.zeros(0), max(counts), max(lengths),
        num_decodes=sum(n == 1 for n in counts), host=(starts, lengths),
    )  # fmt: skip


def on_device(batch: AttentionBatch) -> AttentionBatch:
    return AttentionBatch(
        batch.query_starts.cuda(), batch.seq_lens.cuda(), batch.block_tables.cuda(), batch.table_rows.cuda(),
        batch.positions.cuda(), batch.slots.cuda(), batch.max_query, batch.max_keys, num_decodes=batch.num_decodes,
    )  # fmt: skip


@pytest.mark.parametrize("splits", [1, 8])
@pytest.mark.parametrize(("size", "width", "heads", "kv_heads"), [(32, 128, 32, 8), (16, 64, 9, 3), (128, 128, 8, 1)])
@pytest.mark.parametrize(
    "kind", [AttentionKind(0.1), AttentionKind(0.1, window=77), AttentionKind(0.1, softcap=9.0)], ids=str
)
def test_decode_over_fp8(splits: int, size: int, width: int, heads: int, kv_heads: int, kind: AttentionKind) -> None:
    from venturi.kernels.triton_kernels.decode import decode

    torch.manual_seed(1)
    lengths = [1, 33, 900, 4097, 64]
    batch = batch_of([1] * 5, lengths, size, 5 * 4128 // size + 9)
    shape = (5 * 4128 // size + 9, size, kv_heads, width)
    k_cache, v_cache = (torch.randn(shape).to(torch.float8_e4m3fn) for _ in range(2))
    q, sinks = torch.randn(5, heads, width, dtype=torch.bfloat16), torch.randn(heads)
    for sink in (None, sinks):
        theirs = paged_attention(q.float(), k_cache, v_cache, batch, kind, sink)
        ours = decode(
            q.cuda(),
            k_cache.cuda(),
            v_cache.cuda(),
            on_device(batch),
            kind,
            None if sink is None else sink.cuda(),
            splits,
        )
        torch.testing.assert_close(ours.float().cpu(), theirs, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(
    ("counts", "lengths"),
    [
        ([600], [600]),
        ([1, 1, 700, 20, 513, 1000, 3], [5, 2000, 700, 90, 2100, 1001, 3]),
        ([2048], [2048 + 3000]),
    ],
    ids=["alone", "mixed", "prefix"],
)
def test_long_chunks_through_cudnn(cache: torch.dtype, counts: list[int], lengths: list[int]) -> None:
    from venturi.kernels.triton_kernels.prefill import prefill_config, tiles

    assert frontend() is not None, "this test needs nvidia-cudnn-frontend"
    torch.manual_seed(2)
    size, heads, kv_heads, width, kind = 32, 8, 2, 128, AttentionKind(0.09)
    tokens, blocks = sum(counts), len(counts) * (-(-max(lengths) // size)) + 3
    batch = batch_of(counts, lengths, size, blocks)
    k_cache, v_cache = (torch.randn(blocks, size, kv_heads, width).to(cache) for _ in range(2))
    packed = torch.randn(tokens, (heads + 2 * kv_heads) * width, dtype=torch.bfloat16)
    q = packed[:, : heads * width].view(tokens, heads, width)
    starts, zero = np.array(batch.host[0]), np.zeros(0, dtype=np.int64)
    inputs = StepInputs(
        zero, zero, zero, zero, starts, np.array(lengths), batch.block_tables.numpy(), zero, zero, zero,
        batch.num_decodes, max(counts),
    )  # fmt: skip
    groups = long_chunks.group(inputs)
    assert groups == [[i for i, n in enumerate(counts) if n >= long_chunks.MIN_QUERIES]]
    device = on_device(batch)
    device.long_chunks = [long_chunks.upload(inputs, g, size, Staging(CUDA)) for g in groups]
    rows = prefill_config(width).queries
    sequences, offsets = tiles(starts.tolist(), rows, batch.num_decodes, set(groups[0]))
    ints = {"dtype": torch.int32, "device": CUDA}
    device.workspace.update(tile_seq=torch.tensor(sequences, **ints), tile_start=torch.tensor(offsets, **ints))
    on_gpu = packed.cuda()[:, : heads * width].view(tokens, heads, width)
    ours = paged_attention(on_gpu, k_cache.cuda(), v_cache.cuda(), device, kind)
    theirs = paged_attention(q.float(), k_cache, v_cache, batch, kind)
    torch.testing.assert_close(ours.float().cpu(), theirs, rtol=2e-2, atol=1e-2)
