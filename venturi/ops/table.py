"""The operator table: one `Op` record per ONNX operator, keyed by (domain, name).

An operator's reference is a torch function whose positional parameters are the node's inputs and whose
keyword-only parameters are its attributes, with ONNX's names and defaults at the fixed opset. A keyword `ctx`
receives the node's `OpContext`. Optional inputs that are absent arrive as None; sequences are Python lists;
strings are numpy object arrays; graph attributes arrive as callables from tensors to tuples of tensors.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import onnx_ir as ir

from venturi.core.errors import ModelError
from venturi.core.registry import nearest

OPSET = 28
ML_OPSET = 5
VENTURI = "venturi"
CONTRIB = "com.microsoft"
ML = "ai.onnx.ml"
TRAINING = "ai.onnx.preview.training"
PREVIEW = "ai.onnx.preview"

# traits
POINTWISE = "pointwise"  # out[i] depends on in[i] only, numpy broadcasting
VIEW = "view"  # moves or reinterprets elements, computes none
REDUCE = "reduce"
CONTRACT = "contract"  # matmul, convolution: the anchors of epilogue fusion
DATA_DEPENDENT = "data-dependent"  # output shape depends on input values
RANDOM = "random"  # not pure: two runs may differ
CONTROL = "control"  # holds subgraphs

# Operators of the standard domain whose later inputs' values decide the output's shape (Range and ConstantOfShape:
# the first one's too).
SHAPED_BY_VALUES = frozenset(
    {
        "Reshape", "Expand", "Slice", "Squeeze", "Unsqueeze", "Tile", "Pad", "Resize", "TopK", "Split", "OneHot",
        "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
        "ReduceLogSumExp", "ReduceSumSquare", "CenterCropPad", "Range", "ConstantOfShape", "DFT", "STFT",
        "AffineGrid", "Col2Im", "MaxUnpool", "Upsample",
    }
)  # fmt: skip

F = TypeVar("F", bound=Callable[..., Any])
Shapes = Sequence[Sequence[int]]
FlopsFn = Callable[[Shapes, Shapes, dict[str, Any]], float]


@dataclass(frozen=True)
class OpContext:
    """What a reference may ask about its node beyond inputs and attributes."""

    in_dtypes: tuple[ir.DataType | None, ...] = ()
    out_dtypes: tuple[ir.DataType | None, ...] = ()
    num_outputs: int = 1
    name: str = ""


@dataclass(frozen=True)
class Op:
    """Everything known about one operator.

    `ulps` is the accepted error in units of the output type's epsilon, relative to the largest magnitude of the
    reference tensor: an implementation may sum in another order or use another polynomial, no more.
    """

    domain: str
    name: str
    reference: Callable[..., Any]
    traits: frozenset[str] = frozenset()
    ulps: float = 8.0
    flops: FlopsFn | None = None
    takes_ctx: bool = False
    takes_any: bool = False
    attributes: frozenset[str] = field(default_factory=frozenset)

    def accepts(self, attribute: str) -> bool:
        return self.takes_any or attribute in self.attributes

    @property
    def pure(self) -> bool:
        return RANDOM not in self.traits

    @property
    def pointwise(self) -> bool:
        return POINTWISE in self.traits


OPS: dict[tuple[str, str], Op] = {}


def op(name: str, *traits: str, domain: str = "", ulps: float = 8.0, flops: FlopsFn | None = None) -> Callable[[F], F]:
    """Register the decorated function as the reference of `domain::name`."""

    def register(fn: F) -> F:
        if (domain, name) in OPS:
            raise ModelError(f"operator {domain or 'ai.onnx'}::{name} is registered twice")
        parameters = inspect.signature(fn).parameters.values()
        keywords = {p.name for p in parameters if p.kind == p.KEYWORD_ONLY}
        open_ended = any(p.kind == p.VAR_KEYWORD for p in parameters)
        OPS[domain, name] = Op(
            domain, name, fn, frozenset(traits), ulps, flops, "ctx" in keywords, open_ended,
            frozenset(keywords - {"ctx"}),
        )  # fmt: skip
        return fn

    return register


def normalize_domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def find_op(domain: str, name: str) -> Op | None:
    load_all()
    return OPS.get((normalize_domain(domain), name))


def get_op(domain: str, name: str) -> Op:
    """Raises ModelError with the nearest name when the operator is unknown."""
    found = find_op(domain, name)
    if found is None:
        names = [n for d, n in OPS if d == normalize_domain(domain)]
        raise ModelError(f"operator {domain or 'ai.onnx'}::{name} is not supported.{nearest(name, names)}")
    return found


_loading = threading.RLock()
_started = _loaded = False


def load_all() -> None:
    """Import every family once; they register themselves. Threads that come meanwhile wait for the whole table."""
    global _started, _loaded
    if _loaded:
        return
    with _loading:
        if not _started:
            _started = True
            from venturi.ops import families  # noqa: F401

            _loaded = True
