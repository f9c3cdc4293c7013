"""Generated attention against fp64: sizes that fill no vector, heads that share keys, layouts, NaN, what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import onnx_ir as ir
import pytest
import torch

from tests.backends.cpu.harness import isas, run
from tests.backends.cpu.test_native_clusters import Sketch, check
from venturi.backends.cpu.codegen.attention import AttentionSpec, emit_attention
from venturi.backends.cpu.codegen.element import BF16, FLOAT, U8
from venturi.backends.cpu.codegen.isa import NEON, Isa
from venturi.backends.cpu.native.jit import optimized
from venturi.backends.cpu.tactics.native_attention import NativeAttention

T = torch.Tensor
# batch, queries, keys, heads, kv heads, dim, width of values
SIZES = [
    (1, 128, 128, 2, 2, 64, 64), (2, 7, 33, 3, 3, 16, 16), (1, 197, 197, 2, 2, 64, 64), (3, 49, 49, 2, 1, 32, 32),
    (2, 1, 5, 4, 2, 8, 24), (1, 20, 16, 2, 2, 40, 60), (1, 9, 70, 1, 1, 80, 1), (1, 30, 1, 2, 2, 17, 129),
]  # fmt: skip


def compute(isa: Isa, spec: AttentionSpec, batch: int, q: T, k: T, v: T, mask: T | None = None) -> T:
    """From [batch, heads, tokens, dim] as the spec lays it, and back; nothing else is written."""

    def laid(x: T) -> T:
        return (x.transpose(1, 2) if spec.flat else x).contiguous().to(spec.element.dtype)

    placed = [laid(x) for x in (q, k, v)]
    count = batch * spec.heads * spec.queries * spec.v_dim
    memory = torch.full((count + 128,), 7.0, dtype=spec.element.dtype)
    words = [*(x.data_ptr() for x in placed), memory[64:].data_ptr(), 0 if mask is None else mask.data_ptr()]
    run(isa, repr(spec), emit_attention(isa, spec), words, spec.tasks(batch))
    assert bool((memory[:64] == 7).all()), "written in front of the output"
    assert bool((memory[64 + count :] == 7).all()), "written behind the output"
    out = memory[64 : 64 + count]
    if spec.flat:
        return out.view(batch, spec.queries, spec.heads, spec.v_dim).transpose(1, 2)
    return out.view(batch, spec.heads, spec.queries, spec.v_dim)


def problem(size: Any, dtype: torch.dtype) -> tuple[T, T, T, T]:
    batch, queries, keys, heads, kv_heads, dim, v_dim = size
    torch.manual_seed(queries)
    q = (2 * torch.randn(batch, heads, queries, dim)).to(dtype)
    k, v = torch.randn(batch, kv_heads, keys, dim).to(dtype), torch.randn(batch, kv_heads, keys, v_dim).to(dtype)
    return q, k, v, expected(q, k, v)


def expected(q: T, k: T, v: T) -> T:
    group = q.shape[1] // k.shape[1]
    wide = [x.double().repeat_interleave(group, 1) for x in (k, v)]
    return torch.softmax(0.3 * q.double() @ wide[0].transpose(2, 3), -1) @ wide[1]


def spec_of(isa: Isa, size: Any, flat: bool, block: int, element: Any) -> AttentionSpec:
    _, queries, keys, heads, kv_heads, dim, v_dim = size
    rows = min({"avx512": 7, "avx2": 6, "neon": 7}[isa.name], queries)
    vectors = {"avx512": 4, "avx2": 2, "neon": 3}[isa.name]
    return AttentionSpec(
        queries, keys, heads, kv_heads, dim, v_dim, 0.3, flat, -(-min(block, queries) // rows) * rows, rows, vectors, element
    )  # fmt: skip


@pytest.mark.parametrize("isa", isas(), ids=lambda i: i.name)
@pytest.mark.parametrize("element", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_attention(isa: Isa, size: Any, flat: bool, element: Any) -> None:
    q, k, v, want = problem(size, element.dtype)
    results = []
    for block in (14, 1000):
        spec = spec_of(isa, size, flat, block, element)
        got = compute(isa, spec, size[0], q, k, v).double()
        tolerance = 2e-6 if element is FLOAT else 5e-3
        assert (got - want).abs().max() <= tolerance * max(1.0, float(want.abs().max()))
        results.append(got)
    assert torch.equal(*results), "the shares of the threads do not change results"


@pytest.mark.parametrize("isa", isas(), ids=lambda i: i.name)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_stays_in_its_head(isa: Isa, which: int, value: float) -> None:
    size = (1, 20, 21, 2, 2, 19, 18)
    q, k, v, _ = problem(size, torch.float32)
    (q, k, v)[which][0, 1, 3, 2] = value
    want = expected(q, k, v)
    got = compute(isa, spec_of(isa, size, True, 1000, FLOAT), 1, q, k, v)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    finite = want.isfinite()
    torch.testing.assert_close(got.double()[finite], want[finite], rtol=1e-5, atol=1e-5)


def test_code_compiles_for_arm() -> None:
    pytest.importorskip("llvmlite")
    module, machine = optimized(NEON, emit_attention(NEON, spec_of(NEON, SIZES[1], True, 14, FLOAT)))
    assert "fmla" in machine.emit_assembly(module)


@pytest.mark.parametrize("isa", isas(), ids=lambda i: i.name)
@pytest.mark.parametrize("kind", [FLOAT, BF16, U8], ids=str)
@pytest.mark.parametrize("batched, by_head", [(False, False), (True, False), (False, True), (True, True)])
def test_masks(isa: Isa, kind: Any, batched: bool, by_head: bool) -> None:
    """Numbers are added; what is not seen counts for nothing, NaN included; who sees nothing gets 0."""
    size = (2, 19, 37, 4, 2, 24, 20)
    q, k, v, _ = problem(size, torch.float32)
    shape = (2 if batched else 1, 4 if by_head else 1, 19, 37)
    if kind is U8:
        mask = torch.rand(shape) < 0.6
        mask[..., 5, :], mask[..., 3] = False, False
        mask[..., 0, 0] = True
        k[:, :, 3] = float("nan")
    else:
        mask = torch.randn(shape).to(kind.dtype)
        mask[..., 5, :], mask[..., 2, 4:9] = -float("inf"), -float("inf")
    wide = [x.double().repeat_interleave(2, 1) for x in (k, v)]
    scores = 0.3 * q.double() @ wide[0].transpose(2, 3)
    scores = scores.masked_fill(~mask, -float("inf")) if kind is U8 else scores + mask.double()
    want = torch.nan_to_num(torch.softmax(scores, -1)) @ wide[1]
    spec = spec_of(isa, size, True, 14, FLOAT)
    spec = dataclasses.replace(spec, mask=kind, mask_batch=batched, mask_heads=by_head)
    got = compute(isa, spec, 2, q, k, v, mask).double()
    assert (got - want).abs().max() <= 2e-6 * max(1.0, float(want.abs().max()))
    assert not got[..., 5, :].any()


def view(keys: int = 20, mask: Any = None, **attrs: Any) -> Any:
    s = Sketch()
    operands = [s.input((2, 12, 48)), s.input((2, keys, 16)), s.input((2, keys, 20))]
    if mask is not None:
        operands.append(s.weight(mask) if isinstance(mask, torch.Tensor) else s.input(mask))
        if isinstance(mask, torch.Tensor):
            operands[-1].dtype = ir.DataType.BOOL
    s.add("Attention", operands, (2, 12, 60), q_num_heads=3, kv_num_heads=1, **attrs)
    return s.view()


@pytest.mark.skipif(not isinstance(isas()[0], Isa), reason="no code is generated for this machine")
def test_what_the_tactic_takes_and_leaves() -> None:
    check(NativeAttention(), view(), torch.randn(2, 12, 48), torch.randn(2, 20, 16), torch.randn(2, 20, 20))
    check(
        NativeAttention(),
        view(mask=(12, 20)),
        torch.randn(2, 12, 48),
        torch.randn(2, 20, 16),
        torch.randn(2, 20, 20),
        torch.randn(12, 20),
    )
    check(
        NativeAttention(),
        view(mask=torch.rand(2, 3, 12, 20) < 0.7),
        torch.randn(2, 12, 48),
        torch.randn(2, 20, 16),
        torch.randn(2, 20, 20),
    )
    assert "mask of [1, 20]" in str(NativeAttention().match(view(mask=(1, 20))))
    assert "mask of []" in str(NativeAttention().match(view(mask=())))
    check(NativeAttention(), view(is_causal=1), torch.randn(2, 12, 48), torch.randn(2, 20, 16), torch.randn(2, 20, 20))
    assert "causal and a mask" in str(NativeAttention().match(view(mask=(12, 20), is_causal=1)))
    assert "empty" in str(NativeAttention().match(view(keys=0)))
    assert "more keys" in str(NativeAttention().match(view(keys=20000)))
    assert "softcap" in str(NativeAttention().match(view(softcap=2.0)))


@pytest.mark.parametrize("isa", isas(), ids=lambda i: i.name)
@pytest.mark.parametrize("element", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_queries_see_no_later_keys(isa: Isa, size: Any, element: Any) -> None:
    """Values that no query sees are not even read: they are NaN here."""
    q, k, v, _ = problem(size, element.dtype)
    hidden = torch.ones(size[1], size[2], dtype=torch.bool).triu(1)
    group = q.shape[1] // k.shape[1]
    wide = [x.double().repeat_interleave(group, 1) for x in (k, v)]
    scores = (0.3 * q.double() @ wide[0].transpose(2, 3)).masked_fill(hidden, -torch.inf)
    want = torch.softmax(scores, -1) @ wide[1]
    v[:, :, size[1] :] = torch.nan
    for block in (7, 64):
        spec = dataclasses.replace(spec_of(isa, size, True, block, element), causal=True)
        got = compute(isa, spec, size[0], q, k, v).double()
        limit = 2e-6 if element is FLOAT else 2**-8
        assert (got - want).abs().max() <= limit * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("isa", isas(), ids=lambda i: i.name)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [s for s in SIZES if s[1] == s[2]], ids=str)
def test_operands_in_one_tensor_give_the_same_bits(isa: Isa, size: Any, causal: bool) -> None:
    batch, tokens, _, heads, kv_heads, dim, v_dim = size
    q, k, v, _ = problem(size, torch.float32)
    spec = dataclasses.replace(spec_of(isa, size, True, 14, FLOAT), causal=causal)
    want = compute(isa, spec, batch, q, k, v)
    whole = torch.cat([x.transpose(1, 2).reshape(batch, tokens, -1) for x in (q, k, v)], -1).contiguous()
    spec = dataclasses.replace(spec, packed=True)
    out = torch.full((batch, tokens, heads * v_dim), 7.0)
    words = [whole.data_ptr()] * 3 + [out.data_ptr(), 0]
    run(isa, repr(spec), emit_attention(isa, spec), words, spec.tasks(batch))
    assert torch.equal(out.view(batch, tokens, heads, v_dim).transpose(1, 2), want)
