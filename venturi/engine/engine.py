"""The Engine: what `vt.build` and `vt.load` return. Runs, saves, inspects, refits."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from venturi.core.errors import DeviceError, EngineError, ShapeError
from venturi.core.log import logger
from venturi.core.registry import nearest
from venturi.engine.artifact import SOURCE_WEIGHTS, WEIGHTS, save_artifact
from venturi.engine.builder import Built, compile_model, pass_context, rename_steps, stored_weights
from venturi.engine.config import BuildConfig, Profile
from venturi.engine.graph_file import pack_graph, set_weights
from venturi.engine.inspector import Report, make_report
from venturi.engine.pairing import rejoin
from venturi.engine.peaks import peaks_of
from venturi.engine.plan import Plan, TensorSpec
from venturi.engine.target import RunContext, Target
from venturi.ir.dtypes import dtype_from_name
from venturi.ops.tensors import STORAGE, to_numpy, to_torch
from venturi.runtime.batching import Batching, Worker
from venturi.runtime.executable import bind_plan
from venturi.runtime.held import Held
from venturi.runtime.profiler import Profiler
from venturi.runtime.reachable import reachable_bytes
from venturi.runtime.streams import ALL_CORES, Threads, pin


class Engine:
    """A compiled model. Thread-safe: concurrent calls run in contexts of their own, weights are shared.

    `batching` joins `submit`ted requests along axis 0; it may be set before the first submit. With streams every run
    but those of `context` and `profile` is done by one of their threads.
    """

    def __init__(
        self, built: Built, config: BuildConfig, source: ir.Model | None = None, threads: Threads = ALL_CORES
    ) -> None:
        if threads.streams and built.target.device.type != "cpu":
            raise DeviceError(f"streams share out cores; this engine runs on {built.target.device}")
        self._built = built
        self._config = config
        self._source = source
        self._profiles = [Profile.from_dict(p) for p in built.plan.profiles]
        self._names = tuple(s.name for s in built.plan.inputs)
        self._output_types = tuple((s.name, _logical(s)) for s in built.plan.outputs)
        self._idle: deque[RunContext] = deque()
        self._seen: set[tuple[Any, ...]] = set()
        self._input_types = tuple((s, _logical(s), _storage(s)) for s in built.plan.inputs)
        self._lock = threading.Lock()
        self._threads = threads
        self._run_threads = threads.of_a_run(built.plan.threads)  # not asked on a stream's thread, which is pinned
        self._worker: Worker | None = None
        self._of_streams: dict[int, RunContext] = {}
        self.batching: Batching | None = None

    @property
    def plan(self) -> Plan:
        return self._built.plan

    @property
    def device(self) -> str:
        """The torch device that computes: "cpu", "cuda:0", ..."""
        return str(self._built.target.device)

    @property
    def streams(self) -> int:
        """Runs that go on side by side, each on cores of its own; 0: a run is done in the caller's thread."""
        return self._threads.streams

    def _new_context(self) -> RunContext:
        return self._built.target.context(self._built.executable, self._run_threads)

    @property
    def inputs(self) -> list[TensorSpec]:
        return list(self.plan.inputs)

    @property
    def outputs(self) -> list[TensorSpec]:
        return list(self.plan.outputs)

    def __call__(self, *args: Any) -> Any:
        """Positional inputs → the output, or a tuple of outputs; numpy in gives numpy out, torch gives torch."""
        if len(args) != len(self.plan.inputs):
            raise ShapeError(
                f"the engine takes {len(self.plan.inputs)} inputs {[s.name for s in self.plan.inputs]}, got {len(args)}"
            )
        outputs = self._outputs(list(args))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs by name → outputs by name. Raises ShapeError for wrong names, types or shapes."""
        outputs = self._outputs(self._in_order(inputs))
        return {name: o for (name, _), o in zip(self._output_types, outputs)}

    def _in_order(self, inputs: Mapping[str, Any]) -> list[Any]:
        names = self._names
        if len(inputs) != len(names) or any(n not in inputs for n in names):
            unknown = [n for n in inputs if n not in names]
            missing = [n for n in names if n not in inputs]
            hint = nearest(unknown[0], list(names)) if unknown else ""
            raise ShapeError(f"inputs must be {list(names)}; missing {missing}, unknown {unknown}.{hint}")
        return [inputs[n] for n in names]

    def submit(self, inputs: Mapping[str, Any]) -> Future[dict[str, Any]]:
        """Queue a request; its Future gives `run`'s result. Raises RequestError when the queue is full."""
        return self._started_worker().submit(inputs)

    def _started_worker(self) -> Worker:
        with self._lock:
            if self._worker is None:
                streams = self._threads.streams
                contexts = self._of_streams = {}  # a worker that is being closed goes on with its own
                self._worker = (
                    Worker(partial(self._run_in_stream, contexts), self.batching, streams, lambda n: pin(n, streams))
                    if streams
                    else Worker(lambda _, inputs: self.run(inputs), self.batching)
                )
            return self._worker

    def _run_in_stream(self, contexts: dict[int, RunContext], number: int, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """On the stream's own thread."""
        context = contexts.get(number)
        if context is None:
            context = contexts[number] = self._new_context()
        outputs = self._execute([inputs[n] for n in self._names], context)
        return dict(zip((name for name, _ in self._output_types), outputs))

    def _outputs(self, args: list[Any]) -> list[Any]:
        """In order, by one of the streams, or here where there are none."""
        if not self._threads.streams:
            return self._execute(args)
        return list(self._started_worker().call(dict(zip(self._names, args))).values())

    @contextmanager
    def context(self, profile: int = 0) -> Iterator[EngineContext]:
        """A context of the caller's own, with its own arena, limited to one profile's shapes."""
        if self._profiles and not 0 <= profile < len(self._profiles):
            raise ShapeError(f"profile {profile} does not exist; the engine has {len(self._profiles)}")
        yield EngineContext(self, self._new_context(), profile if self._profiles else None)

    def bind(self, inputs: Mapping[str, Any]) -> Bound:
        """Inputs and outputs of these shapes at fixed places, in a context of the caller's own: a run then copies
        nothing. Raises ShapeError, and RequestError when the engine has no fixed places (outputs whose shape depends
        on values)."""
        stored = self._accept(self._in_order(inputs), None)
        held = self._new_context().hold(stored)
        return Bound(
            dict(zip(self._names, held.inputs)), dict(zip((n for n, _ in self._output_types), held.outputs)), held
        )

    def close(self) -> None:
        """Finish queued requests and stop the threads of `submit` and of streams. The engine stays usable."""
        with self._lock:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def _execute(self, args: list[Any], context: RunContext | None = None, profile: int | None = None) -> list[Any]:
        stored = self._accept(args, profile)
        if context is not None:
            outputs = context.run(stored)
        else:
            idle = self._idle  # a refit puts another in its place
            try:
                own = idle.pop()
            except IndexError:
                own = self._new_context()
            try:
                outputs = own.run(stored)
            finally:
                idle.append(own)
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if tensors and (not args or tensors[0].device == self._built.target.device):
            return outputs
        if tensors:
            return [o.cpu() if isinstance(o, torch.Tensor) else o for o in outputs]
        return [to_numpy(o, dtype) for o, (_, dtype) in zip(outputs, self._output_types)]

    def _accept(self, args: list[Any], profile: int | None) -> list[Any]:
        """Stored inputs, checked against the interface; shapes already seen skip the shape checks."""
        stored = []
        for (spec, logical, dtype), arg in zip(self._input_types, args):
            if isinstance(arg, np.ndarray) and spec.kind == "tensor":
                arg = to_torch(arg, logical if arg.dtype.kind not in "OUST" else None)
            elif not isinstance(arg, torch.Tensor) and spec.kind == "tensor":
                arg = to_torch(np.asarray(arg, dtype=_numpy(spec)), logical)
            elif spec.kind != "tensor" and isinstance(arg, list):
                arg = [to_torch(a) if isinstance(a, np.ndarray) else a for a in arg]
            elif spec.kind != "tensor" and isinstance(arg, np.ndarray):
                arg = to_torch(arg)
            if dtype is not None and isinstance(arg, torch.Tensor) and arg.dtype != dtype and spec.kind == "tensor":
                got = str(arg.dtype).removeprefix("torch.")
                raise ShapeError(f"input {spec.name!r} must be {spec.dtype}, got {got}; cast it first")
            stored.append(arg)
        key = (profile, *(tuple(a.shape) if hasattr(a, "shape") else None for a in stored))
        if key not in self._seen:
            self._check_shapes(stored, profile)
            if len(self._seen) < 4096:
                self._seen.add(key)
        return stored

    def _check_shapes(self, stored: list[Any], profile: int | None) -> None:
        sizes: dict[str, tuple[int, str]] = {}
        for spec, x in zip(self.plan.inputs, stored):
            if spec.shape is None or not hasattr(x, "shape"):
                continue
            want, got = list(spec.shape), list(x.shape)
            if len(want) != len(got) or any(isinstance(w, int) and w != g for w, g in zip(want, got)):
                raise ShapeError(f"input {spec.name!r} must have shape {want}, got {got}")
            for w, g in zip(want, got):
                if isinstance(w, str) and sizes.setdefault(w, (g, spec.name))[0] != g:
                    raise ShapeError(
                        f"dimension {w!r} is {sizes[w][0]} in input {sizes[w][1]!r} but {g} in {spec.name!r}"
                    )
        if not self._profiles:
            return
        chosen = self._profiles if profile is None else [self._profiles[profile]]
        named = [(s.name, list(x.shape)) for s, x in zip(self.plan.inputs, stored) if hasattr(x, "shape")]
        if not any(all(p.admits(n, shape) for n, shape in named) for p in chosen):
            ranges = "; ".join(str(p.to_json()) for p in chosen)
            raise ShapeError(f"shapes {dict(named)} lie outside every profile: {ranges}")

    def profile(self, inputs: Mapping[str, Any], runs: int = 10, *, roofline: bool = False) -> Report:
        """Run `runs` times with a clock around every step; the report has the medians and their source nodes.

        Rates count the operations and bytes of the shapes the engine was tuned for. `roofline` also measures what the
        device can do at best, and says what share of that every step reaches.
        """
        args = self._accept(self._in_order(inputs), None)
        context = self._new_context()
        context.run(args)
        context.profiler = Profiler()
        for _ in range(runs):
            context.run(args)
        binding = context.binding_of(args)
        peaks = peaks_of(self.plan, self._built.model.graph, self._built.target.device) if roofline else None
        return make_report(self.plan, context.profiler.medians_us(len(self.plan.steps)), binding, peaks)

    @property
    def device_memory_bytes(self) -> int:
        """Memory of the device that the engine takes: its weights, and one context at the largest shapes of the first
        profile, else at those that it was tuned for. Every context that runs at the same time takes its part again.

        A context is made for it, bound to those shapes and dropped again: what it takes is counted, not estimated. On
        a GPU a context that runs without a graph shares torch's allocator with the process and is not counted.
        """
        profile, args = self._profiles[0] if self._profiles else None, []
        for spec, _, dtype in self._input_types:
            shape = self.plan.tuned_shapes.get(spec.name)
            if profile is not None and spec.name in profile.shapes:
                shape = list(profile.max(spec.name))
            if shape is None and spec.shape is not None and all(isinstance(d, int) for d in spec.shape):
                shape = list(spec.shape)  # type: ignore[arg-type]
            if shape is None or dtype is None:
                raise EngineError(f"the largest shape of input {spec.name!r} is not known: build with a profile")
            args.append(torch.zeros(shape, dtype=dtype))
        context = self._new_context()
        context.run(args)
        return reachable_bytes(self._built.executable, self._built.target.device) + context.arena_bytes

    def inspect(self) -> Report:
        """Layers, tactics, times measured at build, memory. `str()` is a table, `.to_json()` data."""
        return make_report(self.plan)

    def save(self, path: str | Path, *, strip: bool | None = None) -> None:
        """Write the engine file atomically. `strip` leaves the weights out (they are given again at load).

        Raises EngineError when the file cannot be written; an existing file is then untouched.
        """
        strip = self._config.strip if strip is None else strip
        graph, weights = pack_graph(self._built.model, WEIGHTS)
        entries: dict[str, Any] = {"graph.onnx": [graph]}
        entries.update({name: [data] for name, data in self._built.target.kernel_files().items()})
        if not strip:
            entries[WEIGHTS] = weights
        if self._source is not None or strip:
            if self._source is None:
                raise EngineError("a stripped engine must be built with refit=True or strip=True")
            source_graph, source_weights = pack_graph(self._source, SOURCE_WEIGHTS)
            entries["source.onnx"] = [source_graph]
            if not strip:
                entries[SOURCE_WEIGHTS] = source_weights
        options = {k: getattr(self._config, k) for k in ("precision", "opt_level", "refit", "strip")}
        about = {"stripped": strip, "options": options, "device": self._built.target.fingerprint()}
        save_artifact(path, self.plan, entries, about)

    def refit(self, weights: Mapping[str, Any] | str | Path) -> None:
        """Replace weights by their names in the source model, from arrays or from a new ONNX file of the same model.

        Tactics stay as tuned. Must not run concurrently with inference. Raises EngineError unless built with
        refit=True, and for unknown names or other shapes; the engine is unchanged then.
        """
        if self._source is None:
            raise EngineError("this engine keeps no source model; build it with refit=True")
        source = self._source.clone()
        given = weights if isinstance(weights, Mapping) else weights_of(weights)
        if not isinstance(weights, Mapping):
            given = {n: w for n, w in given.items() if n in source.graph.initializers}
        set_weights(source, given)
        built = rebuild(source, self.plan, self._config, self._built.target)
        self._source, self._built = source, built
        self._idle = deque()
        self._of_streams.clear()


class EngineContext:
    """What `engine.context()` yields: runs in one context, within one profile."""

    def __init__(self, engine: Engine, context: RunContext, profile: int | None) -> None:
        self._engine = engine
        self._context = context
        self._profile = profile

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        outputs = self._engine._execute(self._engine._in_order(inputs), self._context, self._profile)
        return {s.name: o for s, o in zip(self._engine.outputs, outputs)}

    @property
    def arena_bytes(self) -> int:
        """Bytes this context holds for intermediate results."""
        return self._context.arena_bytes


@dataclass(frozen=True)
class Bound:
    """What `engine.bind` returns: stored tensors by name. Write into `inputs`, `run`, read `outputs`.

    One thread at a time. On a GPU `run` returns at once; what the current stream does next finds the outputs.
    """

    inputs: Mapping[str, torch.Tensor]
    outputs: Mapping[str, torch.Tensor]
    _held: Held

    def run(self) -> None:
        """Raises RequestError naming the failing step."""
        self._held.run()


def _storage(spec: TensorSpec) -> torch.dtype | None:
    logical = _logical(spec)
    return STORAGE.get(logical) if logical is not None else None


def _logical(spec: TensorSpec) -> ir.DataType | None:
    found = dtype_from_name(spec.dtype)
    return None if found == ir.DataType.UNDEFINED else found


def _numpy(spec: TensorSpec) -> Any:
    logical = _logical(spec)
    return None if logical is None or logical == ir.DataType.STRING else logical.numpy()


def weights_of(path: str | Path) -> dict[str, Any]:
    from venturi.frontends.onnx_import import import_onnx

    return {
        n: v.const_value.numpy() for n, v in import_onnx(path).graph.initializers.items() if v.const_value is not None
    }


def rebuild(source: ir.Model, plan: Plan, config: BuildConfig, target: Target) -> Built:
    """Passes again on the new weights, then the old choices; tuned anew only when the graph came out different."""
    from venturi.passes.pipeline import run_pipeline

    model = source.clone()
    run_pipeline(model, pass_context(config, target.backend))
    rejoin(model.graph, plan.steps)
    nodes = list(model.graph)
    if [tuple(s.ops) for s in plan.steps] == [_ops(n) for n in nodes]:
        renamed = rename_steps(model.graph, plan)
        weights = target.weights(stored_weights(model.graph))
        executable = bind_plan(model.graph, renamed.steps, weights, target.backend)
        return Built(model, renamed, weights, executable, target)
    logger.warning("the new weights change the optimized graph; planning it again")
    return compile_model(source.clone(), config)


def _ops(node: ir.Node) -> tuple[str, ...]:
    from venturi.ir.region import members

    return tuple(n.op_type for n in members(node))
