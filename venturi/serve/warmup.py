"""Warm-up: sample requests of the configuration, run before a version counts as ready."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from venturi.serve.config import ModelConfig, datatype
from venturi.serve.errors import ServeError, invalid
from venturi.serve.models.base import LoadedModel
from venturi.serve.request import InferRequest, Tensor
from venturi.serve.tensors import BYTES, DATATYPES, from_bytes


def warm_up(model: LoadedModel, config: ModelConfig, folder: Path) -> None:
    """Run every sample, once an instance. Raises ServeError when one fails: the version is then not served."""
    instances = sum(g.count for g in config.instance_group)
    for sample in config.model_warmup:
        rows = sample.batch_size if config.max_batch_size else 0
        inputs = {n: _tensor(n, given, rows, folder.parent / "warmup") for n, given in sample.inputs.items()}
        for _ in range(max(sample.count, 1) * instances):
            request = InferRequest(config.name, "", dict(inputs), rows=max(rows, 1))
            request.finish = lambda request, answer: None
            request.emit = lambda answer: None
            try:
                (answer,) = model.execute([request])
            except Exception as exc:
                raise invalid(f"warm-up sample '{sample.name}' of model '{config.name}' fails: {exc}") from exc
            if isinstance(answer, ServeError):
                raise invalid(f"warm-up sample '{sample.name}' of model '{config.name}' fails: {answer.message}")


def _tensor(name: str, given: Any, rows: int, files: Path) -> Tensor:
    kind = datatype(given.data_type)
    shape = [rows, *given.dims] if rows else list(given.dims)
    if any(d < 1 for d in shape):
        raise invalid(f"warm-up input '{name}' has dims {list(given.dims)}; expected positive numbers")
    if given.WhichOneof("input_data_type") == "input_data_file":
        return Tensor(name, kind, _from_file(name, kind, shape, files, given.input_data_file))
    if kind == BYTES:
        return Tensor(name, kind, np.full(shape, b"", dtype=object))
    if given.random_data:
        dtype = DATATYPES[kind]
        drawn = np.random.default_rng(0).random(shape)
        return Tensor(name, kind, (drawn * 100 if dtype.kind in "iu" else drawn).astype(dtype))
    return Tensor(name, kind, np.zeros(shape, dtype=DATATYPES[kind]))


def _from_file(name: str, kind: str, shape: list[int], files: Path, file: str) -> np.ndarray[Any, Any]:
    path = files / file
    if files.resolve() not in path.resolve().parents:
        raise invalid(f"warm-up file {file!r} of input '{name}' leaves {files}")
    try:
        return from_bytes(name, kind, shape, path.read_bytes())
    except OSError as exc:
        raise invalid(f"cannot read the warm-up data of input '{name}': {exc}") from exc
