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

OPSET = 23


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
        with _quiet():
            program = torch.onnx.export(
                source, args, kwargs=kwargs, dynamo=True, dynamic_shapes=dynamic_shapes, opset_version=OPSET,
                verbose=False, optimize=True,
            )  # fmt: skip
    except Exception as exc:
        reason = str(exc).strip().splitlines()
        raise ModelError(
            f"torch could not export {type(source).__name__}: {reason[0] if reason else type(exc).__name__}"
        ) from exc
    finally:
        if was_training:
            source.train()
    assert program is not None
    model: ir.Model = program.model
    return model


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
