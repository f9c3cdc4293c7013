"""The ONNX backend test cases, of the installed onnx or of a pinned release unpacked by the Makefile."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

ROOT = Path(__file__).resolve().parents[2]
PINNED = "1.21.0"
PINNED_DATA = ROOT / ".cache" / f"onnx-{PINNED}" / "onnx" / "backend" / "test" / "data"
KINDS = ("node", "simple", "pytorch-operator", "pytorch-converted")
RTOL, ATOL = 1e-3, 1e-7


@dataclass(frozen=True)
class Case:
    """A model with data sets of (inputs, expected outputs), read when asked for."""

    name: str
    kind: str
    folder: Path | None = None
    built: Any = None

    def model(self) -> onnx.ModelProto:
        return self.built.model if self.folder is None else onnx.load(self.folder / "model.onnx")

    def data_sets(self) -> Iterator[tuple[list[Any], list[Any]]]:
        model = self.model()
        if self.folder is None:
            for inputs, outputs in self.built.data_sets:
                yield [_plain(x) for x in inputs], [_plain(x) for x in outputs]
            return
        for path in sorted(self.folder.glob("test_data_set_*")):
            yield (
                [
                    _load(path / f"input_{i}.pb", v.type)
                    for i, v in enumerate(model.graph.input)
                    if (path / f"input_{i}.pb").exists()
                ],
                [_load(path / f"output_{i}.pb", v.type) for i, v in enumerate(model.graph.output)],
            )


def _plain(x: Any) -> Any:
    if isinstance(x, onnx.TensorProto):
        return ir.from_proto(x).numpy()
    if isinstance(x, list | tuple):
        return [_plain(v) for v in x]
    return _text(np.asarray(x)) if isinstance(x, np.generic | np.ndarray) else x


def _load(path: Path, type_proto: onnx.TypeProto) -> Any:
    data = path.read_bytes()
    kind = type_proto.WhichOneof("value")
    if kind == "sequence_type":
        sequence = onnx.SequenceProto()
        sequence.ParseFromString(data)
        return [_text(numpy_helper.to_array(t)) for t in sequence.tensor_values]
    if kind == "optional_type":
        optional = onnx.OptionalProto()
        optional.ParseFromString(data)
        if optional.elem_type == onnx.OptionalProto.TENSOR:
            return _text(numpy_helper.to_array(optional.tensor_value))
        if optional.elem_type == onnx.OptionalProto.SEQUENCE:
            return [_text(numpy_helper.to_array(t)) for t in optional.sequence_value.tensor_values]
        return None
    tensor = onnx.TensorProto()
    tensor.ParseFromString(data)
    if tensor.data_type == onnx.TensorProto.STRING:
        return _text(numpy_helper.to_array(tensor).astype(object))
    return _text(ir.from_proto(tensor).numpy())


def _text(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if array.dtype.kind in "OUST":
        return np.array([v.decode() if isinstance(v, bytes) else v for v in array.reshape(-1)], dtype=object).reshape(
            array.shape
        )
    return array


@functools.cache
def newest(kind: str) -> tuple[Case, ...]:
    """Cases of the installed onnx."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = load_model_tests(kind=kind)
    return tuple(
        Case(c.name, kind, Path(c.model_dir)) if c.model is None else Case(c.name, kind, None, c) for c in found
    )


@functools.cache
def pinned(kind: str = "node") -> tuple[Case, ...]:
    """Cases of the pinned release. Empty when `make` has not fetched it."""
    folder = PINNED_DATA / kind
    if not folder.is_dir():
        return ()
    return tuple(Case(p.name, kind, p) for p in sorted(folder.iterdir()) if (p / "model.onnx").exists())


def mismatch(got: Any, want: Any) -> str | None:
    """Why two values differ under the suite's own rule (rtol 1e-3, atol 1e-7, dtype and shape equal), or None."""
    if want is None:
        return None if got is None else f"expected an empty optional, got {type(got).__name__}"
    if isinstance(want, list):
        if not isinstance(got, list) or len(got) != len(want):
            return f"expected a sequence of {len(want)}, got {got if not isinstance(got, list) else len(got)}"
        return next((m for g, w in zip(got, want) if (m := mismatch(g, w))), None)
    if not isinstance(got, np.ndarray):
        return f"expected an array, got {type(got).__name__}"
    want = np.asarray(want)
    if got.shape != want.shape:
        return f"shape {got.shape}, expected {want.shape}"
    if want.dtype.kind in "OUST":
        return (
            None if (got.astype(str) == want.astype(str)).all() else f"strings {got.tolist()}, expected {want.tolist()}"
        )
    if got.dtype != want.dtype:
        return f"dtype {got.dtype}, expected {want.dtype}"
    if want.dtype.kind not in "biufc":
        got, want = got.astype(np.float32), want.astype(np.float32)
    if not np.allclose(got, want, rtol=RTOL, atol=ATOL, equal_nan=True):
        with np.errstate(all="ignore"):
            return f"values differ, max abs {np.nanmax(np.abs(got.astype(np.complex128) - want)) if got.size else 0}"
    return None
