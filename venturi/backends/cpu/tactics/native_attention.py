"""Attention by generated code, for as many keys as a head's fit in the second-level cache."""

from __future__ import annotations

import math

import onnx_ir as ir
import torch

from venturi.backends.base import OUT, Config, Kernel, Operand, Phase, RegionView, Routine
from venturi.backends.cpu.codegen.attention import AttentionSpec, emit_attention
from venturi.backends.cpu.codegen.element import BF16, FLOAT, OF_GRAPH, U8
from venturi.backends.cpu.codegen.isa import Isa, host
from venturi.backends.cpu.native.contraction import TILES
from venturi.backends.cpu.native.jit import host_jit
from venturi.backends.cpu.native.kernel import NativeKernel, Shapes
from venturi.backends.cpu.native.openmp import max_threads
from venturi.backends.cpu.tactics.reference import Reference
from venturi.backends.sdpa import packed_widths, plain_attention
from venturi.ir.build import static_shape
from venturi.ir.dtypes import DT

MOST_BYTES = 512 << 10
MASKS = {DT.FLOAT: FLOAT, DT.BFLOAT16: BF16, DT.BOOL: U8}


class NativeAttention:
    """Causal, or with masks of fixed sizes. [batch, tokens, heads * dim], all three in one tensor or each in its own,
    or [batch, heads, tokens, dim]."""

    name = "native-attention"

    def match(self, region: RegionView) -> list[Config] | str:
        isa = host()
        if isinstance(isa, str):
            return isa
        refused = plain_attention(region)
        if refused:
            return refused
        node, mask = region.nodes[-1], _mask(region)
        operands, sources = list(node.inputs[:3]), _sources(region)
        kinds = {v.dtype for v in (*operands, node.outputs[0]) if v is not None}
        if len(kinds) != 1 or not kinds <= set(OF_GRAPH) or (mask is not None and mask.dtype not in MASKS):
            return "not fp32 or bf16 throughout"
        if len({id(v) for v in operands}) != 3 or any(region.is_constant(v) for v in sources):
            return "queries, keys and values are not three inputs"
        sizes = [static_shape(v) for v in operands if v is not None]
        covers = None if mask is None else static_shape(mask)
        if (mask is not None and covers is None) or any(s is None for s in sizes):
            return "code would depend on sizes that are only known at run time"
        spec = _spec(isa, region, tuple(tuple(s or ()) for s in sizes), None if covers is None else tuple(covers))
        return spec if isinstance(spec, str) else [{}]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        isa, mask = host(), _mask(region)
        assert isinstance(isa, Isa)
        constant = None if mask is None or not region.is_constant(mask) else region.constant(mask).contiguous()
        where = [region.position(v) or 0 for v in _sources(region)]
        widths = packed_widths(region)
        mask_at = None if mask is None or constant is not None else region.position(mask) or 0

        fixed = None if constant is None else tuple(constant.shape)

        def plan(shapes: Shapes) -> Routine | None:
            covers = fixed if mask_at is None else shapes[mask_at]
            found = [shapes[i] for i in where]
            if widths:
                found = [(*found[0][:-1], w) for w in widths]
            spec = _spec(isa, region, tuple(found), covers)
            if isinstance(spec, str):
                return None
            address = host_jit(isa).address(repr(spec), lambda: emit_attention(isa, spec))
            last = Operand(mask_at) if mask_at is not None else 0 if constant is None else constant.data_ptr()
            batch, width = shapes[where[0]][0], spec.v_dim
            shape = (batch, spec.queries, spec.heads * width) if spec.flat else (batch, spec.heads, spec.queries, width)
            phase = Phase(address, (*map(Operand, where), OUT, last), spec.tasks(batch))
            plain = torch.contiguous_format
            return Routine((phase,), shape, plain, (plain,) * len(shapes), dtype=spec.element.dtype)

        return NativeKernel(plan, Reference().bind(region, {}).run, constant).as_kernel()


def _mask(region: RegionView) -> ir.Value | None:
    operands = region.nodes[-1].inputs
    return operands[3] if len(operands) > 3 else None


def _sources(region: RegionView) -> list[ir.Value | None]:
    """The inputs that queries, keys and values lie in."""
    return [region.nodes[0].inputs[0]] * 3 if packed_widths(region) else list(region.nodes[-1].inputs[:3])


def _spec(isa: Isa, region: RegionView, shapes: Shapes, mask: tuple[int, ...] | None) -> AttentionSpec | str:
    """For these shapes of queries, keys and values, and of the mask, if there is one; a text says why there is none."""
    attrs, element = region.attrs(region.nodes[-1]), OF_GRAPH[region.outputs[0].dtype]  # type: ignore[index]
    q, k, v = shapes
    if len({len(q), len(k), len(v)}) != 1 or 0 in (*q, *k, *v) or not q[0] == k[0] == v[0]:
        return "empty, or sizes that do not fit each other"
    flat = len(q) == 3
    heads, kv_heads = (attrs.get("q_num_heads"), attrs.get("kv_num_heads")) if flat else (q[1], k[1])
    at = 1 if flat else 2
    if not heads or not kv_heads or heads % kv_heads or k[at] != v[at] or (not flat and k[1] != v[1]):
        return "heads or keys do not fit each other"
    dim, k_dim, v_dim = (n // h if flat else n for n, h in ((q[-1], heads), (k[-1], kv_heads), (v[-1], kv_heads)))
    if dim != k_dim or (flat and (q[-1] % heads or k[-1] % kv_heads or v[-1] % kv_heads)):
        return "queries and keys differ in width"
    queries, keys = q[at], k[at]
    covers = () if mask is None else (1, 1, *mask) if len(mask) == 2 else mask
    if mask is not None and (
        len(covers) != 4 or covers[2:] != (queries, keys) or covers[0] not in (1, q[0]) or covers[1] not in (1, heads)
    ):
        return f"a mask of {list(mask)}"
    rows, vectors, _ = TILES[isa.name][0]
    rows = min(rows, queries)
    parts = max(1, min(-(-4 * max_threads() // (q[0] * heads)), queries // rows))
    scale = attrs.get("scale")
    kind = MASKS[_mask(region).dtype] if covers else None  # type: ignore[union-attr, index]
    spec = AttentionSpec(
        queries, keys, heads, kv_heads, dim, v_dim, 1 / math.sqrt(dim) if scale is None else float(scale), flat,
        -(-queries // (parts * rows)) * rows, rows, vectors, element, kind, bool(covers) and covers[0] > 1,
        bool(covers) and covers[1] > 1, bool(attrs.get("is_causal")), packed_widths(region) is not None,
    )  # fmt: skip
    return spec if spec.stack_bytes(isa) <= MOST_BYTES else "more keys than a cache holds"
