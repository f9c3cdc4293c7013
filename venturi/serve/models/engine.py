"""Models that are engines: `model.vt`, or `model.onnx` and `model.pt2` (torch.export), built when they are loaded."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from tritonclient.grpc import model_config_pb2 as pb

import venturi as vt
from venturi.core.fingerprint import num_physical_threads
from venturi.serve.config import ModelConfig, data_type
from venturi.serve.errors import ServeError, Status, invalid, unavailable
from venturi.serve.request import InferRequest, InferResponse, Tensor
from venturi.serve.tensors import BYTES, DATATYPES, ENGINE_TYPES, as_bytes

FILES = ("model.vt", "model.onnx", "model.pt2", "model.plan")
PARAMETERS = ("precision", "opt_level", "device")
KIND_GPU = pb.ModelInstanceGroup.KIND_GPU
THREADS = "intra_threads"


class EngineKind:
    """`parameters` of the configuration: precision, opt_level, device (for files that are built at load), and
    intra_threads, the most threads of a run on the CPU; by default instances share the cores out."""

    name = "venturi"

    def complete(self, config: ModelConfig, folder: Path | None, default_max_batch: int) -> None:
        for group in config.instance_group:
            if group.kind == KIND_GPU and not group.gpus:
                group.gpus.extend(_all_gpus(config))
        if folder is None or (config.input and config.output):
            return
        gpus = gpus_of(config)
        engine = self._open(config, folder, f"cuda:{gpus[0]}" if gpus else None)
        specs = [*engine.inputs, *engine.outputs]
        batches = all(s.shape and not isinstance(s.shape[0], int) for s in specs)
        if not config.max_batch_size and not config.input and batches:
            config.max_batch_size = default_max_batch
            if not config.HasField("dynamic_batching") and default_max_batch > 1:
                config.dynamic_batching.SetInParent()
        for target, given in ((config.input, engine.inputs), (config.output, engine.outputs)):
            if not target:
                for spec in given:
                    _describe(target.add(), spec, bool(config.max_batch_size))

    def load(self, config: ModelConfig, folder: Path) -> EngineModel:
        """An engine for each GPU of the instance groups; one for all groups that name none."""
        replicas: dict[int, EngineModel] = {}
        try:
            for gpu in gpus_of(config):
                replicas[gpu] = EngineModel(self._open(config, folder, f"cuda:{gpu}"), config)
            if replicas and all(group.gpus for group in config.instance_group):
                return replicas[min(replicas)].among(replicas)
            return EngineModel(self._open(config, folder), config).among(replicas)
        except BaseException:
            for replica in replicas.values():
                replica.close()
            raise

    def _open(self, config: ModelConfig, folder: Path, device: str | None = None) -> Any:
        path = model_file(config, folder)
        settings = {n: config.parameters[n].string_value for n in PARAMETERS if n in config.parameters}
        settings |= {"device": device} if device else {}
        threads = threads_of_an_instance(config)
        if path.suffix not in (".onnx", ".pt2"):
            return vt.load(path, intra_threads=threads, device=device)
        level = settings.pop("opt_level", "3")
        if not level.isdigit():
            raise invalid(f"parameter opt_level of model {config.name} must be 0 to 5, got {level!r}")
        source = path if path.suffix == ".onnx" else _exported_program(path)
        return vt.build(source, opt_level=int(level), intra_threads=threads, **settings)  # type: ignore[arg-type]


def gpus_of(config: ModelConfig) -> list[int]:
    """All that instance groups name."""
    return sorted({gpu for group in config.instance_group for gpu in group.gpus})


def _all_gpus(config: ModelConfig) -> range:
    import torch

    if not torch.cuda.device_count():
        raise unavailable(f"model {config.name} has an instance group of KIND_GPU, and this machine has no GPU")
    return range(torch.cuda.device_count())


def threads_of_an_instance(config: ModelConfig) -> int | None:
    """None where one instance has all cores."""
    if THREADS in config.parameters:
        text = config.parameters[THREADS].string_value
        if not text.isdigit() or not int(text):
            raise invalid(f"parameter {THREADS} of model {config.name} must be a number from 1 on, got {text!r}")
        return int(text)
    instances = sum(max(1, g.count) for g in config.instance_group)
    return max(1, num_physical_threads() // instances) if instances > 1 else None


def _exported_program(path: Path) -> Any:
    """A file of torch.export.save. Like model.py it comes from the repository's owner: torch may run code of it."""
    import torch

    try:
        return torch.export.load(path)
    except Exception as exc:
        raise invalid(
            f"{path} is not a file of torch.export.save that this torch ({torch.__version__}) reads: {exc}"
        ) from exc


def model_file(config: ModelConfig, folder: Path, known: Sequence[str] = FILES) -> Path:
    """The configuration's, or the first of the `known`. Raises ServeError."""
    names = [config.default_model_filename] if config.default_model_filename else list(known)
    for name in names:
        path = folder / name
        if path.resolve().parent != folder.resolve() and not path.is_symlink():
            raise invalid(f"default_model_filename {name!r} of model {config.name} leaves its version folder")
        if path.is_file():
            return path
    raise ServeError(Status.NOT_FOUND, f"no model file in {folder}: expected one of {', '.join(names)}")


def _describe(target: Any, spec: vt.TensorSpec, batched: bool) -> None:
    if spec.shape is None or spec.dtype not in ENGINE_TYPES:
        raise invalid(f"'{spec.name}' has type {spec.dtype} and shape {spec.shape}, which the protocol cannot express")
    target.name = spec.name
    target.data_type = data_type(ENGINE_TYPES[spec.dtype])
    dims = [d if isinstance(d, int) else -1 for d in spec.shape][1 if batched else 0 :]
    if dims:
        target.dims.extend(dims)
    else:
        target.dims.append(1)
        target.reshape.SetInParent()


class EngineModel:
    """Joins the rows of a batch, runs the engine, or what has its face, once, gives every request its rows."""

    runs_inline = True
    replicas: Mapping[int, EngineModel] = MappingProxyType({})

    def __init__(self, engine: Any, config: ModelConfig) -> None:
        self._engine = engine
        self._batches = config.max_batch_size > 0
        self._specs = {s.name: s for s in engine.inputs}
        self._types = {s.name: ENGINE_TYPES[s.dtype] for s in engine.outputs}
        _check_ports(config, "input", engine.inputs)
        _check_ports(config, "output", engine.outputs)

    def execute(self, requests: list[InferRequest]) -> list[InferResponse]:
        started = time.perf_counter_ns()
        joined = {name: self._joined(name, requests) for name in requests[0].inputs}
        input_done = time.perf_counter_ns()
        outputs = self._engine.run(joined)
        output = time.perf_counter_ns()
        responses = self._split(requests, outputs)
        end = time.perf_counter_ns()
        for request in requests:
            t = request.times
            t.compute, t.input_done, t.output, t.end = started, input_done, output, end
        return responses

    def among(self, replicas: dict[int, EngineModel]) -> EngineModel:
        """This one, which closes the others too; instances on a GPU run that of theirs."""
        self.replicas = MappingProxyType(replicas)
        return self

    def inspect(self) -> dict[str, Any]:
        found: dict[str, Any] = self._engine.inspect().to_json()
        return found

    def close(self) -> None:
        self._engine.close()
        for replica in self.replicas.values():
            if replica is not self:
                replica.close()

    def _joined(self, name: str, requests: Sequence[InferRequest]) -> np.ndarray[Any, Any]:
        parts = [r.inputs[name].data for r in requests]
        array = parts[0] if len(parts) == 1 else np.concatenate(parts)
        rank = len(self._specs[name].shape or ())
        if array.ndim == rank + 1 and array.shape[-1] == 1:
            array = array.reshape(array.shape[:-1])
        if self._specs[name].dtype == "string":
            text = [as_bytes(v).decode("utf-8", "surrogateescape") for v in array.reshape(-1)]
            array = np.array(text, dtype=object).reshape(array.shape)
        return array

    def _split(self, requests: Sequence[InferRequest], outputs: dict[str, Any]) -> list[InferResponse]:
        total = sum(r.rows for r in requests)
        if self._batches and any(np.ndim(o) == 0 or len(o) != total for o in outputs.values()):
            raise ServeError(Status.INTERNAL, f"an output does not have the batch's {total} rows: set max_batch_size 0")
        responses, at = [], 0
        for request in requests:
            wanted = [o.name for o in request.outputs] or list(outputs)
            rows = slice(at, at + request.rows) if self._batches else slice(None)
            at += request.rows
            found = {n: self._tensor(n, outputs[n][rows] if np.ndim(outputs[n]) else outputs[n]) for n in wanted}
            responses.append(InferResponse(found))
        return responses

    def _tensor(self, name: str, array: Any) -> Tensor:
        datatype = self._types[name]
        data = np.asarray(array) if datatype == BYTES else np.asarray(array, dtype=DATATYPES[datatype])
        return Tensor(name, datatype, data.reshape(-1, 1) if self._batches and data.ndim == 1 else data)


def _check_ports(config: ModelConfig, kind: str, specs: Sequence[vt.TensorSpec]) -> None:
    """The configuration must name the engine's tensors, with their types."""
    known = {s.name: s for s in specs}
    listed = {t.name: t for t in getattr(config, kind)}
    sequences = config.sequence_batching
    own = {c.name for c in sequences.control_input} | {s.input_name for s in sequences.state}
    for name, port in listed.items():
        if name not in known:
            raise invalid(f"model {config.name}: {kind} '{name}' is not in the engine, which has {sorted(known)}")
        if data_type(ENGINE_TYPES.get(known[name].dtype, "FP32")) != port.data_type:
            raise invalid(
                f"model {config.name}: {kind} '{name}' is {known[name].dtype} in the engine, not as configured"
            )
    missing = sorted(set(known) - set(listed) - own)
    if kind == "input" and missing:
        raise invalid(f"model {config.name}: the configuration lacks inputs {missing}")
