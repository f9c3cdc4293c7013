"""The int8 KV cache on the device: codes, attention, and a model that generates over it, against the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu.test_llm import CONFIGS, GREEDY, LLAMA, logprobs, make, prompts, same_weights
from venturi.kernels.attention import AttentionBatch, AttentionKind, paged_attention
from venturi.kernels.rotary import quantize_heads, rotate_and_write
from venturi.kernels.triton_kernels.prefill import prefill_config, tiles
from venturi.llm.config import KvCacheConfig

pytestmark = pytest.mark.gpu


def test_rotate_and_write() -> None:
    tokens, heads, kv_heads, dim = 70, 32, 8, 128
    q, k, v = (torch.randn(tokens, n, dim).bfloat16() for n in (heads, kv_heads, kv_heads))
    angles, positions, slots = torch.randn(500, dim), torch.randint(0, 500, (tokens,)), torch.randperm(320)[:tokens]
    found = []
    for device in ("cpu", "cuda"):
        caches = [torch.zeros(10, 32, kv_heads, dim, dtype=torch.int8, device=device) for _ in "kv"]
        scales = tuple(torch.zeros(10, 32, kv_heads, device=device) for _ in "kv")
        given = [x.to(device) for x in (q.clone(), k, v, angles, positions)]
        rotate_and_write(*given, *caches, slots.to(device), False, scales)
        found.append([x.cpu() for x in (*caches, *scales)])
    for place in (0, 1):
        assert (found[0][place].int() - found[1][place].int()).abs().max() <= 1
        torch.testing.assert_close(found[1][2 + place], found[0][2 + place], rtol=1e-2, atol=0)


@pytest.mark.parametrize("counts", [[1, 1, 1], [1, 300, 77]], ids=["decode", "mixed"])
@pytest.mark.parametrize("kind", [AttentionKind(0.09), AttentionKind(0.09, window=100, softcap=20.0)])
def test_paged_attention(counts: list[int], kind: AttentionKind) -> None:
    lengths, size, heads, kv_heads, dim = [900, 555, 77], 32, 32, 8, 128
    k_cache, k_scale = quantize_heads(torch.randn(100, size, kv_heads, dim))
    v_cache, v_scale = quantize_heads(torch.randn(100, size, kv_heads, dim))
    starts = [sum(counts[:i]) for i in range(4)]
    tables = torch.randperm(99)[: 3 * 29].view(3, 29).int()
    q = torch.randn(sum(counts), heads, dim).bfloat16()

    def batch(device: str) -> AttentionBatch:
        made = AttentionBatch(
            torch.tensor(starts, dtype=torch.int32, device=device),
            torch.tensor(lengths, dtype=torch.int32, device=device), tables.to(device),
            torch.arange(3, dtype=torch.int32, device=device), torch.zeros(0), torch.zeros(0), max(counts),
            max(lengths), num_decodes=1, host=(starts, lengths),
        )  # fmt: skip
        sequences, offsets = tiles(starts, prefill_config(dim).queries, 1)
        for name, field in (("tile_seq", sequences), ("tile_start", offsets)):
            made.workspace[name] = torch.tensor(field, dtype=torch.int32, device=device)
        return made

    wide = k_cache.float() * k_scale[..., None], v_cache.float() * v_scale[..., None]
    theirs = paged_attention(q.float(), *wide, batch("cpu"), kind)
    given = [x.cuda() for x in (q, k_cache, v_cache)]
    ours = paged_attention(*given, batch("cuda"), kind, None, (k_scale.cuda(), v_scale.cuda()))
    torch.testing.assert_close(ours.float().cpu(), theirs, rtol=2e-2, atol=2e-2)


def test_generating(tmp_path: Path) -> None:
    """In fp32, so that codes agree with the CPU's but where a sum is rounded the other way."""
    kv = KvCacheConfig(max_tokens=4096, tokens_per_block=16, dtype="int8")
    config = CONFIGS["llama3"] | {k: LLAMA[k] for k in ("hidden_size", "head_dim", "intermediate_size", "vocab_size")}
    with (
        make(tmp_path, config, "cpu", "fp32", kv_cache=kv) as cpu,
        make(tmp_path, config, "cuda", "fp32", kv_cache=kv) as gpu,
    ):
        same_weights(cpu, gpu)
        for a, b in zip(cpu.generate(prompts(1000), GREEDY), gpu.generate(prompts(1000), GREEDY)):
            (tokens, rows), (own_tokens, own_rows) = logprobs(a), logprobs(b)
            agree = next((i for i, (s, t) in enumerate(zip(tokens, own_tokens)) if s != t), len(tokens))
            count = len(rows) - len(tokens) + agree
            torch.testing.assert_close(own_rows[:count], rows[:count], rtol=2e-2, atol=2e-2)
        gpu.check_integrity()
        assert "captured: [" in gpu.explain()
