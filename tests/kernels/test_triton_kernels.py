"""The Triton kernels of the LLM's layers, in Triton's interpreter, against their torch forms."""

from __future__ import annotations

import pytest
import torch

import tests.backends.cuda.interpreted  # noqa: F401  (before triton)
import tests.kernels.widen_kernel as interpreted
from venturi.kernels import attention as attention_reference
from venturi.kernels import rotary as rotary_reference
from venturi.kernels.activations import gated as gated_reference
from venturi.kernels.attention import AttentionBatch, AttentionKind
from venturi.kernels.norms import rms_norm as rms_norm_reference
from venturi.kernels.penalties import IN_PROMPT
from venturi.kernels.penalties import penalize as penalize_reference
from venturi.kernels.quantize import quantize_rows
from venturi.kernels.sampling import sample as sample_reference
from venturi.kernels.triton_kernels import activations, argmax, norms, penalties, quantize, rotary, sampling, step_start
from venturi.kernels.triton_kernels.attention_parts import TileConfig
from venturi.kernels.triton_kernels.decode import decode
from venturi.kernels.triton_kernels.decode_rotated import decode_rotated
from venturi.kernels.triton_kernels.prefill import prefill, tiles
from venturi.kernels.triton_kernels.small_linear import SmallLinearConfig, small_linear

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def close(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(dtype: torch.dtype, with_residual: bool) -> None:
    x, weight = torch.randn(5, 200, dtype=dtype), torch.randn(200, dtype=dtype)
    residual = torch.randn(5, 200, dtype=dtype) if with_residual else None
    theirs = rms_norm_reference(x, weight, 1e-6, None if residual is None else residual.clone(), offset=1.0)
    ours = norms.rms_norm(x, weight, 1e-6, residual, 1.0)
    close(ours[0], theirs[0], dtype)
    close(ours[1], theirs[1], dtype)


def test_rms_norm_of_heads_in_a_wider_row() -> None:
    wide, weight = torch.randn(3, 4 * 24 + 7), torch.randn(24)
    x = wide[:, : 4 * 24].view(3, 4, 24)
    close(norms.rms_norm(x, weight, 1e-6, None, 0.0)[0], rms_norm_reference(x, weight, 1e-6)[0], torch.float32)


@pytest.mark.parametrize("kind", ["silu", "gelu_pytorch_tanh"])
def test_gated(kind: str) -> None:
    x = torch.randn(3, 2 * 1100)
    x[0, 0], x[0, 1] = float("nan"), 90.0
    ours = activations.gated(x, "silu" if kind == "silu" else "gelu_tanh")
    torch.testing.assert_close(ours, gated_reference(x, kind), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [0, 5, 12])
@pytest.mark.parametrize("tokens", [3, 70])
def test_rotate_and_write(interleaved: bool, pairs: int, tokens: int) -> None:
    heads, kv_heads, dim = 5, 3, 24
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim)
    q, k, v = (x.view(tokens, -1, dim) for x in qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], 1))
    angles = torch.randn(50, 2 * pairs) if pairs else None
    positions, slots = torch.randint(0, 50, (tokens,)), torch.randperm(10 * 8)[:tokens]
    caches = [torch.zeros(10, 8, kv_heads, dim) for _ in range(4)]
    theirs = rotary_reference.rotate_and_write(
        q.clone(), k, v, angles, positions, caches[0], caches[1], slots, interleaved
    )
    ours = rotary.rotate_and_write(q, k, v, angles, positions, caches[2], caches[3], slots, interleaved)
    close(ours, theirs, torch.float32)
    close(caches[2], caches[0], torch.float32)
    close(caches[3], caches[1], torch.float32)


def make_batch(counts: list[int], lengths: list[int], size: int, blocks: int) -> AttentionBatch:
    wide = -(-max(lengths) // size)
    tables = torch.randperm(blocks)[: len(counts) * wide].view(len(counts), wide).int()
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    batch = AttentionBatch(
        torch.tensor(starts, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32), tables, torch.arange(len(counts)).flip(0).int(), torch.zeros(0), torch.zeros(0),
        max(counts), max(lengths), host=(starts, lengths),
    )  # fmt: skip
    sequences, offsets = tiles(starts, 16)
    batch.workspace.update(tile_seq=torch.tensor(sequences), tile_start=torch.tensor(offsets))
    return batch


KINDS = [AttentionKind(0.2), AttentionKind(0.2, window=13), AttentionKind(0.3, softcap=5.0)]


@pytest.mark.parametrize("kind", KINDS, ids=["plain", "window", "softcap"])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "k_dim", "v_dim"), [(6, 2, 24, 24), (4, 1, 144, 128), (3, 3, 16, 16), (20, 1, 144, 128)]
)
def test_paged_attention(kind: AttentionKind, sinks: bool, heads: int, kv_heads: int, k_dim: int, v_dim: int) -> None:
    lengths, size = [1, 70, 200], 8
    k_cache = torch.randn(90, size, kv_heads, k_dim)
    v_cache = k_cache[..., :v_dim] if v_dim < k_dim else torch.randn(90, size, kv_heads, v_dim)
    sink = torch.randn(heads) if sinks else None
    singles = make_batch([1, 1, 1], lengths, size, 90)
    q = torch.randn(3, heads, k_dim)
    theirs = attention_reference.paged_attention(q, k_cache, v_cache, singles, kind, sink)
    for splits in (1, 4):
        close(
            decode(q, k_cache, v_cache, singles, kind, sink, splits, TileConfig()),
            theirs,
            torch.float32,
        )
        assert not singles.workspace.get("tickets", torch.zeros(1)).any()
    mixed = make_batch([1, 37, 20], lengths, size, 90)
    q = torch.randn(58, heads, k_dim)
    theirs = attention_reference.paged_attention(q, k_cache, v_cache, mixed, kind, sink)
    close(prefill(q, k_cache, v_cache, mixed, kind, sink, TileConfig(32, 16)), theirs, torch.float32)


@pytest.mark.parametrize("kind", KINDS, ids=["plain", "window", "softcap"])
@pytest.mark.parametrize(
    ("size", "width", "group", "sinks"), [(8, 32, 2, False), (8, 64, 5, True), (32, 128, 2, True), (256, 64, 4, False)]
)
def test_paged_attention_over_an_fp8_cache(kind: AttentionKind, size: int, width: int, group: int, sinks: bool) -> None:
    lengths, tokens = [60, 100, 1], 256 * 10
    k_cache, v_cache = (torch.randn(tokens // size, size, 2, width).to(torch.float8_e4m3fn) for _ in range(2))
    batch = make_batch([1, 1, 1], lengths, size, tokens // size)
    q = torch.randn(3, 2 * group, width, dtype=torch.bfloat16)
    sink = torch.randn(2 * group) if sinks else None
    theirs = attention_reference.paged_attention(q.float(), k_cache, v_cache, batch, kind, sink)
    for splits, keys in ((1, 64), (4, 16)):
        ours = decode(q, k_cache, v_cache, batch, kind, sink, splits, TileConfig(keys))
        close(ours, theirs, torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS, ids=["plain", "window", "softcap"])
@pytest.mark.parametrize(
    ("width", "pairs", "interleaved", "group", "cache", "sinks"),
    [
        (16, 8, False, 2, torch.float32, False),
        (24, 12, True, 3, torch.float32, True),
        (40, 10, False, 1, torch.float32, False),
        (32, 12, True, 5, torch.bfloat16, False),
        (64, 32, False, 4, torch.float8_e4m3fn, True),
    ],
)
def test_rotation_write_and_decoding_in_one_launch(
    kind: AttentionKind, width: int, pairs: int, interleaved: bool, group: int, cache: torch.dtype, sinks: bool
) -> None:
    lengths, size, blocks, kv_heads = [1, 2, 70, 129], 8, 90, 2
    dtype = torch.float32 if cache == torch.float32 else torch.bfloat16
    k_cache, v_cache = (torch.randn(blocks, size, kv_heads, width).to(cache) for _ in range(2))
    batch = make_batch([1] * 4, lengths, size, blocks)
    rows = torch.randn(4, kv_heads * (group + 2) * width).to(dtype)
    q, k, v = rows.split([kv_heads * group * width, kv_heads * width, kv_heads * width], 1)
    q, k, v = q.view(4, -1, width), k.view(4, -1, width), v.view(4, -1, width)
    angles, sink = torch.randn(200, 2 * pairs), torch.randn(kv_heads * group) if sinks else None
    wide_k, wide_v = k_cache.to(dtype, copy=True), v_cache.to(dtype, copy=True)
    batch.positions = torch.tensor(lengths) - 1
    own = batch.block_tables[batch.table_rows.long()].long()
    batch.slots = own[torch.arange(4), batch.positions // size] * size + batch.positions % size
    turned = rotary_reference.rotate_and_write(
        q, k, v, angles, batch.positions, wide_k, wide_v, batch.slots, interleaved
    )
    theirs_k, theirs_v = wide_k.to(cache), wide_v.to(cache)
    theirs = attention_reference.paged_attention(turned.float(), theirs_k, theirs_v, batch, kind, sink)
    before = rows.clone()
    for splits, keys in ((1, 64), (4, 16)):
        ours_k, ours_v = k_cache.clone(), v_cache.clone()
        ours = decode_rotated(
            q, k, v, angles, interleaved, ours_k, ours_v, batch, kind, sink, splits, TileConfig(keys)
        )  # fmt: skip
        close(ours, theirs, dtype)
        assert torch.equal(ours_k.float(), theirs_k.float())
        assert torch.equal(ours_v.float(), theirs_v.float())
        assert not batch.workspace.get("tickets", torch.zeros(1)).any()
    assert torch.equal(rows, before), "the projections are left as they were"


def test_every_fp8_code_widens_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    columns = (codes, codes.flip(0), codes.roll(3), codes.roll(5))
    words = torch.stack(columns, 1).contiguous().view(torch.int32)
    out = torch.empty(4, 256, dtype=torch.float16)
    interpreted.widen_all[(1,)](words, out)
    for ours, column in zip(out, columns):
        wanted = column.view(torch.float8_e4m3fn).half()
        torch.testing.assert_close(ours, wanted, rtol=0, atol=0, equal_nan=True)


def test_argmax() -> None:
    logits = torch.randn(3, 20000, dtype=torch.bfloat16)
    logits[0, 5], logits[0, 17000] = 9.0, 9.0
    logits[1] = float("-inf")
    logits[1, 19999] = -3e38
    state = argmax.ArgmaxState.make(4, torch.device("cpu"))
    for _ in range(2):
        assert argmax.argmax(logits, state).tolist() == [5, 19999, int(logits[2].float().argmax())]


def test_argmax_remembers() -> None:
    logits = torch.randn(3, 500)
    state = argmax.ArgmaxState.make(3, torch.device("cpu"))
    last, ring = torch.full((6,), -7), torch.full((4, 3), -7)
    memory = argmax.Memory(last, torch.tensor([4, 0, 2], dtype=torch.int32), ring, torch.tensor([2]))
    best = argmax.argmax(logits, state, memory).tolist()
    assert last.tolist() == [best[1], -7, best[2], -7, best[0], -7]
    assert ring.tolist() == [[-7] * 3] * 2 + [best] + [[-7] * 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [64, 2048, 2050, 5000])
def test_step_start(dtype: torch.dtype, hidden: int) -> None:
    rows, entries = 3, 4
    weight = torch.randn(11, hidden, dtype=dtype)
    last = torch.tensor([7, 8, 9, 10])
    ring = torch.randint(0, 1 << 40, (entries, rows, step_start.FIELDS))
    numbers = step_start.StepNumbers.make(rows, torch.device("cpu"))
    for step in range(6):
        entry = ring[step % entries].T
        entry[0] = torch.tensor([step, -1, 3])
        entry[1] = torch.tensor([2, step % 4, 1])
        entry[4] = torch.tensor([step, 5, 1000])
        out = step_start.step_start(ring, numbers, last, weight, 1.5)
        wanted = weight[[step, int(last[step % 4]), 3]]
        torch.testing.assert_close(out, wanted * torch.tensor(1.5, dtype=dtype), rtol=0, atol=0)
        assert numbers.entry.item() == step % entries
        for got, field in zip((numbers.owners, numbers.positions, numbers.slots, numbers.lengths), entry[1:]):
            assert torch.equal(got.long(), field)


def test_sample() -> None:
    torch.manual_seed(0)
    rows, vocab = 12, 333
    logits = torch.randn(rows, vocab) * 3
    logits[3, 10] = float("-inf")
    temperature = torch.tensor([0.0, 1, 0.5, 2, 1, 1, 1, 1, 1, 1, 0.3, 1.5])
    top_k = torch.tensor([0, 0, 0, 0, 1, 5, 50, 400, 7, 0, 20, 3])
    top_p = torch.tensor([1, 1, 1, 0.9, 1, 1, 0.5, 0.8, 0.3, 0.01, 0.99, 1])
    min_p = torch.tensor([0, 0, 0.1, 0, 0, 0, 0, 0, 0.05, 0, 0, 0.02])
    for step in range(20):
        settings = (temperature, top_k, top_p, min_p, torch.arange(rows) * 12345678901, torch.full((rows,), step))
        assert sampling.sample(logits, *settings).tolist() == sample_reference(logits, *settings).tolist()


def test_sampling_follows_the_probabilities() -> None:
    probs = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    rows = 20000
    zeros, ones = torch.zeros(rows), torch.ones(rows)
    drawn = sample_reference(
        probs.log().expand(rows, 5), ones, zeros.long(), ones, zeros, torch.arange(rows), torch.full((rows,), 3)
    )
    share = torch.bincount(drawn, minlength=5) / rows
    torch.testing.assert_close(share, probs, rtol=0, atol=4 * (0.25 / rows) ** 0.5)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("rows", [1, 5, 20])
@pytest.mark.parametrize("parts", ["plain", "gated", "residual-bias", "fp8", "fp8-gated"])
def test_small_linear(splits: int, rows: int, parts: str) -> None:
    torch.manual_seed(0)
    n, k = 45, 90
    x, w = torch.randn(rows, k), torch.randn(2 * n if "gated" in parts else n, k)
    config = SmallLinearConfig(block_n=16, block_k=32, splits=splits)
    tickets = torch.zeros(8, dtype=torch.int32)
    extra = {"out_dtype": torch.float32}
    if "fp8" in parts:
        (w, scales), (x, x_scales) = quantize_rows(w), quantize_rows(x)
        extra |= {"scales": scales, "x_scales": x_scales}
        wanted = (x.float() * x_scales[:, None]) @ (w.float() * scales[:, None]).t()
    else:
        wanted = x @ w.t()
    if "gated" in parts:
        extra["gated"], wanted = "silu", gated_reference(wanted, "silu")
    if parts == "residual-bias":
        extra |= {"residual": torch.randn(rows, n), "bias": torch.randn(n)}
        wanted = wanted + extra["bias"] + extra["residual"]
    ours = small_linear(x, w, config, tickets=tickets, **extra)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    assert not tickets.any()


def test_rows_in_fp8() -> None:
    x = torch.randn(4, 200) * 5
    ours, scales = quantize.quantize_rows(x)
    theirs, wanted = quantize_rows(x)
    torch.testing.assert_close(scales, wanted)
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-3, atol=2**-9)  # a tie may round the other way
    assert (ours.float() != theirs.float()).float().mean() < 0.02


@pytest.mark.parametrize("with_residual", [False, True])
def test_norm_in_fp8(with_residual: bool) -> None:
    x, weight = torch.randn(4, 200) * 5, torch.randn(200)
    residual = torch.randn(4, 200) if with_residual else None
    normal, total = rms_norm_reference(x, weight, 1e-6, residual, offset=1.0)
    packed, scales, sums = norms.rms_norm_fp8(x, weight, 1e-6, residual, 1.0)
    torch.testing.assert_close(scales, normal.abs().amax(-1) / 448, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(packed.float() * scales[:, None], normal, rtol=2**-4, atol=float(scales.max()) * 2**-9)
    torch.testing.assert_close(sums, total)


@pytest.mark.parametrize("kind", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("rows,size", [(3, 7), (2, 1000)])
def test_gated_in_fp8(kind: str, rows: int, size: int) -> None:
    x = torch.randn(rows, 2 * size) * 3
    wanted = gated_reference(x, kind)
    packed, scales = activations.gated_fp8(x, "silu" if kind == "silu" else "gelu_tanh")
    torch.testing.assert_close(scales, wanted.abs().amax(-1) / 448, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(packed.float() * scales[:, None], wanted, rtol=2**-4, atol=float(scales.max()) * 2**-9)


def test_penalties() -> None:
    vocab = 5000
    logits, counts = torch.randn(4, vocab), torch.zeros(6, vocab, dtype=torch.int32)
    counts[:, torch.randperm(vocab)[:2000]] = torch.randint(0, 5, (6, 2000), dtype=torch.int32)
    counts[:, torch.randperm(vocab)[:1000]] += IN_PROMPT
    logits[0, :9] = float("-inf")
    rows, slots = torch.tensor([3, 0, 1]), torch.tensor([0, 5, 2])
    amounts = torch.tensor([[1.3, 1.0, 0.7], [0.5, 0.0, -0.2], [0.1, 0.3, 0.0]])
    ours, theirs = logits.clone(), logits.clone()
    penalties.penalize(ours, counts, rows, slots, *amounts)
    penalize_reference(theirs, counts, rows, slots, *amounts)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert torch.equal(ours[2], logits[2])
    assert not torch.equal(ours[0], logits[0])
