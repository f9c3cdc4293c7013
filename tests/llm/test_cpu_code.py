"""Generated code of language models on the CPU: linear layers of any number of rows, attention over a paged cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from venturi.backends.cpu.codegen.isa import host
from venturi.kernels.attention import AttentionBatch, AttentionKind, rotated_attention
from venturi.llm.cpu_code import generated_attention, multiplier

T = torch.Tensor
pytestmark = pytest.mark.skipif(isinstance(host(), str), reason=str(host()))
needs_bf16 = pytest.mark.skipif(multiplier() is None, reason="this CPU does not multiply bf16")


# --- linear layers
@needs_bf16
@pytest.mark.parametrize("size", [(64, 32), (100, 19), (33, 1), (1, 40), (896, 1152)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_of_any_number_of_rows(size: tuple[int, int], bias: bool) -> None:
    from venturi.backends.cpu.native.rows_linear import RowsLinear

    torch.manual_seed(0)
    k, n = size
    weight, b = torch.randn(n, k).bfloat16(), torch.randn(n).bfloat16() if bias else None
    isa = multiplier()
    assert isa is not None
    linear = RowsLinear(isa, weight, b)
    for rows in (0, 1, 2, 3, 5, 8, 13, 14, 15, 16, 29, 61, 130):
        x = torch.randn(rows, k).bfloat16()
        want = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
        got = linear(x)
        assert got.shape == (rows, n)
        assert got.dtype == torch.bfloat16
        if rows:
            assert (got.double() - want).abs().max() <= 2**-8 * want.abs().max()
            strided = torch.cat((x, x), 1)[:, :k]
            assert torch.equal(linear(strided), got)


@needs_bf16
def test_rows_do_not_depend_on_each_other() -> None:
    """A row that is not finite stays one row, and a row's result is the same in every company of its group's size."""
    from venturi.backends.cpu.native.rows_linear import RowsLinear

    isa = multiplier()
    assert isa is not None
    linear = RowsLinear(isa, torch.randn(40, 70).bfloat16(), None)
    x = torch.randn(20, 70).bfloat16()
    clean = linear(x)
    x[7] = torch.nan
    spoilt = linear(x)
    assert bool(spoilt[7].isnan().all())
    keep = torch.arange(20) != 7
    assert torch.equal(spoilt[keep], clean[keep])


# --- attention
@dataclass
class Case:
    """`lengths` of sequences with `news` new tokens each."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    v_dim: int = 64
    pairs: int = 32
    block: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    lengths: tuple[int, ...] = (1, 16, 70, 130)
    news: tuple[int, ...] = (1, 1, 1, 1)


CASES = {
    "decode": Case(),
    "prefill": Case(lengths=(5, 40, 70), news=(5, 7, 1)),
    "one-kv-head": Case(heads=7, kv_heads=1),
    "many-heads-a-kv-head": Case(heads=24, kv_heads=2, dim=32, v_dim=32, pairs=16),
    "no-groups": Case(heads=3, kv_heads=3, dim=128, v_dim=128, pairs=64),
    "partly-rotated": Case(dim=96, v_dim=96, pairs=16),
    "not-rotated": Case(pairs=0),
    "narrow-values": Case(v_dim=32),
    "wide-values": Case(dim=256, v_dim=256, pairs=128, heads=8, kv_heads=1),
    "window": Case(window=33, lengths=(1, 33, 34, 130)),
    "window-in-prefill": Case(window=5, lengths=(20, 12), news=(20, 3)),
    "softcap": Case(softcap=2.0),
    "sinks": Case(sinks=True),
    "odd-blocks": Case(block=5),
}


def problem(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(len(case.lengths))
    needed = [-(-n // case.block) for n in case.lengths]
    order = torch.randperm(sum(needed) + 3)[: sum(needed)].tolist()
    tables = torch.zeros(len(needed), max(needed) + 2, dtype=torch.int32)
    for row, count in enumerate(needed):
        tables[row, :count] = torch.tensor([order.pop() for _ in range(count)])
    positions = [p for n, new in zip(case.lengths, case.news) for p in range(n - new, n)]
    rows = [r for r, new in enumerate(case.news) for _ in range(new)]
    slots = [int(tables[r, p // case.block]) * case.block + p % case.block for r, p in zip(rows, positions)]
    starts = torch.tensor([0, *case.news]).cumsum(0)
    batch = AttentionBatch(
        starts.int(), torch.tensor(case.lengths).int(), tables, torch.arange(len(needed)), torch.tensor(positions),
        torch.tensor(slots), max(case.news), max(case.lengths), host=(starts.tolist(), list(case.lengths)),
    )  # fmt: skip
    tokens, wide = sum(case.news), case.heads * case.dim
    whole = torch.randn(tokens, wide + case.kv_heads * (case.dim + case.v_dim)).to(dtype)
    q, k, v = whole.split([wide, case.kv_heads * case.dim, case.kv_heads * case.v_dim], -1)
    angle = torch.rand(200, case.pairs) * 6
    blocks = sum(needed) + 4
    return {
        "q": q.view(tokens, case.heads, case.dim), "k": k.view(tokens, case.kv_heads, case.dim),
        "v": v.view(tokens, case.kv_heads, case.v_dim),
        "angles": torch.cat((angle.cos(), angle.sin()), 1) if case.pairs else None, "interleaved": False,
        "k_cache": torch.randn(blocks, case.block, case.kv_heads, case.dim).to(dtype),
        "v_cache": torch.randn(blocks, case.block, case.kv_heads, case.v_dim).to(dtype),
        "batch": batch, "kind": AttentionKind(0.3, case.window, case.softcap),
        "sinks": torch.randn(case.heads) if case.sinks else None,
    }  # fmt: skip


def both(case: Case, dtype: torch.dtype) -> tuple[list[T], list[T]]:
    """(results, caches) by torch and by generated code."""
    found = []
    for generated in (None, generated_attention()):
        given = problem(case, dtype)
        given["batch"].generated = generated
        if generated is not None:
            out = generated(**given)
            assert out is not None, "no code is generated for this"
        else:
            out = rotated_attention(**given)
        found.append([out, given["k_cache"], given["v_cache"]])
    return found[0], found[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_attention_over_a_paged_cache(name: str, dtype: torch.dtype) -> None:
    want, got = both(CASES[name], dtype)
    for i, (w, g) in enumerate(zip(want, got)):
        assert g.shape == w.shape
        assert g.dtype == w.dtype
        # torch rounds rotated queries to bf16, which the code keeps in fp32: scores of size 10 differ by 2^-8 of that
        limit = 1e-5 if dtype == torch.float32 else 2**-7 if i else 2**-4
        assert (g.double() - w.double()).abs().max() <= limit * max(1.0, float(w.double().abs().max()))


def test_a_token_gets_the_same_bits_alone_and_in_company() -> None:
    case = CASES["decode"]
    given = problem(case, torch.bfloat16)
    generated = generated_attention()
    assert generated is not None
    whole = generated(**given)
    assert whole is not None
    batch = given["batch"]
    for i in range(len(case.lengths)):
        own = AttentionBatch(
            torch.tensor([0, 1]).int(), batch.seq_lens[i : i + 1], batch.block_tables, torch.tensor([i]),
            batch.positions[i : i + 1], batch.slots[i : i + 1], 1, case.lengths[i], host=([0, 1], [case.lengths[i]]),
        )  # fmt: skip
        alone = generated(**given | {n: given[n][i : i + 1] for n in "qkv"} | {"batch": own})
        assert alone is not None
        assert torch.equal(alone[0], whole[i])


@pytest.mark.parametrize("case", ["interleaved", "odd-dim", "odd-pairs", "long", "half", "bytes"])
def test_what_stays_with_torch(case: str) -> None:
    shape = {"odd-dim": Case(dim=40, pairs=16), "odd-pairs": Case(pairs=8), "long": Case(lengths=(300,), news=(300,))}
    given = problem(shape.get(case, Case()), torch.float16 if case == "half" else torch.bfloat16)
    if case == "interleaved":
        given["interleaved"] = True
    if case == "long":
        given["angles"] = torch.cat([given["angles"]] * 2)
    if case == "bytes":
        given["k_cache"] = given["k_cache"].to(torch.int8)
    generated = generated_attention()
    assert generated is not None
    assert generated(**given) is None
