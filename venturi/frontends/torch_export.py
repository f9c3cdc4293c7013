"""PyTorch in: torch.export, then torch's ONNX exporter, all in memory."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir
import torch

from venturi.core.errors import ModelError
from venturi.core.log import logger

OPSETS = (23, 18)


def is_torch_model(source: Any) -> bool:
    return isinstance(source, torch.nn.Module | torch.export.ExportedProgram)


def export(source: Any, example: Any = None, dynamic_shapes: Any = None) -> ir.Model:
    """`example`: a tensor, a tuple of positional inputs or a mapping of keyword inputs (not needed for an
    ExportedProgram). `dynamic_shapes` as torch.export takes it. The module is exported in eval mode.

    Raises ModelError with torch's reason when the export fails.
    """
    args, kwargs = _arguments(source, example)
    was_training = isinstance(source, torch.nn.Module) and source.training
    if was_training:
        source.eval()
    try:
        return _export(source, args, kwargs, dynamic_shapes)
    except Exception as exc:
        raise ModelError(f"torch could not export {type(source).__name__}: {_root_cause(exc)}") from exc
    finally:
        if was_training:
            source.train()


def _export(source: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None, dynamic_shapes: Any) -> ir.Model:
    """The newest opset keeps attention whole; where torch cannot write a model in it, the older one spells it out."""
    for opset in OPSETS:
        try:
            with _quiet():
                program = torch.onnx.export(
                    source, args, kwargs=kwargs, dynamo=True, dynamic_shapes=dynamic_shapes, opset_version=opset,
                    verbose=False, optimize=True, custom_translation_table=_translations(),
                )  # fmt: skip
        except Exception as exc:
            if opset == OPSETS[-1] or not isinstance(exc, torch.onnx.errors.OnnxExporterError):
                raise
            logger.info("torch cannot export at opset %d (%s); trying an older one", opset, _root_cause(exc))
            continue
        assert program is not None
        model: ir.Model = program.model
        return model
    raise AssertionError("unreachable: the last opset returns or raises")


def _translations() -> dict[Any, Any]:
    """Operators that torch's exporter does not know: transformers' grouped product of mixture-of-experts layers."""
    found = {}
    for namespace, name in (("transformers", "grouped_mm_fallback"), ("aten", "_grouped_mm")):
        packet = getattr(getattr(torch.ops, namespace), name, None)
        if packet is not None:
            found[packet.default] = _grouped_product
    return found


def _grouped_product(x: Any, weight: Any, ends: Any, bias: Any = None, out_dtype: Any = None) -> Any:
    """x [tokens, k], weight [groups, k, n], ends [groups] → [tokens, n]: row t uses the group g with
    ends[g-1] <= t < ends[g]. In standard operators: every row gathers its group's matrix."""
    from onnxscript import opset18 as op

    tokens = op.Squeeze(op.Shape(x, start=0, end=1))
    rows = op.Unsqueeze(
        op.Range(op.Constant(value_int=0), tokens, op.Constant(value_int=1)), op.Constant(value_ints=[1])
    )
    passed = op.Cast(op.LessOrEqual(op.Unsqueeze(op.Cast(ends, to=7), op.Constant(value_ints=[0])), rows), to=7)
    group = op.ReduceSum(passed, op.Constant(value_ints=[1]), keepdims=0)
    product = op.MatMul(op.Unsqueeze(x, op.Constant(value_ints=[1])), op.Gather(weight, group))
    return op.Squeeze(product, op.Constant(value_ints=[1]))


def _root_cause(exc: BaseException) -> str:
    """The innermost message of torch's chain of exceptions: the outer ones give general advice."""
    while exc.__cause__ is not None:
        exc = exc.__cause__
    lines = str(exc).strip().splitlines()
    return f"{type(exc).__name__}: {lines[0]}" if lines else type(exc).__name__


def _arguments(source: Any, example: Any) -> tuple[tuple[Any, ...], dict[str, Any] | None]:
    if isinstance(source, torch.export.ExportedProgram):
        return (), None
    if example is None:
        raise ModelError("building from an nn.Module needs example inputs: vt.build(module, example=(x,))")
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, tuple | list) else (example,)), None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints and warns about matters its caller cannot change."""
    loggers = [
        logging.getLogger(n) for n in ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript")
    ]
    levels = [x.level for x in loggers]
    for x in loggers:
        x.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for x, level in zip(loggers, levels):
            x.setLevel(level)
