"""Models that onnxruntime runs (`backend: "ort"`), for those who want its very results: it must be installed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

import venturi as vt
from venturi.core.fingerprint import num_physical_threads
from venturi.serve.config import ModelConfig
from venturi.serve.errors import ServeError, Status, invalid
from venturi.serve.models.engine import EngineKind, EngineModel, gpus_of, model_file, threads_of_an_instance

_TYPES = {"float": "float32", "double": "float64"}
_TENSOR = re.compile(r"tensor\((\w+)\)")


class OnnxRuntimeKind(EngineKind):
    """`model.onnx` in onnxruntime's CPU provider; `intra_threads` as for engines."""

    name = "ort"

    def load(self, config: ModelConfig, folder: Path) -> OnnxRuntimeModel:
        gpus = gpus_of(config)
        return OnnxRuntimeModel(self._open(config, folder, f"cuda:{gpus[0]}" if gpus else None), config)

    def _open(self, config: ModelConfig, folder: Path, device: str | None = None) -> Any:
        if device is not None:
            raise invalid(f"model {config.name} has instances on {device}; backend 'ort' is for the CPU")
        try:
            import onnxruntime
        except ImportError as exc:
            raise ServeError(
                Status.UNAVAILABLE,
                f"model {config.name} has backend 'ort', and onnxruntime is not installed: pip install onnxruntime",
            ) from exc
        path = model_file(config, folder, ["model.onnx"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads_of_an_instance(config) or num_physical_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            return Session(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
        except Exception as exc:
            raise invalid(f"onnxruntime {onnxruntime.__version__} cannot load {path}: {exc}") from exc


class Session:
    """An onnxruntime session with an engine's face."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.inputs = [_spec(v) for v in session.get_inputs()]
        self.outputs = [_spec(v) for v in session.get_outputs()]
        self._names = [s.name for s in self.outputs]

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        given = {n: a if a.dtype.kind == "O" else np.ascontiguousarray(a) for n, a in inputs.items()}
        return dict(zip(self._names, self._session.run(self._names, given)))

    def close(self) -> None:
        del self._session


def _spec(value: Any) -> vt.TensorSpec:
    """onnxruntime's description; dimensions without a name are free."""
    found = _TENSOR.fullmatch(value.type)
    kind = found.group(1) if found else value.type
    shape = tuple(d if isinstance(d, int) else str(d or f"{value.name}.{i}") for i, d in enumerate(value.shape))
    return vt.TensorSpec(value.name, _TYPES.get(kind, kind), shape)


class OnnxRuntimeModel(EngineModel):
    """Joins and splits batches as an engine's model does."""

    def inspect(self) -> dict[str, Any]:
        return {"reason": "run by onnxruntime"}
