"""The seam between graph and machine: RegionView (what to compute), Tactic (a way to do it), Kernel (ready to run)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch

from venturi.backends.reference.program import attribute_value
from venturi.ir.build import get_attr, subgraphs
from venturi.ir.dtypes import DT
from venturi.ir.marks import LAYOUT, rounds_to_tf32
from venturi.ir.quantization import FP8
from venturi.ir.region import body_of, is_region, kind_of, members, source_names
from venturi.ops.table import OpContext, find_op

Config = Mapping[str, Any]
T = torch.Tensor


@dataclass(frozen=True)
class Operand:
    """In a phase's words: the address of an input by number, of the output (OUT) or of scratch memory (SCRATCH)."""

    index: int

    @property
    def is_out(self) -> bool:
        return self.index == -1

    @property
    def is_scratch(self) -> bool:
        return self.index == -2


OUT, SCRATCH = Operand(-1), Operand(-2)


@dataclass(frozen=True)
class Phase:
    """One parallel loop of `tasks` tasks over the machine code at `address`, which reads `words`."""

    address: int
    words: tuple[int | Operand, ...]
    tasks: int


@dataclass(frozen=True)
class Routine:
    """What generated code does at fixed shapes: phases one after the other, with `scratch` bytes between them.

    `layouts` say how the inputs must lie, `layout` how the output of `dtype` will.
    """

    phases: tuple[Phase, ...]
    shape: tuple[int, ...]
    layout: torch.memory_format
    layouts: tuple[torch.memory_format, ...]
    scratch: int = 0
    dtype: torch.dtype = torch.float32

    def empty(self) -> T:
        """Memory for the output."""
        return torch.empty(self.shape, dtype=self.dtype, memory_format=self.layout)


class ParallelKernel(Protocol):
    """Generated code that can run inside a segment of a Plan."""

    def routine(self, shapes: tuple[tuple[int, ...], ...]) -> Routine | None: ...

    def prepared(self, inputs: Sequence[T]) -> Callable[[], object] | None:
        """A call that does what a segment does for the kernel: no Python around the machine code."""
        ...


@dataclass(frozen=True)
class Kernel:
    """Something to call with a Region's dynamic inputs, in order.

    `run` returns the output, or a tuple of outputs. `run_out`, where there is one, writes the single output into a
    given tensor instead. Neither mutates its inputs; both are thread-safe. `joins` says that the output is the inputs
    side by side along that axis, and that `run_out` leaves alone what already lies there. `parallel` is there for
    generated code: runs of neighbouring steps then cost one native call. `reads`: of a library kernel that copies its
    first input where that lies in another order.
    """

    run: Callable[..., Any]
    run_out: Callable[..., object] | None = None
    joins: int | None = None
    parallel: ParallelKernel | None = None
    reads: torch.memory_format | None = None


class RegionView:
    """A Region (or a single node) with its weights as stored tensors.

    Values are seen from inside: `inputs` are the body's formal inputs, `constant(v)` gives the weight behind one.
    """

    def __init__(self, node: ir.Node, weights: Mapping[str, Any]) -> None:
        self.node = node
        self.weights = weights
        self.nodes = members(node)
        self.kind = kind_of(node) if is_region(node) else node.op_type
        outer = list(node.inputs)
        self.formal = list(body_of(node).inputs) if is_region(node) else outer
        self._outer = dict(zip(self.formal, outer)) if is_region(node) else {v: v for v in outer if v is not None}
        self.dynamic = [v for v in self.formal if v is not None and not self.is_constant(v)]
        self.outputs = list(body_of(node).outputs) if is_region(node) else list(node.outputs)

    @property
    def name(self) -> str:
        return self.node.name or ""

    @property
    def anchor(self) -> ir.Node:
        return self.nodes[0]

    @property
    def layout(self) -> str:
        """ "NHWC" where the layout pass asked for channels-last values, else ""."""
        return self.node.metadata_props.get(LAYOUT, "")

    @property
    def tf32(self) -> bool:
        """Whether products of fp32 may round their operands to tf32."""
        return any(rounds_to_tf32(n) for n in self.nodes)

    @property
    def sources(self) -> list[str]:
        return source_names(self.node)

    def outer(self, value: ir.Value) -> ir.Value | None:
        """The value of the graph behind a formal input."""
        return self._outer.get(value)

    def is_input(self, value: ir.Value) -> bool:
        """Whether the body reads `value` from outside."""
        return any(value is f for f in self.formal)

    def constant(self, value: ir.Value | None) -> Any:
        """The stored weight behind an input, or None when it is computed."""
        if value is None:
            return None
        outer = self._outer.get(value)
        return self.weights.get(outer.name or "") if outer is not None else None

    def is_constant(self, value: ir.Value | None) -> bool:
        """Whether a weight is behind an input, without fetching it."""
        outer = None if value is None else self._outer.get(value)
        return outer is not None and (outer.name or "") in self.weights

    def position(self, value: ir.Value | None) -> int | None:
        """Index of a formal input among the dynamic ones."""
        return next((i for i, v in enumerate(self.dynamic) if v is value), None)

    def attrs(self, node: ir.Node) -> dict[str, Any]:
        return {k: attribute_value(a) for k, a in node.attributes.items() if a.type != ir.AttributeType.GRAPH}

    def signature(self) -> str:
        """What the Region computes, without names: operators, attributes, wiring, constant shapes and types."""
        number = {v: i for i, v in enumerate(self.formal) if v is not None}
        parts = []
        for node in self.nodes:
            for v in node.outputs:
                number[v] = len(number)
            wires = ",".join("_" if v is None else str(number.get(v, "?")) for v in node.inputs)
            attrs = ",".join(f"{k}={_attr_text(node, k)}" for k in sorted(node.attributes))
            parts.append(f"{node.domain}:{node.op_type}({wires}){{{attrs}}}x{len(node.outputs)}")
        constants = [f"{tuple(c.shape)}{c.dtype}" for v in self.formal if (c := self.constant(v)) is not None]
        return ";".join(parts) + "|" + ",".join(constants) + ("|tf32" if self.tf32 else "")


def _attr_text(node: ir.Node, name: str) -> str:
    if subgraphs(node):
        return node.name or ""
    value = get_attr(node, name)
    if getattr(value, "dtype", None) == ir.DataType.STRING:
        return repr(value.numpy().tolist())
    if hasattr(value, "tobytes"):
        return hashlib.sha256(value.tobytes()).hexdigest()[:12]
    return repr(value)


class Tactic(Protocol):
    """One way to compute Regions. Tactics are stateless; `name` is unique within a backend."""

    name: str

    def match(self, region: RegionView) -> list[Config] | str:
        """The configurations worth timing, best guess first, or the reason why this tactic cannot serve."""
        ...

    def bind(self, region: RegionView, config: Config) -> Kernel:
        """Prepare weights and return the kernel. Called once a load; may take milliseconds, not seconds."""
        ...


@dataclass(frozen=True)
class Backend:
    """A device's ordered tactics: preferred first, the reference last.

    Inside `exact()` the reference computes by the plainest algorithms: what candidates are verified against.
    `plain()`: by the operators' definitions, however slow. Libraries of half precision may let a NaN reach more results
    than it should; a candidate that agrees with the definition is right all the same.
    `fuses_quantized`: there are kernels for contractions between dequantized inputs and a quantized output.
    `signed_bytes`: and only for signed integers. `rounds_within`: "sums" where they may also round to bytes
    right behind the sums, "anywhere" in what follows.
    `fuses_fp8`: there are kernels for contractions between dequantized e4m3, and results in it.
    `fuses_dynamic`: there are kernels for products of what is rounded by its own range.
    `flat_attention`: kernels of attention take [batch, tokens, heads * dim] as well as [batch, heads, tokens, dim].
    `packed_attention`: and all three operands from one tensor.
    `joins_pairs`: there are kernels for two Regions in one.
    `is_well()`: the device can still be used by this process; after some faults it cannot.
    """

    name: str
    tactics: tuple[Tactic, ...]
    exact: Callable[[], AbstractContextManager[object]] = nullcontext
    plain: Callable[[], AbstractContextManager[object]] | None = None
    fuses_quantized: bool = False
    signed_bytes: bool = False
    rounds_within: str = ""
    fuses_fp8: bool = False
    fuses_dynamic: bool = False
    flat_attention: bool = False
    packed_attention: bool = False
    joins_pairs: bool = False
    is_well: Callable[[], bool] = lambda: True
    _by_name: dict[str, Tactic] = field(default_factory=dict)

    def tactic(self, name: str) -> Tactic | None:
        if not self._by_name:
            self._by_name.update({t.name: t for t in self.tactics})
        return self._by_name.get(name)


def op_context(node: ir.Node) -> OpContext:
    return OpContext(
        tuple(None if v is None else v.dtype for v in node.inputs),
        tuple(v.dtype for v in node.outputs),
        len(node.outputs),
        node.name or "",
    )


def region_ulps(region: RegionView) -> float:
    """Accepted error of the Region, in units of its output's type: the sum over its nodes, since each may add its own.

    Where an fp32 result comes from values that the graph keeps in half precision, it is as uncertain as they are: the
    reference rounds them one by one, a fused kernel need not. Operands that may be rounded to tf32 are as
    uncertain as fp16.
    """
    total = 0.0
    for node in region.nodes:
        op = find_op(node.domain, node.op_type)
        total += op.ulps if op is not None else 64.0
    if any(v.dtype == DT.FLOAT for v in region.outputs):
        inner = [_HALF_ULPS[v.dtype] for n in region.nodes for v in n.outputs if v.dtype in _HALF_ULPS]
        if region.tf32:
            inner.append(_HALF_ULPS[DT.FLOAT16])
        total += min(total, 4.0) * max(inner, default=0.0)
    given = [n.inputs[0] for n in region.nodes if n.op_type == "DequantizeLinear"]
    if any(v is not None and v.dtype == FP8 for v in given):
        total += _FP8_SUMS
    return total


def region_slack(region: RegionView) -> float:
    """What roundings to bytes within the Region may add to its result: each may fall to the other side of a tie.

    In steps of a quantized result, else absolute. What follows such a rounding does not enlarge differences.
    """
    steps = {n.outputs[0]: region.constant(n.inputs[1]) for n in region.nodes if n.op_type == "QuantizeLinear"}
    scales = {v: float(s.max()) for v, s in steps.items() if s is not None and s.numel()}
    within = sum(s for v, s in scales.items() if not any(v is o for o in region.outputs))
    return within / max((s for v, s in scales.items() if any(v is o for o in region.outputs)), default=1.0)


# Tensor cores align the products of a step of e4m3 to 14 bits; eight such steps, in units of fp32.
_FP8_SUMS = 8 * 2.0**-13 / torch.finfo(torch.float32).eps
_HALF_ULPS = {
    kind: torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    for kind, dtype in ((DT.FLOAT16, torch.float16), (DT.BFLOAT16, torch.bfloat16))
}


def tolerance(ulps: float, dtype: torch.dtype) -> float:
    """Relative to the largest magnitude: half types round once or twice at the end and accumulate in fp32."""
    if dtype in (torch.float16, torch.bfloat16):
        return min(ulps, 4.0) * torch.finfo(dtype).eps + ulps * torch.finfo(torch.float32).eps
    if dtype.is_floating_point:
        return ulps * torch.finfo(dtype).eps
    return 0.0


def disagreement(got: Any, want: Any, ulps: float, *, may_hide: bool = False, slack: float = 0.0) -> str | None:
    """Why `got` is not an acceptable value for `want`, or None. `slack` comes on top: see region_slack.

    Where one is NaN or infinite the other must not be finite. Which of the two it is may differ: torch's own GELU
    answers +inf with inf or NaN depending on the memory layout. With `may_hide`, `got` may be finite where `want` is
    not.
    """
    got_list = list(got) if isinstance(got, tuple) else [got]
    want_list = list(want) if isinstance(want, tuple) else [want]
    for g, w in zip(got_list, want_list):
        if isinstance(w, torch.Tensor):
            if not isinstance(g, torch.Tensor) or g.shape != w.shape or g.dtype != w.dtype:
                return f"got {_describe(g)}, expected {_describe(w)}"
            reason = _tensor_disagreement(g, w, ulps, may_hide, slack)
            if reason:
                return reason
    return None


def _describe(x: Any) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__


def masks_operands(region: RegionView) -> bool:
    """Whether some elements take no part in some results: keys that an attention's mask excludes.

    By the standard's formula a NaN there spreads through 0 * NaN; kernels that skip masked blocks never read it.
    """
    node = region.nodes[-1]
    if node.op_type != "Attention" or node.domain:
        return False
    attrs = region.attrs(node)
    windows = any(attrs.get(k, -1) >= 0 for k in ("left_window_size", "right_window_size"))
    return bool(attrs.get("is_causal")) or windows or (len(node.inputs) > 3 and node.inputs[3] is not None)


def _tensor_disagreement(got: T, want: T, ulps: float, may_hide: bool, slack: float) -> str | None:
    if want.numel() == 0:
        return None
    step: T | float = 0.0
    if want.dtype.itemsize == 1 and want.dtype.is_floating_point:
        step = _spacing(want) if ulps >= 1 else 0.0
        got, want = got.float(), want.float()
    if not (want.dtype.is_floating_point or want.dtype.is_complex):
        different = (
            int((got != want).sum())
            if want.dtype not in (torch.uint16, torch.uint32, torch.uint64)
            else int(np.sum(got.numpy() != want.numpy()))
        )
        limit = 1 + math.ceil(slack) if ulps >= 1 and want.dtype != torch.bool else 0
        if different and limit and not want.dtype.is_complex:
            different = int(((got.to(torch.int64) - want.to(torch.int64)).abs() > limit).sum())
        return f"{different} of {want.numel()} integers differ" if different else None
    finite, found = torch.isfinite(want), torch.isfinite(got)
    if not (bool((found | ~finite).all()) if may_hide else torch.equal(finite, found)):
        return "NaN or infinity hidden or made up"
    wide = torch.complex128 if want.dtype.is_complex else torch.promote_types(want.dtype, torch.float32)
    w, g = want.to(wide), got.to(wide)
    if not bool(finite.all()):
        w, g = (x.masked_fill(~finite, 0) for x in (w, g))
    bound = tolerance(ulps, want.dtype) * float(w.abs().max()) + torch.finfo(want.dtype).tiny + slack
    error = float(((g - w).abs() - step).max())
    return f"max error {error:.3g} exceeds {bound:.3g} ({ulps:g} ulps)" if not error <= bound else None


def _spacing(x: T) -> T:
    """How far numbers of a type of one byte are apart where those of `x` are: a rounding may fall to either side."""
    about = torch.finfo(x.dtype)
    size = x.float().nan_to_num().abs().clamp(min=about.tiny)
    return torch.ldexp(torch.full_like(size, about.eps / 2), torch.frexp(size).exponent)


class Arguments:
    """From dynamic inputs to all inputs of the Region in order. Constants are fetched once and held."""

    def __init__(self, region: RegionView) -> None:
        self.constants = [None if v is None else region.constant(v) for v in region.formal]
        dynamic = set(region.dynamic)
        self._holes = [i for i, v in enumerate(region.formal) if v is not None and v in dynamic]

    def __call__(self, args: Sequence[Any]) -> list[Any]:
        filled = list(self.constants)
        for hole, x in zip(self._holes, args):
            filled[hole] = x
        return filled
