"""All state of one caller on a GPU: static inputs and a CUDA graph for every set of shapes."""

from __future__ import annotations

import statistics
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from venturi.backends.cuda.memory import out_of_memory
from venturi.backends.cuda.scratch import Scratch, using
from venturi.backends.reference.program import OPERATOR_ERRORS
from venturi.core import knobs
from venturi.core.errors import RequestError, VenturiError
from venturi.core.log import logger
from venturi.runtime.context import failure, place
from venturi.runtime.executable import Call, Executable
from venturi.runtime.held import Held
from venturi.runtime.nvtx import named
from venturi.runtime.profiler import Profiler

MAX_BINDINGS = 16
_GROUPS, _GROUP_US = 5, 2000.0
T = torch.Tensor


@dataclass(frozen=True)
class GraphBinding:
    """Fixed for a set of input shapes. Without a `graph` (`reason` says why) the steps are launched one by one, in
    memory of the allocator that others use too."""

    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    graph: torch.cuda.CUDAGraph | None
    reason: str
    library_bytes: int = 0

    @property
    def arena_bytes(self) -> int:
        """What the graph's own pool has of the device's memory, and the inputs' copies."""
        if self.graph is None:
            return 0
        pool: Any = self.graph.pool()
        segments: Iterator[dict[str, Any]] = (s for s in torch.cuda.memory_snapshot() if s["segment_pool_id"] == pool)
        return sum(int(s["total_size"]) for s in segments) + sum(int(x.nbytes) for x in self.inputs)


class CudaContext:
    """Not thread-safe by itself. Results are ordered on the caller's current stream; they are the caller's own."""

    def __init__(self, executable: Executable, device: torch.device) -> None:
        self._executable = executable
        self._device = device
        self._bindings: OrderedDict[tuple[Any, ...], GraphBinding] = OrderedDict()
        self._side = torch.cuda.Stream(device)
        self._scratch = Scratch(device)
        self._last: torch.cuda.Stream | None = None
        self.profiler: Profiler | None = None

    def run(self, args: Sequence[Any]) -> list[Any]:
        """Stored inputs (host or device) in, stored outputs on the device out. Raises RequestError."""
        key = _key(args)
        binding = self._bindings.get(key)
        if binding is not None and binding.graph is not None and self.profiler is None:
            if torch.cuda.current_device() == self._device.index:
                return self._replay(binding.graph, binding, args)
            with torch.cuda.device(self._device):
                return self._replay(binding.graph, binding, args)
        with torch.inference_mode(), torch.cuda.device(self._device), using(self._scratch):
            self._join()
            if self.profiler is not None or binding is not None or knobs.NVTX.get():
                return _own(self._eager(self._on_device(args), self.profiler))
            return self._bind(key, args)

    @torch.no_grad()
    def _replay(self, graph: torch.cuda.CUDAGraph, binding: GraphBinding, args: Sequence[Any]) -> list[Any]:
        self._join()
        for held, given in zip(binding.inputs, args):
            held.copy_(given, non_blocking=True)
        graph.replay()
        return [x.clone() for x in binding.outputs]

    def hold(self, args: Sequence[Any]) -> Held:
        """Device copies of `args`, and outputs, where the graph of their shapes has them. Raises RequestError when
        there is no such graph."""
        self.run(args)
        binding = self._bindings.get(_key(args))
        if binding is None or binding.graph is None:
            reason = "VENTURI_NVTX is set" if binding is None else binding.reason
            raise RequestError(f"the engine runs without a CUDA graph for these shapes: {reason}; use engine.run")
        graph, executable = binding.graph, self._executable

        def run(kept: Executable = executable) -> None:
            """The graph launches kernels of the executable."""
            graph.replay()

        run()
        return Held(binding.inputs, binding.outputs, run)

    @property
    def arena_bytes(self) -> int:
        return self._scratch.nbytes + sum(b.arena_bytes for b in self._bindings.values())

    def binding_of(self, args: Sequence[Any]) -> GraphBinding | None:
        return self._bindings.get(_key(args))

    def _join(self) -> None:
        """A caller that changes streams must not overtake its own previous run: the graph's memory is shared."""
        stream = torch.cuda.current_stream()
        if self._last is not None and self._last.cuda_stream != stream.cuda_stream:
            stream.wait_stream(self._last)
        self._last = stream

    def _on_device(self, args: Sequence[Any]) -> list[Any]:
        return [a.to(self._device) if isinstance(a, T) else a for a in args]

    def _eager(self, args: list[Any], profiler: Profiler | None = None) -> list[Any]:
        env = list(self._executable.template)
        for slot, arg in zip(self._executable.inputs, args):
            env[slot] = arg
        marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        named_steps = knobs.NVTX.get()
        call = None
        try:
            for call in self._executable.calls:
                if profiler is not None:
                    marks.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
                    marks[-1][0].record()
                if named_steps:
                    with named(f"{call.step.name} {call.step.tactic}"):
                        self._step(call, env)
                else:
                    self._step(call, env)
                if profiler is not None:
                    marks[-1][1].record()
        except torch.OutOfMemoryError as exc:
            raise out_of_memory(self._device, exc, place(call)) from exc
        except OPERATOR_ERRORS as exc:
            raise failure(call, exc) from exc
        except VenturiError as exc:
            exc.where = exc.where or place(call)
            raise
        if profiler is not None:
            torch.cuda.synchronize()
            for i, (start, end) in enumerate(marks):
                profiler.add(i, start.elapsed_time(end) * 1e3)
            profiler.runs += 1
        return [env[slot] for slot in self._executable.outputs]

    @staticmethod
    def _step(call: Call, env: list[Any]) -> None:
        result = call.kernel.run(*[env[i] for i in call.inputs])
        for slot, value in zip(call.outputs, result if isinstance(result, tuple) else (result,)):
            env[slot] = value
        for slot in call.dead:
            env[slot] = None

    def _bind(self, key: tuple[Any, ...], args: Sequence[Any]) -> list[Any]:
        """Run once as it is, then capture the same steps on inputs of our own."""
        moved = self._on_device(args)
        result = _own(self._eager(list(moved)))
        if not all(isinstance(x, T) for x in (*moved, *result)):
            self._keep(key, GraphBinding((), (), None, "inputs or outputs that are no tensors"))
            return result
        with torch.inference_mode(False):
            held = [torch.empty(x.shape, dtype=x.dtype, device=self._device) for x in moved]
        for own, x in zip(held, moved):
            own.copy_(x)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            self._eager(list(held))
            self._side.synchronize()
            outputs, reason = self._capture(graph, held)
        torch.cuda.current_stream().wait_stream(self._side)
        if reason:
            logger.warning("the engine runs without a CUDA graph for shapes %s: %s", key, reason)
            self._keep(key, GraphBinding((), (), None, reason))
        else:
            self._keep(key, GraphBinding(tuple(held), tuple(outputs), graph, ""))
        return result

    def _capture(self, graph: torch.cuda.CUDAGraph, held: list[T]) -> tuple[list[Any], str]:
        outputs: list[Any] = []
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            outputs = self._eager(list(held))
        except (RequestError, VenturiError) as exc:
            try:
                graph.capture_end()
            except RuntimeError:
                torch.cuda.synchronize()
            return [], str(exc).splitlines()[0]
        graph.capture_end()
        return outputs, ""

    def _keep(self, key: tuple[Any, ...], binding: GraphBinding) -> None:
        self._bindings[key] = binding
        while len(self._bindings) > MAX_BINDINGS:
            self._bindings.popitem(last=False)


def replay_us(executable: Executable, device: torch.device, args: Sequence[Any], hopeless_us: float) -> float | None:
    """Median microseconds of a graph's replays on device inputs; None for an engine that runs without a graph.

    Stops early when the first replays take longer than `hopeless_us`."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.inference_mode(), torch.cuda.stream(side):
        context, graph = CudaContext(executable, device), torch.cuda.CUDAGraph()
        with using(context._scratch):
            context._eager(list(args))
            side.synchronize()
            _, reason = context._capture(graph, list(args))
        try:
            return None if reason else _median_us(graph, hopeless_us)
        finally:  # the allocator cannot give a dead graph's memory back while it captures the next one
            graph.reset()
            torch.cuda.empty_cache()


def _median_us(graph: torch.cuda.CUDAGraph, hopeless_us: float) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times: list[float] = []
    calls = 1
    for _ in range(_GROUPS + 2):
        start.record()
        for _ in range(calls):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
        if len(times) > 2 and times[-1] > hopeless_us:
            break
        calls = max(1, min(50, int(_GROUP_US / times[-1])))
    return statistics.median(times[2:])


def _own(outputs: list[Any]) -> list[Any]:
    """Copies: an output may be a weight, an input, or memory of the context."""
    return [x.clone() if isinstance(x, T) else x for x in outputs]


def _key(args: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(tuple(a.shape) if isinstance(a, T | np.ndarray) else None for a in args)
